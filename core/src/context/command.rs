//! Commands to the task that owns a VM.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nexus_schema::id::{BootId, CheckpointId, DriveId};
use nexus_schema::link::{GuestProcess, ResumeKind};
use nexus_schema::tools::vm::{DeletedVm, IdleAction, NetworkParams};
use nexus_schema::{ByteSize, Name, TimeSpan, ToolError};
use tokio::sync::oneshot;

use crate::progress::Progress;
use crate::store::checkpoints::Manifest;
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;
use crate::vmm::{Saved, ShimClient};

/// A command to a VM's task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Start the VM. The reply has the id of the boot that was started or is running.
    Start {
        who: String,
        if_boot: Option<BootId>,
        progress: Progress,
        reply: oneshot::Sender<Result<BootId, ToolError>>,
    },
    /// Begin to stop the VM. The reply says whether there is anything to stop.
    Stop {
        who: String,
        force: bool,
        if_boot: Option<BootId>,
        reply: oneshot::Sender<Result<Decision, ToolError>>,
    },
    /// Pause the VM.
    Pause { who: String, if_boot: Option<BootId>, reply: oneshot::Sender<Result<Decision, ToolError>> },
    /// Resume the VM.
    Resume { who: String, if_boot: Option<BootId>, reply: oneshot::Sender<Result<Decision, ToolError>> },
    /// Save the VM's memory to the disk, and end its VMM; the VM is suspended once that has ended.
    Suspend { who: String, if_boot: Option<BootId>, reply: oneshot::Sender<Result<Decision, ToolError>> },
    /// Wake the VM for a call, if it is suspended. The reply has the id of the boot that was begun or is running. `why` is for its history. A wake that
    /// failed since `asked` is the answer to this one, too.
    Wake { who: String, why: String, asked: Instant, reply: oneshot::Sender<Result<BootId, ToolError>> },
    /// Delete the VM. `why` is for its history.
    Delete {
        who: String,
        force: bool,
        if_boot: Option<BootId>,
        why: &'static str,
        reply: oneshot::Sender<Result<DeletedVm, ToolError>>,
    },
    /// Delete the VM if its time to live is over, or stop it if it is protected.
    Expire { reply: oneshot::Sender<Result<(), ToolError>> },
    /// Stop or suspend the VM if it has been idle for its limit.
    StopIdle { reply: oneshot::Sender<Result<(), ToolError>> },
    /// Read the names of the preset `packages` again, if the VM has it, and apply them.
    Packages { reply: oneshot::Sender<Result<(), ToolError>> },
    /// Change the VM's tags, protection, name, lifetime or network.
    Update { who: String, change: Box<Change>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// The VM's drives are created: creating -> created.
    Created { record: Box<VmRecord>, drives: Vec<DriveRecord>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// The VM's creation, or its fork, failed: end what runs of it, and remove everything but its history. `drives` are those that are being made.
    Undo { reason: String, drives: Vec<DriveId>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Attach a drive.
    Attach { attach: Box<Attach>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Detach a drive.
    Take { drive: DriveId, if_boot: Option<BootId>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// A drive of the VM has grown.
    Resized { drive: DriveId, size: ByteSize, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Save the VM's memory and copy its drives.
    Checkpoint { take: Box<Take>, reply: oneshot::Sender<Result<Box<Taken>, ToolError>> },
    /// Copy drives of the VM as they are at one moment.
    CopyDrives { copy: Box<CopyDrives>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Record that the VM goes on from a checkpoint of it.
    Checkpointed { checkpoint: CheckpointId, reply: oneshot::Sender<Result<(), ToolError>> },
    /// End what runs of the VM, and restore it from a checkpoint. The reply has the id of the new boot.
    Restore { restore: Box<RestoreFrom>, reply: oneshot::Sender<Result<BootId, ToolError>> },
    /// Return the client of the VM's shim, if the VM runs. Fails if a process runs on its disk that the VM's task does not know.
    Machine { reply: oneshot::Sender<Result<Option<Arc<ShimClient>>, ToolError>> },
    /// End the task; a running VM keeps running.
    Detach,
}

/// A change requested by `vm_update`.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) remove_tags: Vec<String>,
    pub(crate) protected: Option<bool>,
    pub(crate) name: Option<Name>,
    pub(crate) network: Option<NetworkParams>,
    /// How long it lives from now on; zero for ever.
    pub(crate) ttl: Option<TimeSpan>,
    /// How long it may be idle; zero for ever.
    pub(crate) idle_stop: Option<TimeSpan>,
    /// Whether it is stopped or suspended then.
    pub(crate) idle_action: Option<IdleAction>,
    /// Only if this is its boot.
    pub(crate) if_boot: Option<BootId>,
}

/// How to attach a drive to a VM.
#[derive(Debug)]
pub(crate) struct Attach {
    pub(crate) drive: DriveRecord,
    /// Whether it becomes the VM's root drive.
    pub(crate) root: bool,
    /// Path at which the guest mounts it.
    pub(crate) mount: Option<String>,
    /// Only if this is the VM's boot.
    pub(crate) if_boot: Option<BootId>,
}

/// What of a checkpoint the VM's task does.
#[derive(Debug)]
pub(crate) struct Take {
    /// The directory of the checkpoint, with one for the copies of drives in it.
    pub(crate) directory: PathBuf,
    /// Only if this is the VM's boot.
    pub(crate) if_boot: Option<BootId>,
    /// For its cancellation.
    pub(crate) progress: Progress,
}

/// Copies of drives of a VM as they are at one moment.
#[derive(Debug)]
pub(crate) struct CopyDrives {
    /// Drives that the VM has, with the file that each copy becomes. None of the files exists yet.
    pub(crate) drives: Vec<(DriveId, PathBuf)>,
    /// For its steps and its cancellation.
    pub(crate) progress: Progress,
}

/// A VM whose memory was saved. Its files are not synced yet.
#[derive(Debug)]
pub(crate) struct Taken {
    /// What the VMM saved.
    pub(crate) saved: Saved,
    /// The VM as it was.
    pub(crate) record: VmRecord,
    /// Its drives, in the order of their copies.
    pub(crate) drives: Vec<DriveRecord>,
    /// Whether the machine has a network card.
    pub(crate) interface: bool,
    /// Whether commands stood still and filesystems were synced.
    pub(crate) quiesced: bool,
    /// The processes that stood still, as far as the guest listed them.
    pub(crate) processes: Vec<GuestProcess>,
    /// How long the guest stood still, in milliseconds.
    pub(crate) pause_ms: u64,
}

/// A checkpoint to restore a VM from. Its files were checked.
#[derive(Debug)]
pub(crate) struct RestoreFrom {
    /// Who asked.
    pub(crate) who: String,
    /// Why.
    pub(crate) kind: ResumeKind,
    /// The checkpoint's directory.
    pub(crate) directory: PathBuf,
    /// What a restore needs to know.
    pub(crate) manifest: Manifest,
    /// The token of the boot that was saved.
    pub(crate) token: String,
    /// The VM's drives that become as they were, with their copies and sizes; none of a fork, whose drives are made already.
    pub(crate) drives: Vec<(DriveId, PathBuf, ByteSize)>,
    /// Only if this is the VM's boot.
    pub(crate) if_boot: Option<BootId>,
    /// Its progress.
    pub(crate) progress: Progress,
}

/// Decision about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Do it.
    Go,
    /// Nothing to do: it is done already, or in progress.
    Already,
}
