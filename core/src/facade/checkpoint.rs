//! The checkpoint tools, and `vm_rollback`.

use nexus_schema::id::{CheckpointId, CheckpointKind, OpId, VmId};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::checkpoint::{
    CheckpointDeleteOutput, CheckpointDeleteParams, CheckpointDetails, CheckpointListOutput,
    CheckpointListParams, RestoreOutput, VmCheckpointParams, VmRollbackParams,
};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, Name, Reference, TimeSpan, ToolError};

use super::vm::{seen_rows, subject};
use super::{CallContext, Nexus, Shared, cut_page, number_cursor, page, patience};
use crate::access::{Caller, Deed};
use crate::context::{Handle, Registry};
use crate::op::{did_you_mean, store_error};
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::{StoreError, random_id};
use crate::vm::checkpoint::{self, Wanted};
use crate::vm::{lifetime, policy};

/// How long a checkpoint is kept that nobody asked for: what a rollback took back, or the state before a command.
pub(super) const KEPT: TimeSpan = TimeSpan::seconds(60 * 60);

impl Nexus {
    /// The tool `vm_checkpoint`.
    pub async fn vm_checkpoint(
        &self,
        ctx: &CallContext,
        params: VmCheckpointParams,
    ) -> Result<OpOutcome<CheckpointDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let named = params.name.map_or(Given::As("checkpoint"), Given::Name);
        let mut wanted = self.shared.wanted(&ctx.caller, named, params.ttl)?;
        wanted.tags = params.tags;
        wanted.if_boot = params.if_boot_id;
        let op = self.begin_checkpoint(ctx, handle, wanted).await?;
        self.shared.ops.wait(ctx, op, wait).await
    }

    /// Begins the operation that takes a checkpoint of a VM which can be saved now.
    pub(super) async fn begin_checkpoint(
        &self,
        ctx: &CallContext,
        handle: Handle,
        wanted: Wanted,
    ) -> Result<OpId, ToolError> {
        {
            let view = handle.view.borrow();
            policy::checkpointable(&view.record)?;
            policy::checkpoint(view.record.name.as_str(), view.record.state)?;
            policy::same_boot(view.record.name.as_str(), view.record.boot_id, wanted.if_boot)?;
        }
        let about = Some((wanted.id.to_string(), wanted.name.to_string()));
        let op = self.shared.begin_op("vm_checkpoint", ctx, about).await?;
        let shared = self.shared.clone();
        self.shared.ops.run(op, move |progress| async move {
            let _busy = handle.activity.begin();
            let row = checkpoint::take(&shared, &handle, wanted, &progress).await?;
            shared.checkpoint_details(row).await
        });
        Ok(op)
    }

    /// The tool `checkpoint_list`.
    pub async fn checkpoint_list(
        &self,
        ctx: &CallContext,
        params: CheckpointListParams,
    ) -> Result<CheckpointListOutput, ToolError> {
        let limit = page(params.limit)?;
        let cursor = number_cursor(params.cursor.as_deref())?.map(|seq| seq.to_string());
        let vm = match &params.vm {
            Some(vm) => Some(self.shared.past_vm(&ctx.caller, vm).await?),
            None => None,
        };
        let (caller, vms) = (ctx.caller.clone(), self.shared.vms.clone());
        let rows = self.shared.store.read(move |db| {
            let read = |after: Option<&str>, limit| {
                checkpoints::list(db, vm, after.and_then(|seq| seq.parse().ok()), limit)
            };
            let seq = |row: &CheckpointRecord| row.seq.to_string();
            seen_rows(limit + 1, cursor, seq, read, |row| sees(&vms, &caller, row))
        });
        let rows = rows.await.map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.seq.to_string());
        let mut checkpoints = Vec::with_capacity(rows.len());
        for row in rows {
            checkpoints.push(self.shared.checkpoint_details(row).await?);
        }
        Ok(CheckpointListOutput { checkpoints, next_cursor })
    }

    /// The tool `checkpoint_delete`.
    pub async fn checkpoint_delete(
        &self,
        ctx: &CallContext,
        params: CheckpointDeleteParams,
    ) -> Result<CheckpointDeleteOutput, ToolError> {
        self.shared.make_room().await;
        let row = self.shared.checkpoint(&ctx.caller, &params.checkpoint, None).await?;
        let plan = vec![format!("delete the checkpoint {} ({}) of the VM {}", row.name, row.id, row.vm_name)];
        let deed = Deed { tool: "checkpoint_delete", plan };
        self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        checkpoint::remove(&self.shared, &row).await?;
        let freed_bytes = row.memory_bytes.saturating_add(row.disk_bytes);
        Ok(CheckpointDeleteOutput { id: row.id, name: row.name, freed_bytes })
    }

    /// The tool `vm_rollback`.
    pub async fn vm_rollback(
        &self,
        ctx: &CallContext,
        params: VmRollbackParams,
    ) -> Result<OpOutcome<RestoreOutput>, ToolError> {
        let wait = patience(params.wait_s)?;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let record = handle.view.borrow().record.clone();
        policy::checkpointable(&record)?;
        policy::restore(record.name.as_str(), record.state)?;
        checkpoint::restorable(&record)?;
        policy::same_boot(record.name.as_str(), record.boot_id, params.if_boot_id)?;
        let row = self.shared.checkpoint(&ctx.caller, &params.checkpoint, Some(record.id)).await?;
        if row.vm != record.id {
            let message =
                format!("checkpoint {} is of the VM {}, not of {}", row.name, row.vm_name, record.name);
            return Err(ToolError::invalid(message).hint(to_fork(row.id)));
        }
        let keeps = params.keep_current.unwrap_or(true);
        if keeps && record.state != VmState::Ready {
            let message = format!("{} is {}, so its present cannot be kept", record.name, record.state);
            return Err(ToolError::new(ErrorCode::VmWrongState, message)
                .hint("call vm_start first, or give up its present with keep_current: false"));
        }
        let kept = if keeps { "and keep its present for an hour" } else { "and lose its present" };
        let plan = vec![format!(
            "take the VM {} ({}) back to checkpoint {} ({}) of {}, {kept}",
            record.name, record.id, row.name, row.id, row.created_at
        )];
        let deed = Deed { tool: "vm_rollback", plan };
        self.shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        let before = match keeps {
            true => Some(self.shared.wanted(&ctx.caller, Given::As("before-rollback"), Some(KEPT))?),
            false => None,
        };
        let (from, at) = (row.id, row.created_at);
        let op = self.shared.begin_op("vm_rollback", ctx, subject(&record)).await?;
        let (shared, who, if_boot) = (self.shared.clone(), ctx.caller.owner.to_string(), params.if_boot_id);
        self.shared.ops.run(op, move |progress| async move {
            let _busy = handle.activity.begin();
            // Before anything is taken of the present, and anything of the VM changes.
            let target = checkpoint::target(&shared, &handle, row, &progress).await?;
            let before = match before {
                Some(wanted) => {
                    let wanted = Wanted { if_boot, ..wanted };
                    Some(checkpoint::take(&shared, &handle, wanted, &progress).await?.id)
                }
                None => None,
            };
            let vm = checkpoint::rollback(&shared, &handle, &target, &who, if_boot, &progress).await?;
            Ok(RestoreOutput { vms: vec![vm], from, at, before })
        });
        self.shared.ops.wait(ctx, op, wait).await
    }
}

/// The name of a new checkpoint.
pub(super) enum Given {
    /// This one.
    Name(Name),
    /// One that begins so.
    As(&'static str),
}

impl Shared {
    /// A checkpoint to take for a caller.
    pub(super) fn wanted(
        &self,
        caller: &Caller,
        name: Given,
        ttl: Option<TimeSpan>,
    ) -> Result<Wanted, ToolError> {
        let id: CheckpointId = random_id();
        let name = match name {
            Given::Name(name) => name,
            Given::As(what) => checkpoint::made_up_name(what, id)?,
        };
        Ok(Wanted {
            id,
            name,
            owner: caller.owner.to_string(),
            tags: std::collections::BTreeMap::new(),
            expires_at: ttl.and_then(lifetime::end_of),
            if_boot: None,
            charges: self.tokens.charges(&caller.owner),
        })
    }

    /// A checkpoint that a caller sees; one that it may not see does not exist. A name means that of the VM `of`, if that is given.
    pub(super) async fn checkpoint(
        &self,
        caller: &Caller,
        wanted: &Reference<CheckpointKind>,
        of: Option<VmId>,
    ) -> Result<CheckpointRecord, ToolError> {
        let reference = wanted.clone();
        let found = self.store.read(move |db| -> Result<Vec<CheckpointRecord>, StoreError> {
            match reference {
                Reference::Id(id) => Ok(checkpoints::get(db, id)?.into_iter().collect()),
                Reference::Name(name) => checkpoints::named(db, &name),
            }
        });
        let mut found = found.await.map_err(store_error)?;
        found.retain(|row| sees(&self.vms, caller, row));
        let is_meant =
            |row: &CheckpointRecord| matches!(wanted, Reference::Id(_)) || of.is_none_or(|vm| row.vm == vm);
        let (mut found, others): (Vec<_>, Vec<_>) = found.into_iter().partition(is_meant);
        if let [first, _, ..] = found.as_slice() {
            let ids: Vec<String> = found.iter().map(|row| format!("{} of {}", row.id, row.vm_name)).collect();
            let message = format!("several checkpoints are called {}: {}", first.name, ids.join(", "));
            return Err(ToolError::invalid(message).hint("give the id of the one that you mean"));
        }
        if let Some(row) = found.pop() {
            return Ok(row);
        }
        if let Some(other) = others.first() {
            return Err(of_another(other));
        }
        let mut all = self.store.read(checkpoints::all).await.map_err(store_error)?;
        all.retain(|row| row.ready && sees(&self.vms, caller, row) && of.is_none_or(|vm| row.vm == vm));
        let names = all.iter().map(|row| row.name.as_str());
        Err(did_you_mean(checkpoint::not_found(wanted), &wanted.to_string(), names))
    }

    pub(super) async fn checkpoint_details(
        &self,
        row: CheckpointRecord,
    ) -> Result<CheckpointDetails, ToolError> {
        let (id, vm) = (row.id, row.vm);
        let known = self.store.read(move |db| checkpoints::is_current(db, id, vm));
        let current = known.await.map_err(store_error)?;
        let problem = checkpoint::problem(self, &row).await;
        let packed = checkpoint::packed_size(self, id).await;
        let Some(manifest) = row.manifest else {
            return Err(ToolError::internal(format!("checkpoint {id} has no manifest")));
        };
        Ok(CheckpointDetails {
            id,
            name: row.name,
            vm_id: vm,
            vm_name: row.vm_name,
            parent_id: row.parent,
            current,
            owner: row.owner,
            tags: row.tags,
            restored_by: format!("{} {}", manifest.host.driver, manifest.host.driver_version),
            problem,
            memory: manifest.spec.memory,
            memory_bytes: packed.map_or(row.memory_bytes, |packed| packed.bytes),
            unpacked_bytes: packed.map(|packed| packed.unpacked),
            disk_bytes: row.disk_bytes,
            quiesced: manifest.quiesced,
            pause_ms: row.pause_ms,
            created_at: row.created_at,
            expires_at: row.expires_at,
        })
    }
}

/// The error for a name that only a checkpoint of another VM has.
fn of_another(row: &CheckpointRecord) -> ToolError {
    let message =
        format!("the VM has no checkpoint {0}; {0} ({1}) is of the VM {2}", row.name, row.id, row.vm_name);
    let hint = format!("call checkpoint_list to see which VM each checkpoint is of; {}", to_fork(row.id));
    ToolError::new(ErrorCode::CheckpointNotFound, message).hint(hint)
}

/// The hint how a VM is made of a checkpoint.
pub(super) fn to_fork(checkpoint: CheckpointId) -> String {
    format!("call vm_fork with checkpoint: {checkpoint} to make a VM of it")
}

/// Whether a checkpoint exists for a caller: its own ones do, and those of VMs that it sees.
fn sees(vms: &Registry, caller: &Caller, row: &CheckpointRecord) -> bool {
    caller.made(&row.owner) || vms.get(caller, &Reference::Id(row.vm)).is_ok()
}
