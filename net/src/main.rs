//! `nexus-net SOCKET`: the only process with network privileges, for the VMs of one nexusd.
//!
//! nexusd starts it when a VM first needs a network, and connects to it over SOCKET (`net/wire` has the protocol). It outlives nexusd, and the
//! network outlives it: when it ends, VMs keep their network, and the next process adopts everything. Only `cleanup` removes the network.
//!
//! [`network`] maintains the desired state, with [`link`] (interfaces) and [`firewall`] ([`nft`]). [`dns`] is the resolver, which
//! [`pins`] the addresses of names in the firewall. [`events`] and [`denials`] report refusals.

mod check;
mod conntrack;
mod denials;
mod dns;
mod error;
mod events;
mod failpoint;
mod firewall;
mod link;
mod netlink;
mod network;
mod nflog;
mod nft;
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
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::link::kernel::Links;
use crate::network::Network;
use crate::privileges::PrivilegeError;
use crate::view::Shared;

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("usage: nexus-net SOCKET (nexusd starts it)")]
    Usage,
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
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
    privileges::give_up()?;
    let mut arguments = std::env::args_os().skip(1);
    let (Some(socket), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        return Err(StartError::Usage);
    };
    let _lock = lock(&socket)?;
    raise_limit();
    let failed = |what: &'static str| move |source| StartError::Io { what: what.to_owned(), source };
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed("start the runtime"))
    };
    let shared = Arc::new(Shared::default());
    let (jobs, work) = mpsc::channel(64);
    let (setups, to_serve) = mpsc::channel(1);
    // A separate thread: the kernel can take 20 ms for a change, and names must be answered meanwhile.
    let (network, network_shared) = (runtime()?, Arc::clone(&shared));
    let thread = std::thread::Builder::new().name("network".to_owned()).spawn(move || {
        network.block_on(async move {
            match Links::open() {
                Ok(links) => {
                    let (changed, changes) = mpsc::channel(1);
                    tokio::spawn(events::watch_changes(changed));
                    server::work(Network::new(links, network_shared, setups), work, changes).await;
                }
                Err(error) => tracing::error!(%error, "cannot open the socket to rtnetlink"),
            }
        });
    });
    thread.map_err(failed("start a thread"))?;
    runtime()?.block_on(async move {
        let listener = server::bind(&socket)
            .map_err(|source| StartError::Io { what: format!("listen on {}", socket.display()), source })?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed("handle signals"))?;
        tokio::spawn(dns::serve(Arc::clone(&shared), to_serve));
        tokio::select! {
            () = server::serve(listener, jobs, shared) => {}
            _ = terminate.recv() => {}
        }
        // From now on clients cannot connect.
        let _ = std::fs::remove_file(&socket);
        Ok(())
    })
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
