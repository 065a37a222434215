//! The ports of a virtio-serial device: QEMU's ends of them, and the thread that serves them.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nexus_vsock::serial::{self, LANES};
use nexus_vsock::{Device, Hybrid, Lane, Nonce, Pause};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::backend::say;
use crate::os::process::timespec;

/// Interval at which the guest is asked again for new sessions, until it begins them.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Stack size of the thread, in bytes. Untouched pages cost nothing.
const STACK: usize = 128 << 10;

/// The vsock device of one VM over the ports of a virtio-serial device. It ends on drop.
#[derive(Debug)]
pub struct SerialLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    orders: Mutex<Orders>,
}

#[derive(Debug, Default)]
struct Orders {
    stop: bool,
    relink: Option<Nonce>,
}

/// A port that carries packets.
struct Port {
    socket: UnixStream,
    lane: Lane,
    /// Whether the socket took all that was written to it so far.
    is_writable: bool,
}

struct Worker {
    device: Device<Hybrid>,
    control: UnixStream,
    /// What is to be written to the control port.
    request: Vec<u8>,
    ports: [Port; LANES],
    /// The nonce that new sessions are to have, and when the guest is asked for them next.
    asked: Option<(Nonce, Instant)>,
    shared: Arc<Shared>,
}

impl SerialLink {
    /// Binds the socket for host programs, and serves a device. Also returns QEMU's ends of the ports, in the order of
    /// [`serial::PORTS`]. `uds` may be relative; an existing file is replaced.
    ///
    /// # Errors
    /// When a directory is missing, a name is too long for a socket, or the process has run out of descriptors or threads.
    pub fn start(uds: &Path) -> io::Result<(Self, [OwnedFd; LANES + 1])> {
        let traits = serial::host(say);
        let device = Device::new(traits, Hybrid::new(uds, true)?)?;
        let pair = || {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok::<_, io::Error>((ours, OwnedFd::from(theirs)))
        };
        let [(control, a), (calls, b), (bulk, c)] = [pair()?, pair()?, pair()?];
        let port =
            |index, socket| Port { socket, lane: Lane::of_host(index, traits.cids), is_writable: true };
        let ports = [port(0, calls), port(1, bulk)];
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            orders: Mutex::default(),
        });
        let mut worker =
            Worker { device, control, request: vec![], ports, asked: None, shared: shared.clone() };
        let thread = std::thread::Builder::new()
            .name("serial".into())
            .stack_size(STACK)
            .spawn(move || worker.serve())?;
        Ok((Self { shared, thread: Some(thread) }, [a, b, c]))
    }

    /// Ends all connections that the guest knew of, and asks its agent to begin new sessions with this nonce. Until it does, connections of host
    /// programs wait.
    pub fn relink(&self, nonce: Nonce) {
        self.shared.order(|orders| orders.relink = Some(nonce));
    }
}

impl Drop for SerialLink {
    fn drop(&mut self) {
        self.shared.order(|orders| orders.stop = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            say(format_args!("the thread of the serial ports panicked"));
        }
    }
}

impl Shared {
    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            say(format_args!("cannot wake the thread of the serial ports: {error}"));
        }
    }
}

impl Worker {
    fn serve(&mut self) {
        while self.wait() {
            while self.device.poll() {}
            if !self.receive() {
                break;
            }
            self.send();
        }
        if let Err(error) = self.device.front().remove() {
            say(format_args!("cannot remove a socket: {error}"));
        }
    }

    /// Waits for something to do. Returns false if there will be no more.
    fn wait(&mut self) -> bool {
        let mut fds = vec![
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.device.events(), PollFlags::IN),
        ];
        let wants = |is_full: bool| if is_full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        fds.push(PollFd::new(&self.control, PollFlags::IN));
        fds.extend(self.ports.iter().map(|port| PollFd::new(&port.socket, wants(!port.is_writable))));
        let left = self.asked.map(|(_, at)| timespec(at.saturating_duration_since(Instant::now())));
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                say(format_args!("cannot wait for the serial ports: {error}"));
                return false;
            }
        }
        let is_woken = !fds[0].revents().is_empty();
        let writable: Vec<bool> = fds[3..].iter().map(|fd| fd.revents().contains(PollFlags::OUT)).collect();
        for (port, is_writable) in self.ports.iter_mut().zip(writable) {
            port.is_writable |= is_writable;
        }
        if is_woken && !self.obey() {
            return false;
        }
        if let Some((nonce, at)) = self.asked
            && at <= Instant::now()
        {
            self.ask(nonce);
        }
        true
    }

    /// Takes the orders of other threads. Returns false if this one is to end.
    fn obey(&mut self) -> bool {
        let mut count = [0; 8];
        // Only this thread reads it, and it was readable.
        let _ = rustix::io::read(&self.shared.wake, &mut count);
        let orders = std::mem::take(&mut *self.shared.orders.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(nonce) = orders.relink {
            for port in &mut self.ports {
                port.lane.wait_for(&mut self.device, nonce);
            }
            self.ask(nonce);
        }
        !orders.stop
    }

    /// Asks the guest's agent for new sessions. It may not listen yet, or end before it does so: it is asked until it has.
    fn ask(&mut self, nonce: Nonce) {
        if self.request.is_empty() {
            self.request = serial::relink(nonce).into_bytes();
        }
        self.asked = Some((nonce, Instant::now() + ASK_AGAIN));
    }

    /// Reads what has come. Returns false if QEMU has ended.
    fn receive(&mut self) -> bool {
        // The guest has nothing to say on the control port.
        let mut ignored = [0; 256];
        if matches!((&self.control).read(&mut ignored), Ok(0)) {
            return false;
        }
        for port in &mut self.ports {
            // Where more is left, poll() says so.
            if port.lane.receive(&mut self.device, |room| (&port.socket).read(room)).is_err() {
                return false;
            }
        }
        if self.ports.iter().all(|port| port.lane.is_open()) {
            self.asked = None;
        }
        true
    }

    /// Writes what there is to write, as far as the ports take it.
    fn send(&mut self) {
        while !self.request.is_empty() {
            match (&self.control).write(&self.request) {
                Ok(count) => drop(self.request.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The guest reads nothing: it has been asked often enough.
                Err(_) => self.request.clear(),
            }
        }
        let mut more = false;
        for port in self.ports.iter_mut().filter(|port| port.is_writable) {
            match port.lane.send(&mut self.device, |bytes| (&port.socket).write(bytes)) {
                Ok(Pause::Done) => {}
                // An error shows at the next read, too.
                Ok(Pause::Blocked) | Err(_) => port.is_writable = false,
                Ok(Pause::Turn) => more = true,
            }
        }
        if more {
            self.device.come_back();
        }
    }
}

#[cfg(test)]
mod tests;
