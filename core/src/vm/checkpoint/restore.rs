//! What rollbacks and forks have in common: what became of a VM that goes on from a checkpoint.

use std::path::PathBuf;
use std::time::Instant;

use nexus_schema::id::BootId;
use nexus_schema::link::ResumeKind;
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::checkpoint::{RestoreContract, RestoredVm};
use nexus_schema::{ErrorCode, ToolError};

use crate::context::{Handle, Shared, Used};
use crate::os::paths::checkpoint_files;
use crate::store::checkpoints::{CheckpointDrive, CheckpointRecord, Manifest};
use crate::store::vms::GuestRecord;

/// Begins to use a checkpoint, which is not removed meanwhile. Its memory may be packed.
pub(super) async fn begin_use(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<Used, ToolError> {
    shared.checkpoints.read(checkpoint.id).await.ok_or_else(|| {
        let message = format!("checkpoint {} is being removed", checkpoint.name);
        ToolError::new(ErrorCode::CheckpointNotFound, message).hint("use another one of checkpoint_list")
    })
}

/// Refuses a network mode that needs a network card where the saved machine has none, or the other way round.
pub(crate) fn same_card(manifest: &Manifest, mode: NetworkMode) -> Result<(), ToolError> {
    let message = match (manifest.interface, mode == NetworkMode::Nat) {
        (true, true) | (false, false) => return Ok(()),
        (true, false) => "the saved machine has a network card, which only network nat has",
        (false, true) => "the saved machine has no network card, which network nat needs",
    };
    Err(ToolError::invalid(message)
        .hint("use the network mode that the VM had when the checkpoint was taken"))
}

/// The copy of a drive in a checkpoint's directory.
pub(super) fn file_of(directory: &std::path::Path, copy: &CheckpointDrive) -> PathBuf {
    directory.join(checkpoint_files::DRIVES).join(format!("{}.ext4", copy.drive))
}

/// A guest that did not prove what it renewed has failed, with the reason of its VM.
pub(super) fn error_of_restore(error: ToolError, hint: &str) -> ToolError {
    match error.code {
        ErrorCode::BootFailed | ErrorCode::VmGone => {
            ToolError::new(error.code, format!("the restored guest did not go on: {}", error.message))
                .hint(format!("check vm_logs; {hint}"))
        }
        _ => error,
    }
}

/// What became of a VM that is ready after its restore.
pub(super) fn restored(
    handle: &Handle,
    boot: BootId,
    kind: ResumeKind,
    quiesced: bool,
    begun: Instant,
) -> Result<RestoredVm, ToolError> {
    let view = handle.view.borrow();
    let record = &view.record;
    if record.boot_id != Some(boot) {
        return Err(ToolError::new(
            ErrorCode::Changed,
            format!("{} was started anew meanwhile", record.name),
        ));
    }
    Ok(RestoredVm {
        id: record.id,
        name: record.name.clone(),
        boot_id: boot,
        contract: contract(kind, quiesced, record.guest.as_ref()),
        ready_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// What a restore kept, renewed, closed, and cannot renew.
fn contract(kind: ResumeKind, quiesced: bool, guest: Option<&GuestRecord>) -> RestoreContract {
    let resumed = guest.and_then(|guest| guest.resumed.clone()).unwrap_or_default();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut not_renewed = words(&["random state that programs keep in their memory"]);
    if kind == ResumeKind::Fork {
        not_renewed.push("keys and tokens that programs keep in their memory or in files".into());
    }
    not_renewed.extend(resumed.not_renewed);
    RestoreContract {
        kept: words(&["memory", "processes", "disk, with what was not synced"]),
        renewed: resumed.renewed,
        closed: words(&["connections into the VM and out of it"]),
        not_renewed,
        quiesced,
        clock_behind_ms: resumed.clock_behind_ms,
    }
}

#[cfg(test)]
mod tests {
    use nexus_schema::link::Resumed;

    use super::*;

    #[test]
    fn the_contract_says_what_the_guest_renewed_and_what_nobody_can() {
        let resumed = Resumed {
            renewed: vec!["clock".into()],
            not_renewed: vec!["SSH host keys: no ssh-keygen".into()],
            clock_behind_ms: 14_000,
            ..Resumed::default()
        };
        let mut guest: GuestRecord = serde_json::from_value(serde_json::json!({
            "hello": { "protocol": 1, "min_protocol": 1, "build": "", "kernel": "", "arch": "", "kernel_boot_id": "", "uptime_ms": 1,
                "init": "agent" },
            "protocol": 1,
        }))
        .unwrap();
        guest.resumed = Some(resumed);
        let fork = contract(ResumeKind::Fork, true, Some(&guest));
        assert_eq!(
            (fork.renewed, fork.clock_behind_ms, fork.quiesced),
            (vec!["clock".to_owned()], 14_000, true)
        );
        assert_eq!((fork.not_renewed.len(), fork.kept.len()), (3, 3));
        assert_eq!(fork.not_renewed[2], "SSH host keys: no ssh-keygen");
        assert_eq!(contract(ResumeKind::Rollback, false, None).not_renewed.len(), 1);
    }
}
