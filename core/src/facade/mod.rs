//! The facade: one method per tool of the host. The tools use nothing else of this crate.

mod asset;
mod audit;
mod before_run;
mod build;
mod checkpoint;
mod diff;
mod drive;
mod events;
mod fork;
mod health;
mod image;
mod image_export;
mod image_of_vm;
mod kernel;
mod kernel_vm;
mod measures;
mod network;
mod op;
mod openings;
mod plan;
mod pressure;
mod provider;
mod publish;
mod resume;
mod settings;
mod source;
mod space;
mod stream;
mod system;
mod template;
mod tidy;
mod token;
mod tree;
mod vm;
mod wait;
mod wake;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{BootId, OpId, VmId, VmKind};
use nexus_schema::limits::{PAGE_DEFAULT, PAGE_MAX, WAIT_DEFAULT, WAIT_MAX};
use nexus_schema::{ErrorCode, Name, Reference, Timestamp, ToolError};
use tokio_util::task::TaskTracker;

use crate::access::{Caller, Confirmations, Tokens};
use crate::config::Config;
pub use crate::context::Busy;
use crate::context::{CallLog, Published, Shared, Tally, record_calls};
use crate::context::{Command, Registry, Streams};
use crate::drive::{Drives, Locks};
use crate::egress::{Egresses, Upstream};
use crate::event::{self, Events};
use crate::guest::Link;
use crate::image::oci::Keychain;
use crate::net::Nat;
pub use crate::op::CallContext;
use crate::op::{Ops, store_error, summary};
use crate::os::leftover;
use crate::os::lock::{self};
use crate::os::paths::Paths;
use crate::os::reserve::Reserve;
use crate::os::site::Site;
use crate::provision::Provision;
use crate::store::{Store, StoreError, events as stored_events, now, ops, tokens};
use crate::vm::{recover, unknown, warm};

pub use self::events::News;
pub use self::health::add_database_check;
pub use self::measures::Measures;
pub use self::stream::{StreamLife, StreamRefusal, VmStream};
pub use crate::store::calls::CallRecord;

/// How long the end of the daemon waits for what the tasks of VMs have begun.
const TASKS_MAX: Duration = Duration::from_secs(5);

/// Access to a running guest.
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
    /// When the VM's life is over.
    pub expires_at: Option<Timestamp>,
    /// The VM is not idle as long as this is there.
    pub busy: Busy,
}

/// Why a state directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon uses it.
    #[error("the state directory {} is in use by {}", .directory.display(), holder(.pid))]
    Locked {
        /// The state directory.
        directory: PathBuf,
        /// The id of the process that uses it, if it is recorded.
        pid: Option<u32>,
    },
    /// A directory or file cannot be created or read.
    #[error("{source}")]
    Io {
        /// The cause.
        #[from]
        source: std::io::Error,
    },
    /// The database cannot be used.
    #[error("{source}")]
    Store {
        /// The cause.
        #[from]
        source: StoreError,
    },
    /// The drives' directory cannot be used.
    #[error("prepare the drives' directory: {source}")]
    Drives {
        /// The cause.
        #[from]
        source: crate::drive::DriveError,
    },
    /// The state that an earlier daemon left cannot be recovered.
    #[error("recover the state of an earlier daemon: {error}")]
    Recover {
        /// The cause.
        error: ToolError,
    },
}

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("another nexusd (process {pid})"),
        None => "another nexusd".into(),
    }
}

/// A Nexus instance: a state directory and everything that runs under it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Nexus {
    shared: Arc<Shared>,
}

impl Nexus {
    /// Opens a state directory: takes its lock, opens its database, adopts running VMs, and removes what was created only in part.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let paths = Paths::new(&config.state_dir);
        for directory in [
            paths.root().to_owned(),
            paths.vms(),
            paths.drives(),
            paths.checkpoints(),
            paths.all_suspended(),
            paths.all_prepared(),
            paths.images(),
            paths.assets(),
            paths.builds(),
            paths.cache(),
            paths.downloads(),
            paths.kernels(),
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
                Ok(Ok(ended)) => tracing::info!(ended, "killed leftover programs of an earlier daemon"),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot kill leftover programs of an earlier daemon")
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot look for leftover programs of an earlier daemon")
                }
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
        let (nat, refusals) = Nat::new(config.nexus_net.clone(), paths.network(), Site::of_this_process());
        let events = Events::new();
        events.load(store.read(stored_events::all).await?);
        let ops = Ops::new(store.clone(), events.clone());
        let shared = Arc::new(Shared {
            provision: Provision::new(
                store.clone(),
                ops.clone(),
                paths.clone(),
                config.apt_root.clone(),
                config.assets.clone(),
                Keychain::new(config.docker_config.clone(), config.docker_environment.clone()),
                tokens.clone(),
            ),
            ops,
            vms: Registry::default(),
            streams: Streams::default(),
            egresses: Egresses::new(paths.network(), events.clone())
                .through(Upstream::of(&config.assets.proxies)),
            nat,
            tasks: TaskTracker::new(),
            published: Published::default(),
            host: tokio::sync::RwLock::new(None),
            calls,
            events,
            tally: Tally::default(),
            lifetimes: Arc::default(),
            checkpoints: crate::context::InUse::default(),
            warming: crate::context::Warming::default(),
            upkeep: Arc::default(),
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
        shared.tasks.spawn(event::keep(shared.store.clone(), &shared.events));
        match shared.provision.sync_providers().await {
            Err(error) if error.is_disk_full() => {
                tracing::warn!(%error, "the disk is full: providers were not updated")
            }
            synced => synced?,
        }
        tokio::spawn(crate::vm::network::hear(Arc::downgrade(&shared), refusals));
        recover::recover(&shared).await.map_err(|error| OpenError::Recover { error })?;
        crate::publish::take_up(&shared).await.map_err(|error| OpenError::Recover { error })?;
        resume::resume_ops(&shared).await.map_err(|error| OpenError::Recover { error })?;
        tokio::spawn(tidy::keep_tidy(Arc::downgrade(&shared)));
        tokio::spawn(pressure::watch(Arc::downgrade(&shared)));
        tokio::spawn(crate::vm::lifetime::keep(Arc::downgrade(&shared)));
        tokio::spawn(warm::pool::keep(Arc::downgrade(&shared)));
        tokio::spawn(crate::vm::checkpoint::keep(Arc::downgrade(&shared)));
        Ok(Self { shared })
    }

    /// Ends the tasks of this daemon; VMs keep running. Takes at most a few seconds.
    pub async fn shutdown(&self) {
        self.shared.warming.end().await;
        warm::pool::end(&self.shared).await;
        let handles = self.shared.vms.all();
        for handle in &handles {
            handle.commands.send(Command::Detach).await.ok();
        }
        // What a VM's task has begun it ends: a guest that is about to be suspended is paused for good until its row says so.
        let ended = futures::future::join_all(handles.iter().map(|handle| handle.commands.closed()));
        if tokio::time::timeout(TASKS_MAX, ended).await.is_err() {
            tracing::warn!(
                "a vm's task is still at work at the end of nexusd; the next one takes up what is left"
            );
        }
        self.shared.checkpoints.end_packing();
        self.shared.ops.drain(Duration::from_secs(2)).await;
        self.shared.events.close().await;
        self.shared.calls.close().await;
        // A copy of the database that was made until now is an older one at the next start.
        unknown::count_on(&self.shared).await;
    }

    /// The id of the VM that a caller means by a reference; in memory.
    pub fn resolve_vm(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        self.shared.vms.resolve(caller, vm)
    }

    /// The caller that a token's secret belongs to, if the token works; in memory.
    pub fn authenticate(&self, secret: &str) -> Option<Caller> {
        self.shared.tokens.authenticate(secret)
    }

    /// A caller with the rights of the token of this name, if the daemon's user made it and it works; in memory.
    pub fn holder_of(&self, token: &str) -> Option<Caller> {
        self.shared.tokens.by_name(token)
    }

    /// Returns access to a VM's guest if its tools can be called now, without IO.
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
        let (busy, expires_at) = (handle.activity.begin(), record.expires_at);
        Ok(GuestHandle { vm: record.id, name: record.name.clone(), boot_id, link, expires_at, busy })
    }

    /// Records a call; never waits.
    pub fn record_call(&self, call: CallRecord) {
        self.shared.calls.add(call);
    }
}

/// Creates a directory that is private to this user. An existing directory is made private.
fn make_private(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let failed = |what: &str, e: std::io::Error| {
        std::io::Error::new(e.kind(), format!("{what} the directory {}: {e}", directory.display()))
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|e| failed("make", e))?;
    let mode = std::fs::metadata(directory).map_err(|e| failed("read the mode of", e))?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let closed = std::fs::set_permissions(directory, PermissionsExt::from_mode(mode & 0o700));
    closed.map_err(|e| failed("make private", e))
}

impl Shared {
    /// Records an operation that is under way; `subject` is the id and name of the object that it works on.
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

/// Returns the time that a call with this `wait_s` waits.
fn patience(wait_s: Option<u32>) -> Result<Duration, ToolError> {
    let wait = wait_s.map_or(WAIT_DEFAULT, |s| Duration::from_secs(s.into()));
    if wait > WAIT_MAX {
        return Err(ToolError::invalid(format!(
            "wait_s is {}, the maximum is {}",
            wait.as_secs(),
            WAIT_MAX.as_secs()
        ))
        .hint("call op_get until the operation is done"));
    }
    Ok(wait)
}

/// Returns the number of rows of a page.
fn page(limit: Option<u32>) -> Result<u32, ToolError> {
    let limit = limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ToolError::invalid(format!("limit must be 1 to {PAGE_MAX}, got {limit}")));
    }
    Ok(limit)
}

/// Takes the rows that were read, up to one more than a page has. Returns the page, and the cursor of the next one if there are more rows.
fn cut_page<R>(mut rows: Vec<R>, limit: u32, cursor: impl FnOnce(&R) -> String) -> (Vec<R>, Option<String>) {
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let next = rows.last().filter(|_| more).map(cursor);
    (rows, next)
}

/// Parses a cursor that is a number.
fn number_cursor(cursor: Option<&str>) -> Result<Option<i64>, ToolError> {
    cursor
        .map(|text| {
            text.parse()
                .map_err(|_| ToolError::invalid("invalid cursor: pass the next_cursor of the page before"))
        })
        .transpose()
}
