//! `nexus-net SOCKET`: the only process with network privileges, for the VMs of one nexusd. `nexus-net --own SOCKET` is the same for an ordinary
//! user: it has them in a network namespace of its own ([`own`]).
//!
//! nexusd starts it when a VM first needs a network, and connects to it over SOCKET (`net/wire` has the protocol). It outlives nexusd, and the
//! network outlives it: when it ends, VMs keep their network, and the next process adopts everything. Only `cleanup` removes the network.
//!
//! [`network`] maintains the desired state, with [`link`] (interfaces) and [`firewall`] ([`nft`]). [`dns`] is the resolver, which
//! has a [`pinner`] open the addresses of names ([`pins`]) in the firewall. [`events`] and [`denials`] report refusals.

mod arguments;
mod backoff;
mod check;
mod conntrack;
mod denials;
mod dns;
mod error;
mod events;
mod failpoint;
mod firewall;
mod forwarding;
mod host_firewall;
mod legacy;
mod link;
mod netlink;
mod network;
mod nflog;
mod nft;
mod own;
mod pinner;
mod pins;
mod privileges;
mod refusal;
mod server;
mod view;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::arguments::Task;
use crate::events::Changes;
use crate::link::kernel::Links;
use crate::network::Network;
use crate::own::{Own, OwnError};
use crate::pinner::Pinner;
use crate::privileges::PrivilegeError;
use crate::view::Shared;

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("usage: nexus-net [--own] SOCKET (nexusd starts it), or nexus-net --check")]
    Usage,
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    #[error(transparent)]
    Own(#[from] OwnError),
    #[error("another nexus-net is already serving {0}")]
    Running(String),
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("nexus_net=info"));
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).with_env_filter(filter).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(cause = ?std::error::Error::source(&error), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), StartError> {
    match Task::parse(std::env::args_os().skip(1)).ok_or(StartError::Usage)? {
        Task::Serve { socket, is_apart } => serve(&socket, is_apart),
        Task::Check => own::check::check().map_err(failed("print the result")),
        Task::Hold { record, namespaces } => Ok(own::hold(&record, namespaces)?),
        Task::Uplink { record, program, into } => Ok(own::execute_uplink(&record, &program, &into)?),
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::Io { what: what.to_owned(), source }
}

fn runtime() -> Result<Runtime, StartError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("start the runtime"))
}

/// Sockets in the host's network namespace, opened before this process entered one of its own.
struct Outside {
    links: Links,
    changes: Changes,
}

impl Outside {
    fn open() -> io::Result<Self> {
        Ok(Self { links: Links::open()?, changes: Changes::of_routes()? })
    }
}

fn serve(socket: &Path, is_apart: bool) -> Result<(), StartError> {
    if !is_apart {
        privileges::give_up()?;
    }
    let _lock = lock(socket)?;
    raise_limit();
    let network = runtime()?;
    let mut apart = None;
    if is_apart {
        let outside = {
            let _within = network.enter();
            Outside::open().map_err(failed("open the sockets to rtnetlink"))?
        };
        let directory = socket.parent().unwrap_or(Path::new("."));
        apart = Some((own::enter(directory)?, outside));
        privileges::give_up()?;
    }
    let (mut own, outside) = apart.unzip();
    let shared = Arc::new(Shared::default());
    let (jobs, work) = mpsc::channel(64);
    let (setups, to_serve) = mpsc::channel(1);
    // A separate thread: the kernel can take 20 ms for a change, and names must be answered meanwhile.
    let network_shared = Arc::clone(&shared);
    let thread = std::thread::Builder::new().name("network".to_owned()).spawn(move || {
        network.block_on(async move {
            match Links::open() {
                Ok(links) => {
                    let (outside, outer_changes) =
                        outside.map(|outside| (outside.links, outside.changes)).unzip();
                    let links = links.with_outside(outside);
                    let (changed, changes) = mpsc::channel(1);
                    tokio::spawn(events::watch_changes(changed, outer_changes));
                    server::work(Network::new(links, network_shared, setups), work, changes).await;
                }
                Err(error) => tracing::error!(%error, "cannot open the socket to rtnetlink"),
            }
        });
    });
    thread.map_err(failed("start a thread"))?;
    let taps = socket.with_file_name(nexus_net_wire::hand::SOCKET);
    let ended = runtime()?.block_on(async {
        let listen = |path: &Path| {
            server::bind(path)
                .map_err(|source| StartError::Io { what: format!("listen on {}", path.display()), source })
        };
        if own.is_some() {
            tokio::spawn(own::serve_taps(listen(&taps)?, Arc::clone(&shared)));
        }
        let listener = listen(socket)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed("handle signals"))?;
        let pinner = Pinner::start(Arc::clone(&shared)).map_err(failed("start a thread"))?;
        tokio::spawn(dns::serve(Arc::clone(&shared), pinner, to_serve));
        tokio::select! {
            () = server::serve(listener, jobs, shared) => Ok(End::CleanedUp),
            _ = terminate.recv() => Ok(End::Asked),
            error = lost(&mut own) => Err(error.into()),
        }
    });
    if let (Ok(End::CleanedUp), Some(own)) = (&ended, own) {
        own.end();
        let _ = std::fs::remove_file(&taps);
    }
    // From now on clients cannot connect.
    let _ = std::fs::remove_file(socket);
    ended.map(drop)
}

/// Why the process ends without an error.
enum End {
    /// The network is removed.
    CleanedUp,
    /// By SIGTERM: the network stays.
    Asked,
}

/// Returns when the own namespace has become unusable, if there is one.
async fn lost(own: &mut Option<Own>) -> OwnError {
    match own {
        Some(own) => own.watch().await,
        None => std::future::pending().await,
    }
}

/// Raises the limit of open files, since the TCP queries of all VMs together need many sockets.
fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Takes the lock that allows one process per socket. The kernel releases it when the process ends.
fn lock(socket: &Path) -> Result<File, StartError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let failed = |source| StartError::Io { what: format!("open {}", path.display()), source };
    let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::AGAIN) => Err(StartError::Running(socket.display().to_string())),
        Err(error) => Err(failed(error.into())),
    }
}
