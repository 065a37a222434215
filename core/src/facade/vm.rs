//! The VM tools.

use std::path::Path;

use nexus_schema::access::Scope;
use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::limits::{OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::network::NetworkPolicy;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::ALREADY;
use nexus_schema::tools::plan::Creation;
use nexus_schema::tools::vm::{
    UndeletedVm, VmCreateParams, VmDeleteOutput, VmDeleteParams, VmDetails, VmHistoryOutput, VmHistoryParams,
    VmInspectParams, VmListOutput, VmListParams, VmLogsOutput, VmLogsParams, VmPauseParams, VmRenameParams,
    VmRestartParams, VmResumeParams, VmStartParams, VmState, VmStopParams, VmUpdateParams, VmUsage,
};
use nexus_schema::{ErrorCode, Reference, TimeSpan, ToolError};

use super::openings::openings;
use super::{CallContext, Nexus, Shared, cut_page, number_cursor, page, patience, source};
use crate::access::{Caller, Deed};
use crate::context::{Change, Command, Decision, Handle, View, not_found};
use crate::egress;
use crate::op::{StoredResult, store_error};
use crate::os::{disk, failpoint, process};
use crate::store::{StoreError, history, vms};
use crate::vm::create::{self, Old, restart_and_wait, start_and_wait, stop_and_wait};
use crate::vm::defaults;
use crate::vm::lifetime;
use crate::vm::wait::{ask, until_down};
use crate::vm::{details, wake};
use crate::vm::{packages, policy};
use crate::vmm::console;

/// Time for which a resume waits for a suspended VM to wake.
const WAKE_WAIT: std::time::Duration = std::time::Duration::from_secs(45);
/// Time for which a suspension waits for the end of the VMM.
const SUSPEND_WAIT: std::time::Duration = std::time::Duration::from_secs(30);
/// Time for which a resume waits for the agent's answer.
const RESUMED_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

impl Nexus {
    /// The tool `vm_create`.
    pub async fn vm_create(
        &self,
        ctx: &CallContext,
        params: VmCreateParams,
    ) -> Result<Creation<VmDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        self.shared.may_create(&ctx.caller, &params).await?;
        if params.dry_run == Some(true) {
            return self.shared.plan_vm(&params).await.map(Creation::from);
        }
        let op = create::begin(&self.shared, &ctx.caller.owner, params).await?;
        self.shared.ops.wait(ctx, op, wait).await.map(Creation::from)
    }

    /// The tool `vm_list`.
    pub async fn vm_list(&self, ctx: &CallContext, params: VmListParams) -> Result<VmListOutput, ToolError> {
        let limit = page(params.limit)?;
        let caller = ctx.caller.clone();
        let rows = self.shared.store.read(move |db| {
            seen_rows(
                limit + 1,
                params.cursor,
                |row: &vms::VmRecord| row.name.to_string(),
                |after, limit| vms::list(db, params.state, &params.tags, after, limit),
                |row| caller.sees(row),
            )
        });
        let rows = rows.await.map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.name.to_string());
        Ok(VmListOutput { vms: rows.iter().map(View::summary).collect(), next_cursor })
    }

    /// The tool `vm_inspect`.
    pub async fn vm_inspect(
        &self,
        ctx: &CallContext,
        params: VmInspectParams,
    ) -> Result<VmDetails, ToolError> {
        let vm = self.shared.vms.resolve(&ctx.caller, &params.vm)?;
        let mut details = details(&self.shared, &Reference::Id(vm)).await?;
        if let Some(process) = &mut details.process {
            process.walls = crate::vmm::walls_of(process.pid);
        }
        details.usage = Some(usage(&details));
        Ok(details)
    }

    /// The tool `vm_start`.
    pub async fn vm_start(
        &self,
        ctx: &CallContext,
        params: VmStartParams,
    ) -> Result<OpOutcome<VmDetails>, ToolError> {
        let (wait, cold) = (patience(params.wait_s)?, params.cold.unwrap_or(false));
        let if_boot = params.if_boot_id;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::start(record.name.as_str(), record.state)?;
        policy::same_boot(record.name.as_str(), record.boot_id, if_boot)?;
        let op = self.shared.begin_op("vm_start", ctx, subject(&record)).await?;
        let (shared, who) = (self.shared.clone(), ctx.caller.owner.clone());
        self.shared.ops.run(op, move |progress| async move {
            let was = handle.view.borrow().record.state;
            let was_ready = was == VmState::Ready;
            if cold && was == VmState::Suspended {
                stop_and_wait(&handle, &who, false, if_boot, &progress).await?;
            }
            start_and_wait(&handle, &who, if_boot, &progress).await?;
            answers_again(&handle).await;
            if was_ready {
                progress.step(ALREADY);
            }
            details(&shared, &Reference::Id(record.id)).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// The tool `vm_stop`.
    pub async fn vm_stop(
        &self,
        ctx: &CallContext,
        params: VmStopParams,
    ) -> Result<OpOutcome<VmDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let force = params.force.unwrap_or(false);
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::stop(record.name.as_str(), record.state)?;
        policy::same_boot(record.name.as_str(), record.boot_id, params.if_boot_id)?;
        let op = self.shared.begin_op("vm_stop", ctx, subject(&record)).await?;
        let (shared, who) = (self.shared.clone(), ctx.caller.owner.to_string());
        self.shared.ops.run(op, move |progress| async move {
            failpoint::reach("stop-begun");
            let decision = stop_and_wait(&handle, &who, force, params.if_boot_id, &progress).await?;
            if decision == Decision::Already {
                progress.step(ALREADY);
            }
            details(&shared, &Reference::Id(record.id)).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// The tool `vm_restart`.
    pub async fn vm_restart(
        &self,
        ctx: &CallContext,
        params: VmRestartParams,
    ) -> Result<OpOutcome<VmDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let (force, if_boot) = (params.force.unwrap_or(false), params.if_boot_id);
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::restart(record.name.as_str(), record.state)?;
        policy::same_boot(record.name.as_str(), record.boot_id, if_boot)?;
        let op = self.shared.begin_op("vm_restart", ctx, subject(&record)).await?;
        let (shared, who, old) = (self.shared.clone(), ctx.caller.owner.clone(), Old::Boot(record.boot_id));
        self.shared.ops.run(op, move |progress| async move {
            restart_and_wait(&handle, &who, force, if_boot, old, &progress).await?;
            details(&shared, &Reference::Id(record.id)).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// The tool `vm_pause`.
    pub async fn vm_pause(&self, ctx: &CallContext, params: VmPauseParams) -> Result<VmDetails, ToolError> {
        let VmPauseParams { vm, suspend, if_boot_id: if_boot } = params;
        let handle = self.shared.vms.get(&ctx.caller, &vm)?;
        let (id, who) = (handle.view.borrow().record.id, ctx.caller.owner.to_string());
        if suspend == Some(true) {
            suspend_and_wait(&handle, who, if_boot).await?;
        } else {
            ask(&handle, |reply| Command::Pause { who, if_boot, reply }).await?;
        }
        details(&self.shared, &Reference::Id(id)).await
    }

    /// The tool `vm_resume`.
    pub async fn vm_resume(&self, ctx: &CallContext, params: VmResumeParams) -> Result<VmDetails, ToolError> {
        let VmResumeParams { vm, if_boot_id: if_boot } = params;
        let handle = self.shared.vms.get(&ctx.caller, &vm)?;
        let (id, who) = (handle.view.borrow().record.id, ctx.caller.owner.to_string());
        let (record, what) = (handle.view.borrow().record.clone(), "vm_resume");
        policy::same_boot(record.name.as_str(), record.boot_id, if_boot)?;
        if wake(&handle, &who, what, WAKE_WAIT).await?.is_none()
            && ask(&handle, |reply| Command::Resume { who, if_boot, reply }).await? == Decision::Go
        {
            answers_again(&handle).await;
        }
        details(&self.shared, &Reference::Id(id)).await
    }

    /// The tool `vm_rename`.
    pub async fn vm_rename(&self, ctx: &CallContext, params: VmRenameParams) -> Result<VmDetails, ToolError> {
        let VmRenameParams { vm, name, if_boot_id } = params;
        let change = Change { name: Some(name), if_boot: if_boot_id, ..Change::default() };
        let handle = self.shared.vms.get(&ctx.caller, &vm)?;
        self.change(ctx, &handle, change).await
    }

    /// The tool `vm_delete`.
    pub async fn vm_delete(
        &self,
        ctx: &CallContext,
        params: VmDeleteParams,
    ) -> Result<VmDeleteOutput, ToolError> {
        let (who, force) = (ctx.caller.owner.to_string(), params.force.unwrap_or(false));
        let if_boot = params.if_boot_id;
        let delete = async |handle: &Handle| {
            let (who, why) = (who.clone(), "deleted");
            ask(handle, |reply| Command::Delete { who, force, if_boot, why, reply }).await
        };
        match (&params.vm, params.tags.is_empty()) {
            (Some(vm), true) => {
                let handle = self.shared.vms.get(&ctx.caller, vm)?;
                let deed = deletion(&ctx.caller, std::slice::from_ref(&handle));
                self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
                self.shared.make_room().await;
                Ok(VmDeleteOutput { done: true, deleted: vec![delete(&handle).await?], failed: Vec::new() })
            }
            (None, false) if if_boot.is_some() => {
                Err(ToolError::invalid("if_boot_id is of one VM, and tags mean several")
                    .hint("give vm instead of tags"))
            }
            (None, false) => {
                let mut handles = self.shared.vms.seen_by(&ctx.caller);
                handles.retain(|handle| {
                    let tags = &handle.view.borrow().record.tags;
                    params.tags.iter().all(|(key, value)| tags.get(key) == Some(value))
                });
                let deed = deletion(&ctx.caller, &handles);
                self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
                self.shared.make_room().await;
                let (mut deleted, mut failed) = (Vec::new(), Vec::new());
                for handle in handles {
                    let record = handle.view.borrow().record.clone();
                    match delete(&handle).await {
                        Ok(gone) => deleted.push(gone),
                        // Another call deleted it first.
                        Err(error) if error.code == ErrorCode::VmNotFound => {}
                        Err(error) => failed.push(UndeletedVm { id: record.id, name: record.name, error }),
                    }
                }
                deleted.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                failed.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                Ok(VmDeleteOutput { done: true, deleted, failed })
            }
            (None, true) => Err(ToolError::invalid("vm or tags are required")
                .hint("pass vm, or tags that all VMs to delete have")),
            (Some(_), false) => {
                Err(ToolError::invalid("vm and tags cannot be used together").hint("give one of them"))
            }
        }
    }

    /// The tool `vm_update`.
    pub async fn vm_update(&self, ctx: &CallContext, params: VmUpdateParams) -> Result<VmDetails, ToolError> {
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let network = handle.view.borrow().record.spec.network.clone();
        let after = self.shared.network_after(&ctx.caller, &network, &params).await?;
        let deed = opening(&ctx.caller, &handle.view.borrow(), &params, after.as_ref());
        self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        let change = Change {
            tags: params.tags,
            remove_tags: params.remove_tags,
            protected: params.protected,
            name: params.name,
            network: params.network,
            ttl: params.ttl,
            idle_stop: params.idle_stop,
            idle_action: params.idle_action,
            if_boot: params.if_boot_id,
        };
        self.change(ctx, &handle, change).await
    }

    async fn change(
        &self,
        ctx: &CallContext,
        handle: &Handle,
        change: Change,
    ) -> Result<VmDetails, ToolError> {
        let id = handle.view.borrow().record.id;
        let (who, change) = (ctx.caller.owner.to_string(), Box::new(change));
        ask(handle, |reply| Command::Update { who, change, reply }).await?;
        details(&self.shared, &Reference::Id(id)).await
    }

    /// The tool `vm_logs`.
    pub async fn vm_logs(&self, ctx: &CallContext, params: VmLogsParams) -> Result<VmLogsOutput, ToolError> {
        let wait = match params.wait_s {
            Some(_) => patience(params.wait_s)?,
            None => std::time::Duration::ZERO,
        };
        let max = u64::from(params.max_bytes.unwrap_or(OUTPUT_DEFAULT as u32));
        if !(1..=OUTPUT_MAX).contains(&max) {
            return Err(ToolError::invalid(format!("max_bytes must be 1 to {OUTPUT_MAX}, got {max}")));
        }
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let directory = self.shared.paths.vm(handle.view.borrow().record.id);
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let (from, cursor) = (directory.clone(), params.cursor.clone());
            let chunk =
                tokio::task::spawn_blocking(move || console::read(&from, cursor.as_deref(), max as usize))
                    .await
                    .map_err(|e| ToolError::internal(format!("read the console: {e}")))?
                    .map_err(|error| match error.kind() {
                        std::io::ErrorKind::InvalidInput => {
                            ToolError::invalid("invalid cursor: pass one that vm_logs returned")
                        }
                        _ => ToolError::internal(format!("read the console: {error}")),
                    })?;
            if !chunk.text_bytes.is_empty() || tokio::time::Instant::now() >= deadline {
                return Ok(VmLogsOutput {
                    text: match params.raw {
                        true => String::from_utf8_lossy(&chunk.text_bytes).into_owned(),
                        false => console::readable(&chunk.text_bytes),
                    },
                    cursor: chunk.cursor,
                    lost_bytes: chunk.lost_bytes,
                });
            }
            let next = tokio::time::Instant::now() + std::time::Duration::from_millis(200);
            tokio::time::sleep_until(next.min(deadline)).await;
        }
    }

    /// The tool `vm_history`.
    pub async fn vm_history(
        &self,
        ctx: &CallContext,
        params: VmHistoryParams,
    ) -> Result<VmHistoryOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?;
        let id = self.shared.past_vm(&ctx.caller, &params.vm).await?;
        let rows = self
            .shared
            .store
            .read(move |db| history::list(db, id, before, limit + 1))
            .await
            .map_err(store_error)?;
        if rows.is_empty() && before.is_none() {
            return Err(not_found(&params.vm));
        }
        let (rows, next_cursor) = cut_page(rows, limit, |(seq, _)| seq.to_string());
        Ok(VmHistoryOutput { id, transitions: rows.into_iter().map(|(_, t)| t).collect(), next_cursor })
    }
}

/// What a VM uses of the host. What cannot be read is left out.
fn usage(vm: &VmDetails) -> VmUsage {
    let process = vm.process.as_ref().and_then(|process| process::usage(process.pid).ok().flatten());
    let drives = vm.drives.iter().filter_map(|drive| disk::allocated_bytes(Path::new(&drive.path)).ok());
    VmUsage {
        cpu_ms: process.map(|used| used.cpu_ms),
        memory_bytes: process.map(|used| used.memory_bytes),
        disk_bytes: drives.sum(),
    }
}

impl Shared {
    /// The id of a VM that a caller sees; or of a deleted one that it made, if it has a token, the last one of that name.
    pub(super) async fn past_vm(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        let not_found = match self.vms.resolve(caller, vm) {
            Ok(id) => return Ok(id),
            Err(not_found) => not_found,
        };
        let (wanted, caller) = (vm.clone(), caller.clone());
        let past = self.store.read(move |db| history::past(db, &wanted)).await.map_err(store_error)?;
        // One that still exists and that the caller does not see is none of its own either.
        let there = |id: &VmId| self.vms.of_daemon(&Reference::Id(*id)).is_ok();
        let seen = past.into_iter().find(|(id, maker)| caller.made(maker) && !there(id));
        seen.map(|(id, _)| id).ok_or(not_found)
    }

    /// Refuses what a token may not ask for in a new VM, before anything changes.
    async fn may_create(&self, caller: &Caller, params: &VmCreateParams) -> Result<(), ToolError> {
        if caller.grant().is_none() {
            return Ok(());
        }
        if params.run.is_some() && !caller.has(Scope::Exec) {
            let message = "run needs the scope exec, which this token lacks";
            return Err(ToolError::new(ErrorCode::Forbidden, message)
                .hint("leave run out, or ask for a token with the scope exec"));
        }
        source::may_use(caller, params.from.as_deref()).await?;
        source::may_use(caller, params.kernel.as_deref()).await?;
        let Some(asked) = params.network.as_ref().filter(|_| !caller.has(Scope::Network)) else {
            return Ok(());
        };
        let default = defaults::read(&self.store).await?.network;
        let [before, after] = [None, Some(asked)].map(|asked| egress::starting(default, asked));
        let (Ok(before), Ok(mut after)) = (before, after) else { return Ok(()) };
        packages::fill(self, &mut after).await?;
        let opened = openings(&before, &after);
        if opened.is_empty() {
            return Ok(());
        }
        let message =
            format!("this token lacks the scope network, which a new VM needs to {}", opened.join(", "));
        Err(ToolError::new(ErrorCode::Forbidden, message)
            .hint("leave that out of network, or ask for a token with the scope network"))
    }

    /// Returns the network that a VM would have after a change by a caller who needs a confirmation to open it, with the registries of the
    /// preset `packages`. `None` if the change does not concern it or will be refused.
    async fn network_after(
        &self,
        caller: &Caller,
        before: &NetworkPolicy,
        params: &VmUpdateParams,
    ) -> Result<Option<NetworkPolicy>, ToolError> {
        let asked = params.network.as_ref().filter(|_| !caller.has(Scope::Network));
        let Some(Ok(mut after)) = asked.map(|asked| egress::merge(before, asked)) else { return Ok(None) };
        packages::fill(self, &mut after).await?;
        Ok(Some(after))
    }
}

/// What of the deletion of VMs needs a confirmation: drives with data, and VMs that others made.
fn deletion(caller: &Caller, handles: &[Handle]) -> Deed {
    let mut plan: Vec<String> = Vec::new();
    for handle in handles {
        let view = handle.view.borrow();
        let record = &view.record;
        // That of a protected one is refused anyway.
        if let Some(why) = loss(caller, &view).filter(|_| !record.protected) {
            plan.push(format!("delete the VM {} ({}), which {why}", record.name, record.id));
        }
    }
    plan.sort_unstable();
    Deed { tool: "vm_delete", plan }
}

/// Why the deletion of a VM needs a confirmation, if it does.
fn loss(caller: &Caller, view: &View) -> Option<String> {
    let mut why = Vec::new();
    let drives: Vec<&str> =
        view.drives.iter().filter(|drive| !drive.is_root()).map(|drive| drive.name.as_str()).collect();
    if !drives.is_empty() {
        why.push(format!("has the data drives {}", drives.join(", ")));
    }
    if !caller.is_maker(&view.record.owner) {
        why.push(format!("was made by {}", view.record.owner));
    }
    (!why.is_empty()).then(|| why.join(" and "))
}

/// What of a change needs a confirmation: to take protection away, an end of its life whose deletion needs one, and to open the network
/// without the scope for it. `after` is the network that it would have then, if that is to be looked at.
fn opening(caller: &Caller, view: &View, params: &VmUpdateParams, after: Option<&NetworkPolicy>) -> Deed {
    let record = &view.record;
    let mut plan = Vec::new();
    if record.protected && params.protected == Some(false) {
        plan.push(format!("allow the deletion of the protected VM {} ({})", record.name, record.id));
    }
    // A life that already has an end may be extended.
    let is_sooner = |ttl: &TimeSpan| {
        lifetime::end_of(*ttl).is_some_and(|end| record.expires_at.is_none_or(|at| end < at))
    };
    let ttl = params.ttl.filter(is_sooner);
    if let Some(ttl) = ttl.filter(|_| !params.protected.unwrap_or(record.protected))
        && let Some(why) = loss(caller, view)
    {
        plan.push(format!("delete the VM {} ({}) after {ttl}, which {why}", record.name, record.id));
    }
    let opened = after.map(|after| openings(&record.spec.network, after)).unwrap_or_default();
    plan.extend(opened.into_iter().map(|what| format!("for the VM {} ({}) {what}", record.name, record.id)));
    Deed { tool: "vm_update", plan }
}

/// Reads rows page by page until there are `limit` that a caller sees.
pub(super) fn seen_rows<R>(
    limit: u32,
    mut after: Option<String>,
    cursor: impl Fn(&R) -> String,
    read: impl Fn(Option<&str>, u32) -> Result<Vec<R>, StoreError>,
    sees: impl Fn(&R) -> bool,
) -> Result<Vec<R>, StoreError> {
    let mut seen = Vec::new();
    loop {
        let rows = read(after.as_deref(), limit)?;
        let is_last = rows.len() < limit as usize;
        after = rows.last().map(&cursor).or(after);
        seen.extend(rows.into_iter().filter(&sees));
        if is_last || seen.len() >= limit as usize {
            seen.truncate(limit as usize);
            return Ok(seen);
        }
    }
}

/// An operation's result, of any tool.
pub(super) type AnyResult = StoredResult;

/// Returns the subject of an operation on a VM: its id and name.
pub(super) fn subject(record: &vms::VmRecord) -> Option<(String, String)> {
    Some((record.id.to_string(), record.name.to_string()))
}

/// Suspends a VM, and waits until it is down.
async fn suspend_and_wait(handle: &Handle, who: String, if_boot: Option<BootId>) -> Result<(), ToolError> {
    ask(handle, |reply| Command::Suspend { who, if_boot, reply }).await?;
    if until_down(&mut handle.view.clone(), SUSPEND_WAIT).await {
        return Ok(());
    }
    let name = handle.view.borrow().record.name.clone();
    let message =
        format!("the VMM of {name} is still running {} s after it was killed", SUSPEND_WAIT.as_secs());
    Err(ToolError::new(ErrorCode::Timeout, message).hint("its memory is saved: look at it with vm_inspect"))
}

/// Waits until the agent of a VM that was resumed answers: a daemon that did not pause it itself has to connect first.
async fn answers_again(handle: &Handle) {
    let mut view = handle.view.clone();
    let answers = view.wait_for(|view| {
        view.deleted || !matches!(view.record.state, VmState::Paused | VmState::Unreachable)
    });
    tokio::time::timeout(RESUMED_WAIT, answers).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_of_its_life_is_confirmed_like_a_deletion() {
        let record = crate::store::tests::vm("web", 3);
        let vm = Reference::Id(record.id);
        let mut view = View { record, drives: Vec::new(), link: None, deleted: false };
        let plan = |view: &View, who: &'static str, seconds| {
            let ttl = Some(TimeSpan::seconds(seconds));
            let params = VmUpdateParams { ttl, ..VmUpdateParams::of(vm.clone()) };
            opening(&Caller::owner(who), view, &params, None).plan
        };
        assert!(plan(&view, "uid:0", 1).is_empty() && plan(&view, "uid:1", 0).is_empty());
        let foreign = plan(&view, "uid:1", 1).join("; ");
        assert!(foreign.contains("after 1s, which was made by uid:0"), "{foreign}");
        view.record.expires_at = lifetime::end_of(TimeSpan::seconds(60));
        assert!(plan(&view, "uid:1", 3600).is_empty() && !plan(&view, "uid:1", 1).is_empty());
        view.record.protected = true;
        assert!(plan(&view, "uid:1", 1).is_empty());
    }
}
