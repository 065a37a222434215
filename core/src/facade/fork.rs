//! The tool `vm_fork`.

use std::collections::BTreeSet;

use nexus_schema::access::Scope;
use nexus_schema::id::{CheckpointKind, VmId, VmKind};
use nexus_schema::network::NetworkPolicy;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::checkpoint::{FORKS_MAX, RestoreOutput, VmForkParams};
use nexus_schema::{ErrorCode, Name, Reference, TimeSpan, ToolError};

use super::checkpoint::{Given, to_fork};
use super::openings::openings;
use super::{CallContext, Nexus, patience};
use crate::access::Caller;
use crate::context::Handle;
use crate::egress;
use crate::op::store_error;
use crate::store::checkpoints::{self, CheckpointRecord};
use crate::store::random_id;
use crate::vm::checkpoint::{self, Child, Forking, Wanted};
use crate::vm::{lifetime, policy};

/// How long the checkpoint is kept that is taken of a VM to fork it.
const KEPT: TimeSpan = TimeSpan::seconds(60 * 60);

/// What VMs are forked from.
enum Source {
    /// A checkpoint.
    Checkpoint(Box<CheckpointRecord>),
    /// A VM, of which one is taken first.
    Vm(Handle, Box<Wanted>),
}

impl Nexus {
    /// The tool `vm_fork`.
    pub async fn vm_fork(
        &self,
        ctx: &CallContext,
        params: VmForkParams,
    ) -> Result<OpOutcome<RestoreOutput>, ToolError> {
        let wait = patience(params.wait_s)?;
        let children = children(params.count, &params.names)?;
        let handle = params.vm.as_ref().map(|vm| self.shared.vms.get(&ctx.caller, vm)).transpose();
        let handle = match (handle, &params.vm, &params.checkpoint) {
            (Err(error), Some(vm), None) => return Err(self.or_checkpoint(&ctx.caller, vm, error).await),
            (handle, _, _) => handle?,
        };
        let (source, base) = match (handle, &params.checkpoint) {
            (handle, Some(wanted)) => {
                let of = handle.map(|handle| handle.view.borrow().record.id);
                let row = self.shared.checkpoint(&ctx.caller, wanted, of).await?;
                let Some(manifest) = &row.manifest else {
                    return Err(ToolError::internal(format!("checkpoint {} has no manifest", row.id)));
                };
                let base = manifest.spec.network.clone();
                let now = self.bound(&row).await?;
                let network = network(&ctx.caller, &base, &now, &params)?;
                checkpoint::same_card(manifest, network.mode)?;
                (Source::Checkpoint(Box::new(row)), network)
            }
            (Some(handle), None) => {
                let record = handle.view.borrow().record.clone();
                policy::checkpointable(&record)?;
                policy::checkpoint(record.name.as_str(), record.state)?;
                let now = &record.spec.network;
                let network = network(&ctx.caller, now, now, &params)?;
                let wanted = self.shared.wanted(&ctx.caller, Given::As("fork"), Some(KEPT))?;
                (Source::Vm(handle, Box::new(wanted)), network)
            }
            (None, None) => {
                return Err(ToolError::invalid("vm or checkpoint is required")
                    .hint("pass the VM to fork as it is now, or a checkpoint of checkpoint_list"));
            }
        };
        let about = match &source {
            Source::Checkpoint(row) => (row.id.to_string(), row.name.to_string()),
            Source::Vm(_, wanted) => (wanted.id.to_string(), wanted.name.to_string()),
        };
        let op = self.shared.begin_op("vm_fork", ctx, Some(about)).await?;
        let forking = Forking {
            op,
            owner: ctx.caller.owner.to_string(),
            children,
            tags: params.tags,
            expires_at: params.ttl.and_then(lifetime::end_of),
            network: base,
            charges: self.shared.tokens.charges(&ctx.caller.owner),
        };
        let shared = self.shared.clone();
        self.shared.ops.run(op, move |progress| async move {
            let row = match source {
                Source::Checkpoint(row) => *row,
                Source::Vm(handle, wanted) => {
                    let _busy = handle.activity.begin();
                    let row = Box::pin(checkpoint::take(&shared, &handle, *wanted, &progress)).await?;
                    if let Some(manifest) = &row.manifest {
                        checkpoint::same_card(manifest, forking.network.mode)?;
                    }
                    row
                }
            };
            let vms = Box::pin(checkpoint::fork(&shared, &row, forking, &progress)).await?;
            Ok(RestoreOutput { vms, from: row.id, at: row.created_at, before: None })
        });
        self.shared.ops.wait(ctx, op, wait).await
    }
}

impl Nexus {
    /// The error for a VM that does not exist, with how to fork the checkpoint of that name if there is one.
    async fn or_checkpoint(&self, caller: &Caller, vm: &Reference<VmKind>, error: ToolError) -> ToolError {
        let Ok(wanted) = vm.to_string().parse::<Reference<CheckpointKind>>() else { return error };
        match self.shared.checkpoint(caller, &wanted, None).await {
            Ok(row) => error.hint(format!("{wanted} is a checkpoint: {}", to_fork(row.id))),
            // Several have that name.
            Err(several) if several.code == ErrorCode::InvalidArgument => error.hint(format!(
                "{wanted} is the name of checkpoints: call checkpoint_list, then vm_fork with checkpoint: ID"
            )),
            Err(_) => error,
        }
    }

    /// What VMs forked from a checkpoint may reach without more rights: what its VM may reach now, or when it was deleted. The checkpoint may be of a
    /// time when that was more.
    async fn bound(&self, row: &CheckpointRecord) -> Result<NetworkPolicy, ToolError> {
        if let Ok(parent) = self.shared.vms.of_daemon(&Reference::Id(row.vm)) {
            return Ok(parent.view.borrow().record.spec.network.clone());
        }
        let id = row.id;
        let last = self.shared.store.read(move |db| checkpoints::last_network(db, id)).await;
        Ok(last.map_err(store_error)?.unwrap_or_default())
    }
}

/// The VMs to make.
fn children(count: Option<u32>, names: &[Name]) -> Result<Vec<Child>, ToolError> {
    let given = u32::try_from(names.len()).unwrap_or(u32::MAX);
    let count = count.unwrap_or(given.max(1));
    if !(1..=FORKS_MAX).contains(&count) {
        return Err(ToolError::invalid(format!("count must be 1 to {FORKS_MAX}, got {count}")));
    }
    if given != 0 && given != count {
        return Err(ToolError::invalid(format!("count is {count}, and there are {given} names"))
            .hint("leave count out, or give as many names"));
    }
    if names.iter().collect::<BTreeSet<_>>().len() != names.len() {
        return Err(ToolError::invalid("two of the names are the same"));
    }
    let mut names = names.iter().cloned();
    (0..count)
        .map(|_| {
            let id: VmId = random_id();
            let text = id.to_string();
            let made_up = || {
                let name = format!("fork-{}", &text[text.len() - 6..]);
                name.parse().map_err(|e| ToolError::internal(format!("{e}")))
            };
            Ok(Child { id, name: names.next().map_or_else(made_up, Ok)? })
        })
        .collect()
}

/// What the VMs may reach: as at the checkpoint, but for what the caller asks for. What that opens beside `now` needs a scope.
fn network(
    caller: &Caller,
    base: &NetworkPolicy,
    now: &NetworkPolicy,
    params: &VmForkParams,
) -> Result<NetworkPolicy, ToolError> {
    let after = match &params.network {
        Some(asked) => egress::merge(base, asked).map_err(ToolError::invalid)?,
        None => base.clone(),
    };
    let opened = openings(now, &after);
    if opened.is_empty() || caller.has(Scope::Network) {
        return Ok(after);
    }
    let message = format!("this token lacks the scope network, which a fork needs to {}", opened.join(", "));
    Err(ToolError::new(ErrorCode::Forbidden, message)
        .hint("leave that out of network, or ask for a token with the scope network"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_children_as_names_and_all_are_called_differently() {
        let names: Vec<Name> = ["a", "b"].map(|name| name.parse().unwrap()).into();
        assert_eq!(children(None, &[]).unwrap().len(), 1);
        let two = children(None, &names).unwrap();
        assert_eq!(two.iter().map(|child| child.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let many = children(Some(FORKS_MAX), &[]).unwrap();
        assert_eq!(many.iter().map(|child| &child.name).collect::<BTreeSet<_>>().len(), 16);
        let twice = vec![names[0].clone(), names[0].clone()];
        for (count, names) in [(Some(0), Vec::new()), (Some(17), Vec::new()), (Some(3), names), (None, twice)]
        {
            assert_eq!(children(count, &names).unwrap_err().code, ErrorCode::InvalidArgument, "{count:?}");
        }
    }
}
