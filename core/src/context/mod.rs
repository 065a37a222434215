//! What the rooms of one daemon share: its configuration, paths, store, drives, what VMs are made of, operations, and the VMs in
//! memory with the mailbox of each one's task.
//!
//! It decides nothing and changes nothing by itself: rooms above it do.

mod audit_file;
mod calls;
mod command;
mod published;
mod registry;
mod streams;
mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::InstanceId;
use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{ErrorCode, Timestamp, ToolError};
use tokio::sync::RwLock;
use tokio_util::task::TaskTracker;

pub(crate) use calls::{CallLog, record as record_calls};
pub(crate) use command::{Attach, Change, Command, Decision};
pub(crate) use published::{Published, socket_name};
pub(crate) use registry::{Handle, Registry, not_found};
pub(crate) use streams::{Place, Streams, TICKET_LIFE};
pub(crate) use view::View;

use crate::access::{Confirmations, Tokens};
use crate::asset::{KernelFiles, compose_initramfs};
use crate::config::{Config, DriverSetting};
use crate::drive::{DriveError, Drives, Locks};
use crate::egress::Egresses;
use crate::net::{Nat, NatError};
use crate::op::{Ops, described};
use crate::os::lock::Lock;
use crate::os::paths::Paths;
use crate::os::reserve::Reserve;
use crate::provision::Provision;
use crate::store::Store;
use crate::store::vms::VmRecord;
use crate::vmm::Accel;
use crate::vmm::doctor::{self, Choice, Host};

/// What the rooms of one daemon share.
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
    /// The networks of VMs.
    pub(crate) egresses: Egresses,
    /// The network that VMs in mode `nat` share.
    pub(crate) nat: Arc<Nat>,
    pub(crate) tasks: TaskTracker,
    /// The ports of guests that are published on the host.
    pub(crate) published: Published,
    /// What this host can run, once it was looked at.
    pub(crate) host: RwLock<Option<Arc<Host>>>,
    pub(crate) calls: CallLog,
    /// Access tokens.
    pub(crate) tokens: Tokens,
    /// Confirmations that are pending.
    pub(crate) confirmations: Confirmations,
    pub(crate) instance: InstanceId,
    pub(crate) started_at: Timestamp,
    /// The lock of the state directory, held as long as anything uses it.
    #[expect(dead_code, reason = "held, not used")]
    pub(crate) lock: Lock,
    /// Room that is given up on a full disk.
    pub(crate) reserve: Reserve,
}

impl Shared {
    /// Makes a little room on a full disk, for what frees more.
    pub(crate) async fn make_room(&self) {
        let reserve = self.reserve.clone();
        tokio::task::spawn_blocking(move || reserve.give_up_if_full()).await.ok();
    }

    /// How long a guest may take to be ready.
    pub(crate) fn boot_timeout(&self, accel: Accel) -> Duration {
        let seconds = match accel {
            Accel::Kvm => self.config.boot_timeout_s,
            Accel::Tcg => self.config.boot_timeout_tcg_s,
        };
        Duration::from_secs(seconds.into())
    }

    /// What this host can run; looked at once, and again when asked for.
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

    /// The VMM that runs a VM which asks for `driver`.
    pub(crate) async fn choose_driver(&self, driver: DriverChoice) -> Result<Choice, ToolError> {
        if let Ok(choice) = self.host(false).await?.choose(driver) {
            return Ok(choice);
        }
        // Something may have been installed since.
        self.host(true).await?.choose(driver)
    }

    /// Whether VMs boot a kernel here; the `process` driver does not.
    pub(crate) fn needs_kernel(&self) -> bool {
        !matches!(self.config.driver, DriverSetting::Process { .. })
    }

    /// The kernel of a VM.
    pub(crate) async fn kernel_files(&self, record: &VmRecord) -> Result<Option<KernelFiles>, ToolError> {
        match record.kernel_id {
            Some(id) => self.provision.kernel_files(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// The initramfs for a kernel, composed if it is not in the cache.
    pub(crate) async fn initramfs(&self, kernel: Option<&KernelFiles>) -> Result<PathBuf, ToolError> {
        let Some(kernel) = kernel else { return Ok(PathBuf::new()) };
        let (cache, agent, modules) = (self.paths.cache(), self.config.agent, kernel.modules.clone());
        tokio::task::spawn_blocking(move || {
            compose_initramfs(&cache, agent, &modules).map_err(crate::provision::asset_error)
        })
        .await
        .map_err(|e| ToolError::internal(format!("compose the initramfs: {e}")))?
    }
}

/// A failure of the shared network as callers see it.
pub(crate) fn network_error(error: NatError) -> ToolError {
    let code = if error.is_of_host() { ErrorCode::HostUnsuitable } else { ErrorCode::Internal };
    let hint = error.hint();
    described(code, &error, hint)
}

/// A failure of the drives as callers see it.
pub(crate) fn drive_error(error: DriveError) -> ToolError {
    described(error.code(), &error, error.hint())
}
