//! What others ask of the task that owns a VM.

use std::collections::BTreeMap;
use std::sync::Arc;

use nexus_schema::id::{BootId, DriveId};
use nexus_schema::tools::vm::{DeletedVm, NetworkParams};
use nexus_schema::{ByteSize, Name, TimeSpan, ToolError};
use tokio::sync::oneshot;

use crate::progress::Progress;
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;
use crate::vmm::ShimClient;

/// What others ask of a VM's task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Start it; the reply names the boot that is under way.
    Start { who: String, progress: Progress, reply: oneshot::Sender<Result<BootId, ToolError>> },
    /// Begin to stop it; the reply says whether there is anything to stop.
    Stop {
        who: String,
        force: bool,
        if_boot: Option<BootId>,
        reply: oneshot::Sender<Result<Decision, ToolError>>,
    },
    /// Delete it; `why` for its history.
    Delete {
        who: String,
        force: bool,
        if_boot: Option<BootId>,
        why: &'static str,
        reply: oneshot::Sender<Result<DeletedVm, ToolError>>,
    },
    /// End it if its life is over: delete it, or stop it if it is protected.
    Expire { reply: oneshot::Sender<Result<(), ToolError>> },
    /// Stop it if it has been idle for as long as it may be.
    StopIdle { reply: oneshot::Sender<Result<(), ToolError>> },
    /// Change its labels, protection or name.
    Update { who: String, change: Box<Change>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Its drives are made: creating -> created.
    Created { record: Box<VmRecord>, drives: Vec<DriveRecord>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Its creation failed: leave nothing of it but its history.
    Undo { reason: String, drives: Vec<DriveId>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Give it a drive.
    Attach { attach: Box<Attach>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// Take a drive from it.
    Take { drive: DriveId, if_boot: Option<BootId>, reply: oneshot::Sender<Result<(), ToolError>> },
    /// A drive of it is larger now.
    Resized { drive: DriveId, size: ByteSize, reply: oneshot::Sender<Result<(), ToolError>> },
    /// What runs it, if it runs.
    Machine { reply: oneshot::Sender<Result<Option<Arc<ShimClient>>, ToolError>> },
    /// End the task; what runs goes on running.
    Detach,
}

/// A change that `vm_update` asks for.
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
    /// Only if this is its boot.
    pub(crate) if_boot: Option<BootId>,
}

/// How a drive is to be given to a VM.
#[derive(Debug)]
pub(crate) struct Attach {
    pub(crate) drive: DriveRecord,
    /// Whether the VM starts from it.
    pub(crate) root: bool,
    /// Where the guest mounts it.
    pub(crate) mount: Option<String>,
    /// Only if this is the VM's boot.
    pub(crate) if_boot: Option<BootId>,
}

/// What to do about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Do it.
    Go,
    /// It is so already, or under way.
    Already,
}
