//! Serves the control socket until the VMM has ended.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_schema::network::Bandwidth;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::pause::{Order, Pauses};
use super::save::Save;
use super::stall::Stalls;
use super::{Vmm, kill, say};
use crate::os::passing;
use crate::os::process::timespec;
use crate::vmm::control::{LINE_MAX, Reply, Request, Status};
use crate::vmm::driver::{Machine, SaveFiles};
use crate::vmm::exit::Exit;
use crate::vmm::plan::LaunchPlan;
use crate::vmm::wire;

/// Maximum number of connections: enough for one daemon with a few calls at once.
const CONNECTIONS_MAX: usize = 16;
/// Timeout of a VMM to end by itself after SIGTERM.
const TERMINATE: Duration = Duration::from_secs(5);
/// Stack size of a thread for a request to the VMM, in bytes. It needs little.
pub(super) const STACK: usize = 128 << 10;

/// The callers that wait for the end of the VMM.
pub(super) struct Waiting(Vec<UnixStream>);

impl Waiting {
    /// Sends them how the VMM ended.
    pub(super) fn answer(self, exit: &Exit) {
        for stream in self.0 {
            send(&stream, &Reply::Ended(exit.clone()));
        }
    }
}

struct Connection {
    stream: UnixStream,
    line: Vec<u8>,
    /// The files that came with it.
    passed: Vec<OwnedFd>,
}

/// Serves until the VMM has ended. Sets `by_request` once the end is requested.
pub(super) fn serve(
    vmm: &Vmm,
    plan: &LaunchPlan,
    status: &Status,
    control: &UnixListener,
    signals: &SignalFd,
    by_request: &mut bool,
) -> Waiting {
    let pauses = &vmm.pauses;
    let mut connections: Vec<Connection> = Vec::new();
    let mut waiting = Vec::new();
    let mut stalls = Stalls::of(plan);
    let mut has_events = vmm.machine.events().is_some();
    let mut kill_at: Option<Instant> = None;
    if let Err(error) = control.set_nonblocking(true) {
        say(&format!("cannot serve the control socket: {error}"));
    }
    loop {
        let ready = {
            let mut fds = vec![
                PollFd::new(vmm.process.handle(), PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
                PollFd::new(control, PollFlags::IN),
            ];
            if let Some(events) = vmm.machine.events().filter(|_| has_events) {
                fds.push(PollFd::from_borrowed_fd(events, PollFlags::IN));
            }
            let first = fds.len();
            fds.extend(connections.iter().map(|c| PollFd::from_borrowed_fd(c.stream.as_fd(), PollFlags::IN)));
            let wake_at = kill_at.into_iter().chain(stalls.look_at()).min();
            let timeout = wake_at.map(|at| timespec(at.saturating_duration_since(Instant::now())));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => say(&format!("cannot wait for events: {error}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            Ready {
                ended: ready[0],
                signal: ready[1],
                connect: ready[2],
                event: ready[3..first].contains(&true),
                connections: ready[first..].to_vec(),
            }
        };
        if ready.event {
            has_events = vmm.machine.take_events();
        }
        stalls.look(&vmm.machine, pauses);
        if ready.ended {
            return Waiting(waiting);
        }
        if ready.signal && terminated(signals) {
            // The host shuts down, or this VM is to be stopped: let the VMM end in an orderly way.
            *by_request = true;
            if let Err(error) = vmm.process.handle().terminate() {
                say(&format!("cannot terminate the VMM: {error}"));
            }
            kill_at.get_or_insert_with(|| Instant::now() + TERMINATE);
        }
        if kill_at.is_some_and(|at| at <= Instant::now()) {
            kill(&vmm.process);
            kill_at = None;
        }
        let mut index = 0;
        connections = std::mem::take(&mut connections)
            .into_iter()
            .filter_map(|mut connection| {
                let is_ready = ready.connections.get(index).copied().unwrap_or(false);
                index += 1;
                if !is_ready {
                    return Some(connection);
                }
                match connection.read_request() {
                    Ok(None) => Some(connection),
                    Ok(Some(Ok(request))) => answer(
                        vmm,
                        status,
                        connection,
                        request,
                        by_request,
                        &mut waiting,
                        &mut stalls,
                        pauses,
                    ),
                    Ok(Some(Err(error))) => {
                        send(&connection.stream, &Reply::Refused(nexus_schema::error::chain(&error)));
                        None
                    }
                    Err(_) => None,
                }
            })
            .collect();
        if ready.connect {
            match control.accept() {
                Ok((stream, _))
                    if connections.len() + waiting.len() + stalls.watchers() < CONNECTIONS_MAX =>
                {
                    if stream.set_nonblocking(true).is_ok() {
                        connections.push(Connection { stream, line: Vec::new(), passed: Vec::new() });
                    }
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => say(&format!("cannot accept on the control socket: {error}")),
            }
        }
        // Drop callers that have disconnected.
        waiting.retain(is_open);
        stalls.retain_watchers();
    }
}

struct Ready {
    ended: bool,
    signal: bool,
    connect: bool,
    event: bool,
    connections: Vec<bool>,
}

/// Reads the pending signals. Returns whether SIGTERM is among them.
fn terminated(signals: &SignalFd) -> bool {
    let mut terminated = false;
    while let Ok(Some(signal)) = signals.read_signal() {
        terminated |= signal.ssi_signo == Signal::SIGTERM as u32;
    }
    terminated
}

impl Connection {
    /// Reads available bytes. Returns a request once it is complete, or why it is invalid. Requests are handled one at a time: what arrives
    /// before the answer is read later.
    fn read_request(&mut self) -> io::Result<Option<Result<Request, wire::WireError>>> {
        let mut chunk = [0; 1024];
        match passing::receive(&self.stream, &mut chunk, &mut self.passed) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => self.line.extend_from_slice(&chunk[..read]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
        if self.passed.len() > passing::FILES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(end) = self.line.iter().position(|b| *b == b'\n') else {
            return if self.line.len() > LINE_MAX {
                Err(io::ErrorKind::InvalidData.into())
            } else {
                Ok(None)
            };
        };
        let request = wire::read_request(&self.line[..end]);
        self.line.drain(..=end);
        Ok(Some(request))
    }
}

/// Answers a request. Returns the connection, unless the answer comes later and takes it.
#[expect(clippy::too_many_arguments, reason = "they are the parts of one loop")]
fn answer(
    vmm: &Vmm,
    status: &Status,
    connection: Connection,
    request: Request,
    by_request: &mut bool,
    waiting: &mut Vec<UnixStream>,
    stalls: &mut Stalls,
    pauses: &Pauses,
) -> Option<Connection> {
    let ordered = |order, stream| {
        pauses.order(order, Some(stream));
        None
    };
    match request {
        Request::Status => {
            send(&connection.stream, &Reply::Status(status.clone()));
            Some(connection)
        }
        Request::Kill => {
            *by_request = true;
            let reply = match vmm.process.handle().kill() {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(error.to_string()),
            };
            send(&connection.stream, &reply);
            Some(connection)
        }
        Request::Wait => {
            waiting.push(connection.stream);
            None
        }
        Request::Watch => {
            stalls.watch(connection.stream);
            None
        }
        Request::Shutdown => {
            *by_request = true;
            ask_machine(&vmm.machine, connection.stream, |machine| machine.shutdown());
            None
        }
        Request::Pause => ordered(Order::Pause, connection.stream),
        Request::Resume => ordered(Order::Resume, connection.stream),
        Request::Release => ordered(Order::Release, connection.stream),
        Request::Hold { ms } => ordered(Order::Hold(Duration::from_millis(ms.into())), connection.stream),
        Request::Limit { rx, tx } => {
            ask_machine(&vmm.machine, connection.stream, move |machine| machine.limit(Bandwidth { rx, tx }));
            None
        }
        Request::Save { hold_ms } => {
            let Ok([state, ram]) = <[OwnedFd; 2]>::try_from(connection.passed) else {
                let why = "a save needs two files, for the state and the memory".to_owned();
                send(&connection.stream, &Reply::Refused(why));
                return None;
            };
            let files = SaveFiles { state: File::from(state), ram: File::from(ram) };
            let hold = Duration::from_millis(hold_ms.into());
            pauses.save(Save { files, hold, caller: connection.stream });
            None
        }
        Request::SetLink { up } => {
            ask_machine(&vmm.machine, connection.stream, move |machine| machine.set_link(up));
            None
        }
        Request::ResizeDrive { index, bytes } => {
            ask_machine(&vmm.machine, connection.stream, move |machine| machine.resize_drive(index, bytes));
            None
        }
    }
}

/// Sends a request to the VMM in a separate thread, since the VMM may be slow. The connection ends with the answer.
fn ask_machine(
    machine: &Arc<dyn Machine>,
    stream: UnixStream,
    ask: impl FnOnce(&dyn Machine) -> Result<(), crate::vmm::driver::DriverError> + Send + 'static,
) {
    let machine = Arc::clone(machine);
    let spawned = std::thread::Builder::new().name("request".to_owned()).stack_size(STACK).spawn(move || {
        let reply = match ask(&*machine) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Refused(super::chain(&error)),
        };
        send(&stream, &reply);
    });
    if let Err(error) = spawned {
        say(&format!("cannot start a thread for a request: {error}"));
    }
}

/// Sends a reply. Replies are short: one that does not fit into the socket's buffer has no reader, and is dropped.
pub(super) fn send(mut stream: &UnixStream, reply: &Reply) {
    let Ok(mut line) = serde_json::to_vec(reply) else { return };
    line.push(b'\n');
    // The caller may have disconnected.
    let _ = stream.write_all(&line);
}

pub(super) fn is_open(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = timespec(Duration::ZERO);
    poll(&mut fds, Some(&now)).is_ok()
        && !fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
}
