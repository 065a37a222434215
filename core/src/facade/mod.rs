//! The facade: what the host's tools can do, a method per tool. Tools see nothing else of this crate.

mod asset;
mod audit;
mod build;
mod drive;
mod image;
mod network;
mod op;
mod plan;
mod provider;
mod publish;
mod resume;
mod settings;
mod space;
mod stream;
mod system;
mod template;
mod tidy;
mod token;
mod tree;
mod vm;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{BootId, OpId, VmId, VmKind};
use nexus_schema::limits::{PAGE_DEFAULT, PAGE_MAX, WAIT_DEFAULT, WAIT_MAX};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};
use tokio_util::task::TaskTracker;

use crate::access::{Caller, Confirmations, Tokens};
use crate::config::Config;
use crate::context::{CallLog, Published, Shared, record_calls};
use crate::context::{Command, Registry, Streams};
use crate::drive::{Drives, Locks};
use crate::egress::Egresses;
use crate::guest::Link;
use crate::image::oci::Keychain;
use crate::net::Nat;
pub use crate::op::CallContext;
use crate::op::{Ops, store_error, summary};
use crate::os::leftover;
use crate::os::lock::{self};
use crate::os::paths::Paths;
use crate::os::reserve::Reserve;
use crate::provision::Provision;
use crate::store::{Store, StoreError, now, ops, tokens};
use crate::vm::recover;

pub use self::stream::{StreamLife, StreamRefusal, VmStream};
pub use crate::store::calls::CallRecord;

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
            paths.sockets(),
            paths.network(),
        ] {
            make_private(&directory)?;
        }
        let reserve = Reserve::new(paths.reserve());
        reserve.give_up_if_full();
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
        let tokens = Tokens::default();
        tokens.load(store.read(tokens::all).await?);
        let instance = store.instance().await?;
        let drives = Drives::probe(&paths.drives())?;
        let (calls, queue) = CallLog::new();
        let (nat, refusals) = Nat::new(config.nexus_net.clone(), paths.network());
        let ops = Ops::new(store.clone());
        let shared = Arc::new(Shared {
            provision: Provision::new(
                store.clone(),
                ops.clone(),
                paths.clone(),
                config.apt_root.clone(),
                config.assets.clone(),
                Keychain::new(config.docker_config.clone(), config.docker_environment.clone()),
            ),
            ops,
            vms: Registry::default(),
            streams: Streams::default(),
            egresses: Egresses::new(paths.network()),
            nat,
            tasks: TaskTracker::new(),
            published: Published::default(),
            host: tokio::sync::RwLock::new(None),
            calls,
            tokens,
            confirmations: Confirmations::default(),
            instance,
            started_at: now(),
            config,
            paths,
            store,
            drives,
            drive_locks: Locks::default(),
            lock,
            reserve,
        });
        let file = shared.config.audit_file.clone();
        shared.tasks.spawn(record_calls(shared.store.clone(), queue, file));
        match shared.provision.sync_providers().await {
            Err(error) if error.is_disk_full() => tracing::warn!(%error, "providers are as they were before"),
            synced => synced?,
        }
        tokio::spawn(crate::vm::network::hear(Arc::downgrade(&shared), refusals));
        recover::recover(&shared).await.map_err(|error| OpenError::Recover { error })?;
        crate::publish::take_up(&shared).await.map_err(|error| OpenError::Recover { error })?;
        resume::resume_ops(&shared).await.map_err(|error| OpenError::Recover { error })?;
        tokio::spawn(tidy::keep_tidy(Arc::downgrade(&shared)));
        Ok(Self { shared })
    }

    /// Ends the tasks of this daemon; VMs keep running. At most a few seconds.
    pub async fn shutdown(&self) {
        for handle in self.shared.vms.all() {
            handle.commands.send(Command::Detach).await.ok();
        }
        self.shared.ops.drain(Duration::from_secs(2)).await;
        self.shared.calls.close().await;
    }

    /// The id of the VM that a caller means by a reference; in memory.
    pub fn resolve_vm(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        self.shared.vms.resolve(caller, vm)
    }

    /// The caller that a token's secret belongs to, if the token works; in memory.
    pub fn authenticate(&self, secret: &str) -> Option<Caller> {
        self.shared.tokens.authenticate(secret)
    }

    /// The way into a VM's guest, if its tools may be called now; in memory.
    pub fn guest(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError> {
        let handle = self.shared.vms.get(caller, vm)?;
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

/// Makes a directory that only this user can look into; one that is there is closed to others.
fn make_private(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let failed = |what: &str, e: std::io::Error| {
        std::io::Error::new(e.kind(), format!("{what} the directory {}: {e}", directory.display()))
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|e| failed("make", e))?;
    let mode = std::fs::metadata(directory).map_err(|e| failed("look at", e))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let closed = std::fs::set_permissions(directory, PermissionsExt::from_mode(mode & 0o700));
    closed.map_err(|e| failed("close to other users", e))
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
        return Err(ToolError::invalid(format!("limit must be 1 to {PAGE_MAX}, got {limit}")));
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
