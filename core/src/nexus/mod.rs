//! The facade: what the host's tools can do, a method per tool. Tools see nothing else of this crate.

mod asset;
mod build;
mod calls;
mod drive;
mod finished;
mod plan;
mod provider;
mod settings;
mod space;
mod stock;
mod system;
mod template;
mod vm;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{BootId, InstanceId, OpId, VmId, VmKind};
use nexus_schema::limits::{PAGE_DEFAULT, PAGE_MAX, WAIT_DEFAULT, WAIT_MAX};
use nexus_schema::tools::op::OpProgress;
use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{ErrorCode, Name, Reference, Timestamp, ToolError};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

pub(crate) use drive::drive_error;

use crate::asset::{KernelFiles, compose_initramfs};
use crate::config::{Config, DriverSetting};
use crate::drive::{Drives, Locks};
use crate::guest::Link;
use crate::image::oci::Keychain;
use crate::op::{Ops, store_error, summary};
use crate::os::leftover;
use crate::os::lock::{self, Lock};
use crate::os::paths::Paths;
use crate::stock::Stock;
use crate::store::vms::VmRecord;
use crate::store::{Store, StoreError, now, ops};
use crate::vm::actor::Command;
use crate::vm::recover;
use crate::vm::registry::Registry;
use crate::vmm::Accel;
use crate::vmm::doctor::{self, Choice, Host};

pub use crate::store::calls::CallRecord;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// `uid:N` of the peer, or the name of the token.
    pub owner: Arc<str>,
    /// The one VM that this caller may see, on a scoped endpoint.
    pub scope: Option<VmId>,
}

/// One call: who calls, and where its progress goes.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// Who calls.
    pub caller: Caller,
    /// Where the progress of what the call waits for is shown.
    pub progress: watch::Sender<OpProgress>,
}

/// A way into a running guest.
#[derive(Debug, Clone)]
pub struct GuestHandle {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: Name,
    /// The boot that answers.
    pub boot_id: BootId,
    /// The link to its agent.
    pub link: Link,
}

/// Why a state directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon has it.
    #[error("the state directory {} is in use by {}", .directory.display(), holder(.pid))]
    Locked {
        /// The state directory.
        directory: PathBuf,
        /// The process that has it, as far as it wrote that down.
        pid: Option<u32>,
    },
    /// A directory or file cannot be made or read.
    #[error("{source}")]
    Io {
        /// Why.
        #[from]
        source: std::io::Error,
    },
    /// The database cannot be used.
    #[error("{source}")]
    Store {
        /// Why.
        #[from]
        source: StoreError,
    },
    /// The drives' directory cannot be used.
    #[error("prepare the drives' directory: {source}")]
    Drives {
        /// Why.
        #[from]
        source: crate::drive::DriveError,
    },
    /// What an earlier daemon left cannot be brought in order.
    #[error("take up what an earlier daemon left: {error}")]
    Recover {
        /// Why.
        error: ToolError,
    },
}

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("another nexusd (process {pid})"),
        None => "another nexusd".into(),
    }
}

/// What the rooms of this crate share in one daemon.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) store: Store,
    pub(crate) drives: Drives,
    pub(crate) drive_locks: Locks,
    pub(crate) stock: Stock,
    pub(crate) ops: Ops,
    pub(crate) vms: Registry,
    pub(crate) tasks: TaskTracker,
    host: tokio::sync::RwLock<Option<Arc<Host>>>,
    calls: calls::CallLog,
    instance: InstanceId,
    started_at: Timestamp,
    _lock: Lock,
}

/// One Nexus: a state directory and all that runs under it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nexus {
    shared: Arc<Shared>,
}

impl Nexus {
    /// Opens a state directory: takes its lock, opens its database, takes up what runs and undoes what is half made.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let paths = Paths::new(&config.state_dir);
        for directory in [
            paths.root().to_owned(),
            paths.vms(),
            paths.drives(),
            paths.images(),
            paths.assets(),
            paths.builds(),
            paths.cache(),
            paths.downloads(),
            paths.scratch(),
        ] {
            make_private(&directory)?;
        }
        let Some(lock) = lock::take_in_time(&paths.lock()).await? else {
            let pid = lock::holder(&paths.lock());
            return Err(OpenError::Locked { directory: config.state_dir, pid });
        };
        if let Some(before) = lock.before() {
            match tokio::task::spawn_blocking(move || leftover::end_of(before)).await {
                Ok(Ok(0)) => {}
                Ok(Ok(ended)) => tracing::info!(ended, "ended programs that an earlier daemon left"),
                Ok(Err(error)) => tracing::warn!(%error, "cannot end what an earlier daemon left"),
                Err(error) => tracing::warn!(%error, "cannot look for what an earlier daemon left"),
            }
        }
        let database = paths.database();
        let store = tokio::task::spawn_blocking(move || Store::open(&database))
            .await
            .map_err(|_| StoreError::Closed)??;
        let instance = store.instance().await?;
        let drives = Drives::probe(&paths.drives())?;
        let (calls, queue) = calls::CallLog::new();
        let shared = Arc::new(Shared {
            stock: Stock::new(
                store.clone(),
                paths.clone(),
                config.apt_root.clone(),
                config.assets.clone(),
                Keychain::new(config.docker_config.clone(), config.docker_environment.clone()),
            ),
            ops: Ops::new(store.clone()),
            vms: Registry::default(),
            tasks: TaskTracker::new(),
            host: tokio::sync::RwLock::new(None),
            calls,
            instance,
            started_at: now(),
            config,
            paths,
            store,
            drives,
            drive_locks: Locks::default(),
            _lock: lock,
        });
        shared.tasks.spawn(calls::record(shared.store.clone(), queue));
        shared.stock.sync_providers().await?;
        recover::recover(&shared).await.map_err(|error| OpenError::Recover { error })?;
        Ok(Self { shared })
    }

    /// Ends the tasks of this daemon; VMs keep running. At most a few seconds.
    pub async fn shutdown(&self) {
        for handle in self.shared.vms.all() {
            handle.commands.send(Command::Detach).await.ok();
        }
        self.shared.ops.drain(Duration::from_secs(2)).await;
    }

    /// The id of the VM that a reference means; in memory.
    pub fn resolve_vm(&self, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        self.shared.vms.resolve(vm)
    }

    /// The way into a VM's guest, if its tools may be called now; in memory.
    pub fn guest(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError> {
        let handle = self.shared.vms.get(vm)?;
        let view = handle.view.borrow();
        let record = &view.record;
        if caller.scope.is_some_and(|scope| scope != record.id) {
            return Err(ToolError::new(
                ErrorCode::Forbidden,
                format!("this endpoint is not for the VM {vm}"),
            ));
        }
        let link = view.guest_link()?.clone();
        let boot_id =
            record.boot_id.ok_or_else(|| ToolError::internal(format!("{} has no boot", record.name)))?;
        Ok(GuestHandle { vm: record.id, name: record.name.clone(), boot_id, link })
    }

    /// Notes that a call was made; never waits.
    pub fn record_call(&self, call: CallRecord) {
        self.shared.calls.add(call);
    }
}

impl Shared {
    /// Writes down that an operation is under way; `subject`: the id and name of what it is about.
    async fn begin_op(
        &self,
        tool: &str,
        ctx: &CallContext,
        subject: Option<(String, String)>,
    ) -> Result<OpId, ToolError> {
        let op = summary(tool, &ctx.caller.owner, subject);
        let id = op.op_id;
        self.store.write(move |tx| ops::insert(tx, &op)).await.map_err(store_error)?;
        Ok(id)
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
            Some(id) => self.stock.kernel_files(id).await.map(Some),
            None => Ok(None),
        }
    }

    /// The initramfs for a kernel, composed if it is not in the cache.
    pub(crate) async fn initramfs(&self, kernel: Option<&KernelFiles>) -> Result<PathBuf, ToolError> {
        let Some(kernel) = kernel else { return Ok(PathBuf::new()) };
        let (cache, agent, modules) = (self.paths.cache(), self.config.agent, kernel.modules.clone());
        tokio::task::spawn_blocking(move || {
            compose_initramfs(&cache, agent, &modules).map_err(crate::stock::asset_error)
        })
        .await
        .map_err(|e| ToolError::internal(format!("compose the initramfs: {e}")))?
    }
}

/// Makes a directory that only this user can look into.
fn make_private(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|e| {
        std::io::Error::new(e.kind(), format!("make the directory {}: {e}", directory.display()))
    })
}

/// Removes a directory with all that is in it; what is left is removed at the next start.
pub(crate) async fn remove_tree(directory: &Path) {
    match fs_err::tokio::remove_dir_all(directory).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "a directory is left for the next start");
        }
        _ => {}
    }
}

/// Removes a file, or a directory with all that is in it.
async fn remove_path(path: &Path) {
    let is_directory = fs_err::tokio::symlink_metadata(path).await.is_ok_and(|meta| meta.is_dir());
    if is_directory {
        return remove_tree(path).await;
    }
    match fs_err::tokio::remove_file(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "a file is left for the next time");
        }
        _ => {}
    }
}

/// An error with all of its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// A failure of a room as callers see it.
pub(crate) fn described(code: ErrorCode, error: &dyn std::error::Error, hint: Option<String>) -> ToolError {
    let error = ToolError::new(code, chain(error));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// How long a call that was told so waits.
fn patience(wait_s: Option<u32>) -> Result<Duration, ToolError> {
    let wait = wait_s.map_or(WAIT_DEFAULT, |s| Duration::from_secs(s.into()));
    if wait > WAIT_MAX {
        return Err(ToolError::invalid(format!(
            "wait_s is {}, more than {}",
            wait.as_secs(),
            WAIT_MAX.as_secs()
        ))
        .hint("ask again with op_get while the work is not done"));
    }
    Ok(wait)
}

/// How many rows a page has.
fn page(limit: Option<u32>) -> Result<u32, ToolError> {
    let limit = limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ToolError::invalid(format!("limit is {limit}, not 1 to {PAGE_MAX}")));
    }
    Ok(limit)
}

/// Cuts what was read, one row more than a page has, to the page; with the cursor of the next one, if there is one.
fn cut_page<R>(mut rows: Vec<R>, limit: u32, cursor: impl FnOnce(&R) -> String) -> (Vec<R>, Option<String>) {
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let next = rows.last().filter(|_| more).map(cursor);
    (rows, next)
}

/// A cursor that is a number.
fn number_cursor(cursor: Option<&str>) -> Result<Option<i64>, ToolError> {
    cursor
        .map(|text| text.parse().map_err(|_| ToolError::invalid("cursor is not one that a page before gave")))
        .transpose()
}
