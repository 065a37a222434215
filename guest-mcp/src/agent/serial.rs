//! The ports of a virtio-serial device, which replace the vsock device in a VM that can be checkpointed.
//!
//! ```text
//! /dev/vport* ── lanes ── nexus_vsock::Device ── socket pairs ──> listen, or from hello and the proxy
//!      └ nexus.ctl: the host asks for new sessions, after the VM was restored: all ports are opened anew, and old connections end
//! ```
//! All of this is one task of the agent's only thread. Only root can open the ports, and each only once.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_schema::link::{LEASE_PORT, MCP_PORT, STREAM_PORT};
use nexus_vsock::serial::{self, LANES, PORTS, Requests, WORD};
use nexus_vsock::{Device, Lane, Nonce, Pairs, Pause};
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::console::say;
use crate::os::read_small;
use crate::sys::watch;

/// Where the kernel lists the ports; the file `name` of each says which one it is.
const CLASS: &str = "/sys/class/virtio-ports";
/// Timeout for the ports to appear. The host names them while the guest boots.
const PORTS_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which they are looked for, and timeout between two tries to open one.
const LOOK: Duration = Duration::from_millis(10);
/// Pause after a failure, before the ports are opened anew.
const PAUSE: Duration = Duration::from_millis(200);
/// Pause if there is not enough memory for a write.
const STARVED: Duration = Duration::from_millis(10);

/// Returns whether this VM has ports in place of a vsock device.
pub(super) fn is_here() -> bool {
    read_small("/proc/cmdline", 16 << 10).is_some_and(|line| line.split_whitespace().any(|word| word == WORD))
}

/// The agent's way to the host.
#[derive(Debug)]
pub(crate) struct Serial {
    dials: mpsc::UnboundedSender<(UnixStream, u32)>,
}

impl Serial {
    /// Connects to a port of the host. If that refuses, the connection ends at once.
    pub(crate) fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        let (ours, theirs) = Pairs::make()?;
        self.dials.send((ours, port)).map_err(|_| io::Error::from(ErrorKind::ConnectionRefused))?;
        Ok(theirs)
    }
}

/// What happens at the ports.
#[derive(Debug)]
pub(super) enum Event {
    /// The host has connected to a port.
    Accepted(u32, OwnedFd),
    /// The VM was restored, and its sessions have begun anew with this nonce.
    Relinked(Nonce),
}

/// Opens the ports and serves them. The task ends with the runtime.
pub(super) async fn start() -> io::Result<(Serial, mpsc::UnboundedReceiver<Event>)> {
    let paths = find().await?;
    let (dials, dialled) = mpsc::unbounded_channel();
    let (events, happened) = mpsc::unbounded_channel();
    let device = Device::new(serial::guest(say), Pairs::new(&[MCP_PORT, STREAM_PORT, LEASE_PORT]))?;
    let woken = watch(device.events().try_clone_to_owned()?, Interest::READABLE)?;
    let nonce = own_nonce()?;
    let [control, lanes @ ..] = &paths;
    let control = watch(open(control).await?, Interest::READABLE)?;
    let mut ports = Vec::with_capacity(LANES);
    for (index, path) in lanes.iter().enumerate() {
        ports.push(Port::open(index, path, nonce).await?);
    }
    let requests = Requests::default();
    let mux = Mux { device, woken, control, requests, ports, paths, nonce, dialled, events };
    tokio::spawn(mux.serve());
    Ok((Serial { dials }, happened))
}

/// Waits until the kernel knows the names of all ports.
async fn find() -> io::Result<[PathBuf; LANES + 1]> {
    let deadline = tokio::time::Instant::now() + PORTS_TIMEOUT;
    loop {
        let found = PORTS.map(|port| look(Path::new(CLASS), port));
        if let [Some(control), Some(calls), Some(bulk)] = found {
            return Ok([control, calls, bulk]);
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(io::Error::new(
                ErrorKind::NotFound,
                "the ports of the virtio-serial device did not appear: does this kernel have virtio_console?",
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns the device of the port with this name.
fn look(class: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let is_it = read_small(entry.path().join("name"), 64)?.trim() == name;
        is_it.then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Opens a port. For a moment after it was closed, a process that was just started may still have it open.
async fn open(path: &Path) -> io::Result<OwnedFd> {
    let deadline = tokio::time::Instant::now() + PORTS_TIMEOUT;
    loop {
        match rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
            Ok(port) => return Ok(port),
            Err(rustix::io::Errno::BUSY | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(io::Error::new(
                ErrorKind::ResourceBusy,
                format!("{} is in use by another process", path.display()),
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns a nonce for sessions that this agent begins by itself. It need not be secret.
fn own_nonce() -> io::Result<Nonce> {
    let uuid = read_small("/proc/sys/kernel/random/uuid", 64).unwrap_or_default();
    uuid.trim().parse().map_err(io::Error::other)
}

/// A port that carries packets.
#[derive(Debug)]
struct Port {
    lane: Lane,
    file: AsyncFd<OwnedFd>,
    /// Waits for room, since the port was last full. It is a duplicate: a port that is always watched for room wakes the agent after each write.
    room: Option<AsyncFd<OwnedFd>>,
}

impl Port {
    async fn open(index: usize, path: &Path, nonce: Nonce) -> io::Result<Self> {
        let file = watch(open(path).await?, Interest::READABLE)?;
        Ok(Self { lane: Lane::of_guest(index, serial::guest(say).cids, nonce), file, room: None })
    }

    /// Waits until there may be more to do.
    async fn wait(&self) -> io::Result<bool> {
        let Some(room) = &self.room else {
            self.file.readable().await?.clear_ready();
            return Ok(false);
        };
        tokio::select! {
            ready = self.file.readable() => {
                ready?.clear_ready();
                Ok(false)
            }
            ready = room.writable() => {
                ready?.clear_ready();
                Ok(true)
            }
        }
    }
}

struct Mux {
    device: Device<Pairs>,
    /// Readable when the device has something to do.
    woken: AsyncFd<OwnedFd>,
    control: AsyncFd<OwnedFd>,
    requests: Requests,
    ports: Vec<Port>,
    paths: [PathBuf; LANES + 1],
    /// The nonce of the present sessions.
    nonce: Nonce,
    dialled: mpsc::UnboundedReceiver<(UnixStream, u32)>,
    events: mpsc::UnboundedSender<Event>,
}

/// Whether there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    /// Only after something has happened.
    Wait,
    /// At once.
    Again,
    /// In a moment: there was no memory.
    Later,
}

impl Mux {
    async fn serve(mut self) {
        let mut said = String::new();
        loop {
            let error = match self.work().await {
                Ok(()) => return,
                Err(error) => error.to_string(),
            };
            if error != said {
                say(format_args!("the link to the host is opened anew: {error}"));
                said = error;
            }
            tokio::time::sleep(PAUSE).await;
            match own_nonce() {
                // An error shows at the next try.
                Ok(nonce) => drop(self.begin(nonce).await),
                Err(error) => said = error.to_string(),
            }
        }
    }

    /// Serves until the agent ends, or until the sessions are over.
    async fn work(&mut self) -> io::Result<()> {
        if self.ports.len() < LANES {
            return Err(ErrorKind::NotConnected.into());
        }
        loop {
            if let Some(nonce) = self.asked()?
                && nonce != self.nonce
            {
                self.begin(nonce).await?;
                let _ = self.events.send(Event::Relinked(nonce));
            }
            match self.pump()? {
                Next::Wait => {}
                Next::Again => {
                    tokio::task::yield_now().await;
                    continue;
                }
                Next::Later => tokio::time::sleep(STARVED).await,
            }
            let Some((calls, bulk)) =
                self.ports.split_first().and_then(|(calls, rest)| Some((calls, rest.first()?)))
            else {
                return Err(ErrorKind::NotConnected.into());
            };
            let room = tokio::select! {
                ready = self.woken.readable() => {
                    ready?.clear_ready();
                    None
                }
                ready = self.control.readable() => {
                    ready?.clear_ready();
                    None
                }
                has_room = calls.wait() => has_room?.then_some(0),
                has_room = bulk.wait() => has_room?.then_some(1),
                dialled = self.dialled.recv() => {
                    let Some((socket, port)) = dialled else { return Ok(()) };
                    // If there are too many connections, this one is closed.
                    let _ = self.device.dial(socket, port);
                    None
                }
            };
            if let Some(port) = room.and_then(|index: usize| self.ports.get_mut(index)) {
                port.room = None;
            }
        }
    }

    /// Ends all connections, opens the ports anew, which drops what was left in them, and begins sessions with this nonce.
    async fn begin(&mut self, nonce: Nonce) -> io::Result<()> {
        for port in &mut self.ports {
            port.lane.end(&mut self.device);
        }
        self.ports.clear();
        self.nonce = nonce;
        let [_, lanes @ ..] = &self.paths;
        for (index, path) in lanes.iter().enumerate() {
            self.ports.push(Port::open(index, path, nonce).await?);
        }
        Ok(())
    }

    /// Reads the host's requests. Returns the nonce that it wants.
    fn asked(&mut self) -> io::Result<Option<Nonce>> {
        let (mut asked, mut bytes) = (None, [0; 256]);
        loop {
            match rustix::io::read(&self.control, &mut bytes[..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => asked = self.requests.take(&bytes[..count]).or(asked),
                Err(rustix::io::Errno::AGAIN) => return Ok(asked),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Moves what can be moved.
    fn pump(&mut self) -> io::Result<Next> {
        let mut next = Next::Wait;
        while self.device.poll() {}
        for port in &mut self.ports {
            let file = &port.file;
            let read = |room: &mut [u8]| Ok(rustix::io::read(file, room)?);
            if port.lane.receive(&mut self.device, read)? == Pause::Turn {
                next = Next::Again;
            }
        }
        while let Some((port, socket)) = self.device.front_mut().take() {
            let _ = self.events.send(Event::Accepted(port, socket));
        }
        for port in self.ports.iter_mut().filter(|port| port.room.is_none()) {
            let (file, mut is_starved) = (&port.file, false);
            let write = |bytes: &[u8]| match rustix::io::write(file, bytes) {
                Err(rustix::io::Errno::NOMEM) => {
                    is_starved = true;
                    Err(ErrorKind::WouldBlock.into())
                }
                written => Ok(written?),
            };
            match port.lane.send(&mut self.device, write)? {
                Pause::Done => {}
                Pause::Turn => next = next.max(Next::Again),
                Pause::Blocked if is_starved => next = Next::Later,
                Pause::Blocked => {
                    port.room = Some(watch(port.file.as_fd().try_clone_to_owned()?, Interest::WRITABLE)?);
                }
            }
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_known_by_their_names() {
        let class = tempfile::tempdir().unwrap();
        for (port, name) in
            [("vport0p1", Some("nexus.ctl\n")), ("vport0p2", None), ("vport1p2", Some("nexus.calls"))]
        {
            std::fs::create_dir(class.path().join(port)).unwrap();
            if let Some(name) = name {
                std::fs::write(class.path().join(port).join("name"), name).unwrap();
            }
        }
        assert_eq!(look(class.path(), "nexus.ctl"), Some("/dev/vport0p1".into()));
        assert_eq!(look(class.path(), "nexus.calls"), Some("/dev/vport1p2".into()));
        assert_eq!(look(class.path(), "nexus.bulk"), None);
        assert_eq!(look(Path::new("/nonexistent"), "nexus.ctl"), None);
    }

    #[test]
    fn an_own_nonce_differs_each_time() {
        assert_ne!(own_nonce().unwrap(), own_nonce().unwrap());
    }
}
