//! The VM tools.

use nexus_schema::limits::{OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::ALREADY;
use nexus_schema::tools::plan::Creation;
use nexus_schema::tools::vm::{
    UndeletedVm, VmCreateParams, VmDeleteOutput, VmDeleteParams, VmDetails, VmHistoryOutput, VmHistoryParams,
    VmInspectParams, VmListOutput, VmListParams, VmLogsOutput, VmLogsParams, VmStartParams, VmState,
    VmStopParams, VmUpdateParams,
};
use nexus_schema::{ErrorCode, Reference, ToolError};

use super::{CallContext, Nexus, cut_page, number_cursor, page, patience};
use crate::context::{Change, Command, Decision, Handle, View, not_found};
use crate::op::{StoredResult, store_error};
use crate::store::{history, vms};
use crate::vm::create::{self, ask, start_and_wait, until_down};
use crate::vm::details;
use crate::vm::policy;
use crate::vmm::console;

impl Nexus {
    /// The tool `vm_create`.
    pub async fn vm_create(
        &self,
        ctx: &CallContext,
        params: VmCreateParams,
    ) -> Result<Creation<VmDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        if params.dry_run == Some(true) {
            return self.shared.plan_vm(&params).await.map(Creation::from);
        }
        let op = create::begin(&self.shared, &ctx.caller.owner, params).await?;
        self.shared.ops.wait(ctx, op, wait).await.map(Creation::from)
    }

    /// The tool `vm_list`.
    pub async fn vm_list(&self, _: &CallContext, params: VmListParams) -> Result<VmListOutput, ToolError> {
        let limit = page(params.limit)?;
        let rows = self
            .shared
            .store
            .read(move |db| vms::list(db, params.state, &params.tags, params.cursor.as_deref(), limit + 1))
            .await
            .map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.name.to_string());
        Ok(VmListOutput { vms: rows.iter().map(View::summary).collect(), next_cursor })
    }

    /// The tool `vm_inspect`.
    pub async fn vm_inspect(&self, _: &CallContext, params: VmInspectParams) -> Result<VmDetails, ToolError> {
        let mut details = details(&self.shared, &params.vm).await?;
        if let Some(process) = &mut details.process {
            process.walls = crate::vmm::walls_of(process.pid);
        }
        Ok(details)
    }

    /// The tool `vm_start`.
    pub async fn vm_start(
        &self,
        ctx: &CallContext,
        params: VmStartParams,
    ) -> Result<OpOutcome<VmDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let handle = self.shared.vms.get(&params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::start(record.name.as_str(), record.state)?;
        let op = self.shared.begin_op("vm_start", ctx, subject(&record)).await?;
        let (shared, who) = (self.shared.clone(), ctx.caller.owner.clone());
        self.shared.ops.run(op, move |progress| async move {
            let was_ready = handle.view.borrow().record.state == VmState::Ready;
            start_and_wait(&handle, &who, &progress).await?;
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
        let handle = self.shared.vms.get(&params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::stop(record.name.as_str(), record.state)?;
        let op = self.shared.begin_op("vm_stop", ctx, subject(&record)).await?;
        let (shared, who) = (self.shared.clone(), ctx.caller.owner.to_string());
        self.shared.ops.run(op, move |progress| async move {
            let decision = ask(&handle, |reply| Command::Stop { who, force, reply }).await?;
            if decision == Decision::Go {
                progress.step("shutting down");
                let limit = std::time::Duration::from_secs(120);
                if !until_down(&mut handle.view.clone(), limit).await {
                    return Err(ToolError::new(
                        ErrorCode::Timeout,
                        format!("{} is still running after {} s", record.name, limit.as_secs()),
                    )
                    .hint("call vm_stop with force: true"));
                }
            } else {
                progress.step(ALREADY);
            }
            details(&shared, &Reference::Id(record.id)).await
        });
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// The tool `vm_delete`.
    pub async fn vm_delete(
        &self,
        ctx: &CallContext,
        params: VmDeleteParams,
    ) -> Result<VmDeleteOutput, ToolError> {
        let (who, force) = (ctx.caller.owner.to_string(), params.force.unwrap_or(false));
        let delete = async |handle: &Handle| {
            let who = who.clone();
            ask(handle, |reply| Command::Delete { who, force, reply }).await
        };
        match (&params.vm, params.tags.is_empty()) {
            (Some(vm), true) => {
                let handle = self.shared.vms.get(vm)?;
                self.shared.make_room().await;
                Ok(VmDeleteOutput { done: true, deleted: vec![delete(&handle).await?], failed: Vec::new() })
            }
            (None, false) => {
                self.shared.make_room().await;
                let (mut deleted, mut failed) = (Vec::new(), Vec::new());
                for handle in self.shared.vms.all() {
                    let record = handle.view.borrow().record.clone();
                    if !params.tags.iter().all(|(key, value)| record.tags.get(key) == Some(value)) {
                        continue;
                    }
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
        let handle = self.shared.vms.get(&params.vm)?;
        let id = handle.view.borrow().record.id;
        let change = Box::new(Change {
            tags: params.tags,
            remove_tags: params.remove_tags,
            protected: params.protected,
            name: params.name,
            network: params.network,
        });
        let who = ctx.caller.owner.to_string();
        ask(&handle, |reply| Command::Update { who, change, reply }).await?;
        details(&self.shared, &Reference::Id(id)).await
    }

    /// The tool `vm_logs`.
    pub async fn vm_logs(&self, _: &CallContext, params: VmLogsParams) -> Result<VmLogsOutput, ToolError> {
        let wait = match params.wait_s {
            Some(_) => patience(params.wait_s)?,
            None => std::time::Duration::ZERO,
        };
        let max = u64::from(params.max_bytes.unwrap_or(OUTPUT_DEFAULT as u32));
        if !(1..=OUTPUT_MAX).contains(&max) {
            return Err(ToolError::invalid(format!("max_bytes must be 1 to {OUTPUT_MAX}, got {max}")));
        }
        let handle = self.shared.vms.get(&params.vm)?;
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
        _: &CallContext,
        params: VmHistoryParams,
    ) -> Result<VmHistoryOutput, ToolError> {
        let limit = page(params.limit)?;
        let before = number_cursor(params.cursor.as_deref())?;
        let id = match &params.vm {
            Reference::Id(id) => *id,
            Reference::Name(name) => match self.shared.vms.resolve(&params.vm) {
                Ok(id) => id,
                Err(not_found) => {
                    let name = name.clone();
                    let past = self.shared.store.read(move |db| history::last_of_name(db, &name)).await;
                    past.map_err(store_error)?.ok_or(not_found)?
                }
            },
        };
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

/// An operation's result, of any tool.
pub(super) type AnyResult = StoredResult;

/// Returns the subject of an operation on a VM: its id and name.
fn subject(record: &vms::VmRecord) -> Option<(String, String)> {
    Some((record.id.to_string(), record.name.to_string()))
}
