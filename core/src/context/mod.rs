//! State that the modules of one daemon share: configuration, paths, store, drives, images and kernels, operations, and the VMs in
//! memory with the mailbox of each VM's task.
//!
//! It makes no decisions and no changes by itself: modules above it do.

mod activity;
mod audit_file;
mod calls;
mod command;
mod in_use;
mod published;
mod registry;
mod streams;
mod view;
mod warming;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nexus_schema::id::InstanceId;
use nexus_schema::{Arch, ErrorCode, Timestamp, ToolError};
use tokio::sync::{Notify, RwLock};
use tokio_util::task::TaskTracker;

pub(crate) use activity::Activity;
pub use activity::Busy;
pub(crate) use calls::{CallLog, record as record_calls};
pub(crate) use command::{Attach, Change, Command, CopyDrives, Decision, RestoreFrom, Take, Taken};
pub(crate) use in_use::{InUse, Turn, Used};
pub(crate) use published::{Published, socket_name};
pub(crate) use registry::{Handle, Registry, not_found};
pub(crate) use streams::{Place, Streams, TICKET_LIFE};
pub(crate) use view::View;
pub(crate) use warming::{Reserved, Waiting, Warming};

use crate::access::{Confirmations, Promised, Tokens};
use crate::asset::{KernelFiles, compose_initramfs};
use crate::config::{Config, DriverSetting};
use crate::drive::{DriveError, Drives, Locks};
use crate::egress::Egresses;
use crate::event::Events;
use crate::net::{Nat, NatError};
use crate::op::{Ops, described, store_error};
use crate::os::lock::Lock;
use crate::os::paths::Paths;
use crate::os::reserve::Reserve;
use crate::provision::Provision;
use crate::store::Store;
use crate::store::tokens::Usage;
use crate::store::vms::{VmRecord, VmSpec};
use crate::vmm::Accel;
use crate::vmm::doctor::{self, Choice, GUEST_FIX, Host};

/// What is counted since the daemon started.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Guests that became ready.
    pub(crate) boots: AtomicU64,
    /// Links to guests that were lost.
    pub(crate) link_losses: AtomicU64,
}

/// State that the modules of one daemon share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) store: Store,
    pub(crate) drives: Drives,
    pub(crate) drive_locks: Locks,
    pub(crate) provision: Provision,
    pub(crate) ops: Ops,
    pub(crate) vms: Registry,
    pub(crate) streams: Streams,
    /// The network policies and counters of VMs, by VM.
    pub(crate) egresses: Egresses,
    /// The network that VMs in mode `nat` share.
    pub(crate) nat: Arc<Nat>,
    pub(crate) tasks: TaskTracker,
    /// The guest ports that are published on the host.
    pub(crate) published: Published,
    /// What this host can run, once it was examined.
    pub(crate) host: RwLock<Option<Arc<Host>>>,
    pub(crate) calls: CallLog,
    /// What happened.
    pub(crate) events: Events,
    pub(crate) tally: Tally,
    /// Notified when the life or the idle time of a VM may end sooner than before.
    pub(crate) lifetimes: Arc<Notify>,
    /// The checkpoints and prepared machines that are being restored, packed or removed.
    pub(crate) checkpoints: InUse,
    /// Notified when checkpoints are to be looked at sooner: whether one is to be packed or removed.
    pub(crate) upkeep: Arc<Notify>,
    /// The machines that are being prepared for warm starts.
    pub(crate) warming: Warming,
    /// Access tokens.
    pub(crate) tokens: Tokens,
    /// Confirmations that are pending.
    pub(crate) confirmations: Confirmations,
    pub(crate) instance: InstanceId,
    pub(crate) started_at: Timestamp,
    /// The lock of the state directory, held as long as anything uses it.
    #[expect(dead_code, reason = "held, not used")]
    pub(crate) lock: Lock,
    /// Disk space that is released when the disk is full.
    pub(crate) reserve: Reserve,
}

impl Shared {
    /// Releases the reserved disk space if the disk is full, so that calls that free more space can work.
    pub(crate) async fn make_room(&self) {
        let reserve = self.reserve.clone();
        tokio::task::spawn_blocking(move || reserve.give_up_if_full()).await.ok();
    }

    /// Refuses what the quota of who it is for has no room for, before it is made. What counts is checked again in the transaction that records it.
    pub(crate) async fn check_disk_quota(&self, owner: &str, bytes: u64) -> Result<(), ToolError> {
        let (charges, more) = (self.tokens.charges(owner), Usage { disk: bytes, ..Usage::default() });
        let checked =
            self.store.read(move |db| charges.iter().try_for_each(|charge| charge.check(db, more, None)));
        checked.await.map_err(store_error)
    }

    /// Promises disk space to who it is for, before what takes it is written. It counts for the quotas until the promise is dropped; by then there must be
    /// a row that counts.
    ///
    /// # Errors
    /// `quota_exceeded` if the quota has no room for so many bytes.
    pub(crate) async fn promise_disk(&self, owner: &str, bytes: u64) -> Result<Promised, ToolError> {
        let (tokens, owner) = (self.tokens.clone(), owner.to_owned());
        self.store.write(move |tx| tokens.promise(tx, &owner, bytes)).await.map_err(store_error)
    }

    /// Returns the timeout until a guest is ready.
    pub(crate) fn boot_timeout(&self, accel: Accel) -> Duration {
        let seconds = match accel {
            Accel::Kvm => self.config.boot_timeout_s,
            Accel::Tcg => self.config.boot_timeout_tcg_s,
        };
        Duration::from_secs(seconds.into())
    }

    /// Returns what this host can run. The host is examined at first use, and again if `again` is set.
    pub(crate) async fn host(&self, again: bool) -> Result<Arc<Host>, ToolError> {
        if !again && let Some(host) = self.host.read().await.as_ref() {
            return Ok(host.clone());
        }
        let config = self.config.clone();
        let host = tokio::task::spawn_blocking(move || doctor::examine(&config))
            .await
            .map_err(|e| ToolError::internal(format!("examine the host: {e}")))?;
        let host = Arc::new(host);
        *self.host.write().await = Some(host.clone());
        Ok(host)
    }

    /// Returns the VMM for a VM of the host's architecture.
    pub(crate) async fn choose_driver(&self, spec: &VmSpec) -> Result<Choice, ToolError> {
        self.choose_driver_for(spec, Arch::HOST).await
    }

    /// Returns the VMM for this VM.
    pub(crate) async fn choose_driver_of(&self, record: &VmRecord) -> Result<Choice, ToolError> {
        self.choose_driver_for(&record.spec, Arch::known(&record.arch)?).await
    }

    /// Returns the VMM for a VM of an architecture.
    pub(crate) async fn choose_driver_for(&self, spec: &VmSpec, arch: Arch) -> Result<Choice, ToolError> {
        let choose = |host: &doctor::Host| match spec.checkpoints {
            _ if !arch.is_host() => host.choose_foreign(spec.driver, spec.checkpoints),
            false => host.choose(spec.driver),
            true => host.choose_for_checkpoints(spec.driver),
        };
        if let Ok(choice) = choose(&*self.host(false).await?) {
            return Ok(choice);
        }
        // A VMM may have been installed since.
        choose(&*self.host(true).await?)
    }

    /// Returns whether VMs boot a kernel here; with the `process` driver they do not.
    pub(crate) fn needs_kernel(&self) -> bool {
        !matches!(self.config.driver, DriverSetting::Process { .. })
    }

    /// Returns the kernel files of a VM.
    pub(crate) async fn kernel_files(&self, record: &VmRecord) -> Result<Option<KernelFiles>, ToolError> {
        match record.kernel_id {
            Some(id) => self.provision.kernel_files(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// Returns the initramfs for a kernel, and composes it if it is not in the cache.
    pub(crate) async fn initramfs(&self, kernel: Option<&KernelFiles>) -> Result<PathBuf, ToolError> {
        let Some(kernel) = kernel else { return Ok(PathBuf::new()) };
        let agent = self.config.agent_for(kernel.arch).ok_or_else(|| {
            let what = format!("there is no guest binary for VMs of {}", kernel.arch);
            ToolError::new(ErrorCode::HostUnsuitable, what).hint(GUEST_FIX)
        })?;
        let (cache, modules) = (self.paths.cache(), kernel.modules.clone());
        tokio::task::spawn_blocking(move || {
            compose_initramfs(&cache, agent, &modules).map_err(crate::provision::asset_error)
        })
        .await
        .map_err(|e| ToolError::internal(format!("compose the initramfs: {e}")))?
    }
}

/// Converts a failure of the shared network into an error for callers.
pub(crate) fn network_error(error: NatError) -> ToolError {
    let code = if error.is_of_host() { ErrorCode::HostUnsuitable } else { ErrorCode::Internal };
    let hint = error.hint();
    described(code, &error, hint)
}

/// Converts a failure of the drives into an error for callers.
pub(crate) fn drive_error(error: DriveError) -> ToolError {
    described(error.code(), &error, error.hint())
}
