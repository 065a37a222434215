//! The network namespace of an ordinary user's `nexus-net`: everything that root has on the host is in it, and slirp4netns connects it
//! with the host's network.
//!
//! ```text
//! the host's network namespace                     the own user and network namespace
//!   slirp4netns (uplink) ── sockets of the user      slirp0, bridge, TAPs, nftables, resolver
//!   sockets that tell the host's addresses           nexus-net
//!   VMMs, each with an open TAP                      nexus-net --hold (holder), which only sleeps
//! ```
//! Holder and uplink outlive `nexus-net`, and are found again by their records ([`process`]). So each of the three may be killed:
//!
//! - *nexus-net*: the next one enters the holder's namespace; connections of VMs go on.
//! - *the holder*: `nexus-net` starts another one inside the namespace.
//! - *the uplink*: `nexus-net` ends, because only a process outside can start it. nexusd starts the next one, which starts the uplink.
//!
//! VMMs are never in the namespace: they get their TAPs already open ([`hand`]), so that they have no capability in any namespace.

pub(crate) mod check;
mod hand;
mod holder;
mod process;
mod uplink;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

pub(crate) use hand::serve as serve_taps;
pub(crate) use holder::{Namespaces, hold};
use process::Process;
pub(crate) use uplink::{
    RELAY, addresses as uplink_addresses, execute as execute_uplink, range as uplink_range,
};

/// File names of the records, beside the socket.
const HOLDER: &str = "holder";
const UPLINK: &str = "uplink";

/// Why there is no namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnError {
    #[error("start {what}")]
    Start {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("make a user namespace with a network namespace")]
    Namespaces {
        #[source]
        source: io::Error,
    },
    #[error("enter the network namespace of process {pid}")]
    Enter {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("{what} ended during its start{colon}{said}", colon = if .said.is_empty() { "" } else { ": " })]
    Ended { what: &'static str, said: String },
    #[error("{what} did not start within {seconds} s")]
    Late { what: &'static str, seconds: u64 },
    #[error("slirp4netns is not installed")]
    NoUplink,
    #[error("slirp4netns ended: nexusd starts nexus-net again, which starts it")]
    UplinkEnded,
    #[error("use the record {}", .path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The namespace that this process is in, and the processes that belong to it.
pub(crate) struct Own {
    directory: PathBuf,
    holder: Process,
    uplink: Process,
}

/// Enters the namespace whose records are in a directory; makes it if it does not exist. Must be called while there is only one thread.
/// Sockets that were opened before stay in the host's network.
pub(crate) fn enter(directory: &Path) -> Result<Own, OwnError> {
    let (at_holder, at_uplink) = (directory.join(HOLDER), directory.join(UPLINK));
    let found = Process::find(&at_holder)?.filter(|holder| holder::is_apart(holder.pid()));
    let mut uplink = Process::find(&at_uplink)?;
    let holder = match found {
        Some(holder) => holder,
        None => {
            // It is connected to a namespace that is lost.
            if let Some(lost) = uplink.take() {
                lost.end();
            }
            holder::start(Some(&at_holder), holder::Namespaces::New)?
        }
    };
    crate::failpoint::hit("holder-started");
    let uplink = match uplink {
        Some(uplink) => uplink,
        None => uplink::start(Some(&at_uplink), holder.pid(), None)?,
    };
    crate::failpoint::hit("uplink-started");
    join(holder.pid())?;
    crate::failpoint::hit("entered");
    Ok(Own { directory: directory.to_owned(), holder, uplink })
}

/// Enters the namespaces of a process.
fn join(pid: u32) -> Result<(), OwnError> {
    let failed = |source| OwnError::Enter { pid, source };
    let open = |name| File::open(format!("/proc/{pid}/ns/{name}")).map_err(failed);
    // Both are opened before the first is entered: from inside, the other may not be visible.
    let (user, net) = (open("user")?, open("net")?);
    for (namespace, kind) in [(user, CloneFlags::CLONE_NEWUSER), (net, CloneFlags::CLONE_NEWNET)] {
        setns(namespace, kind).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

impl Own {
    /// Replaces the holder whenever it ends. Returns the reason when the namespace has become unusable.
    pub(crate) async fn watch(&mut self) -> OwnError {
        loop {
            tokio::select! {
                ended = self.uplink.ended() => return ended.err().map_or(OwnError::UplinkEnded, |source| {
                    OwnError::Start { what: "watching slirp4netns", source }
                }),
                ended = self.holder.ended() => {
                    if let Err(source) = ended {
                        return OwnError::Start { what: "watching the holder", source };
                    }
                }
            }
            tracing::warn!("the holder of the network namespace ended: starting another one");
            let record = self.directory.join(HOLDER);
            match holder::start(Some(&record), holder::Namespaces::Same) {
                Ok(holder) => self.holder = holder,
                Err(error) => return error,
            }
        }
    }

    /// Ends the processes that keep the namespace. It disappears with this process.
    pub(crate) fn end(self) {
        self.uplink.end();
        self.holder.end();
        for name in [UPLINK, HOLDER] {
            let path = self.directory.join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, path = %path.display(), "cannot remove a record");
                }
                _ => {}
            }
        }
    }
}
