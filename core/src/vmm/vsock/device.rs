//! The device without its rings: all connections, the assignment of packets to them, and the host's sockets.
//!
//! ```text
//!  accept ─> Greeting ── CONNECT n ──> Live ── SHUTDOWN sent ────> Closing ── guest's reset ──> gone
//!               │ garbage, slow         │ guest: REQUEST ─> Live     │ slow
//!               v                       v                            v
//!              gone              over; bytes left? ─> Draining ──>  gone
//! ```
//! Everything here has a limit: connections, those that one side may open, queued answers, and how long a connection may stay half-open.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nexus_schema::link::{EGRESS_PORT, HOST_PORT};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::connection::{Connection, Ports, Verdict};
use super::greeting::{Greeting, LINE_MAX, Progress};
use super::packet::{HOST_CID, Header, Operation, STREAM};
use super::ports::SocketName;
use super::stream::{Buffers, HostStream};
use super::throttle::Throttle;

/// Maximum number of connections, by either side and in any state.
pub(super) const CONNECTIONS_MAX: usize = 400;
/// Maximum number of connections by the guest, so that it cannot block the host's: those to other machines, and a few for hello.
pub(super) const GUEST_CONNECTIONS_MAX: usize = nexus_schema::egress::CONNECTIONS_MAX + 16;
/// Maximum number of host connections that have not sent their `CONNECT` line.
pub(super) const GREETINGS_MAX: usize = 64;
/// Maximum number of queued answers to the guest; more are dropped.
pub(super) const ANSWERS_MAX: usize = 1024;
/// Timeout of a host program to send its `CONNECT` line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of the guest to accept, counted from `CONNECT`. It includes the guest's boot.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of the guest to reset a connection whose host end is closed.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval between two checks of pending timeouts.
const TICK: Duration = Duration::from_secs(1);
/// Maximum number of connections that are accepted before other events get their turn.
const ACCEPTS_PER_TURN: usize = 64;
/// Guest ports below this can be bound only by root.
const PRIVILEGED_PORTS: u32 = 1024;

type Token = u64;
const LISTENER: Token = 0;
const TIMER: Token = 1;
const AGAIN: Token = 2;
const FIRST_STREAM: Token = 3;

#[derive(Debug)]
enum Slot {
    Greeting { stream: HostStream, greeting: Greeting, since: Instant },
    Live(Live),
    Closing { connection: Connection, by_guest: bool, since: Instant },
    Draining { stream: HostStream, by_guest: bool },
}

#[derive(Debug)]
struct Live {
    connection: Connection,
    stream: HostStream,
    by_guest: bool,
    /// Whether it is in the queue of connections that may have a packet for the guest.
    queued: bool,
    since: Instant,
}

/// Number of connections, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    all: usize,
    by_guest: usize,
    greeting: usize,
}

/// The vsock device of one guest.
#[derive(Debug)]
pub(super) struct Device {
    cid: u64,
    socket: SocketName,
    listener: UnixListener,
    epoll: OwnedFd,
    timer: OwnedFd,
    timer_runs: bool,
    /// Whether more connections must be accepted later: descriptors ran out, or other events had to get their turn.
    accept_later: bool,
    again: OwnedFd,
    slots: HashMap<Token, Slot>,
    tokens: HashMap<Ports, Token>,
    counts: Counts,
    senders: VecDeque<Token>,
    answers: VecDeque<Header>,
    buffers: Buffers,
    next_token: Token,
    next_port: u32,
    refusals: Throttle,
}

impl Device {
    /// Makes a device for the guest with the context id `cid`, with its host socket at `path`.
    pub(super) fn new(cid: u32, path: &Path) -> io::Result<Self> {
        let socket = SocketName::new(path)?;
        let listener = socket.bind()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let again = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC,
        )?;
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), edge)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), edge)?;
        epoll::add(&epoll, &again, EventData::new_u64(AGAIN), edge)?;
        Ok(Self {
            cid: cid.into(),
            socket,
            listener,
            epoll,
            timer,
            timer_runs: false,
            accept_later: false,
            again,
            slots: HashMap::new(),
            tokens: HashMap::new(),
            counts: Counts::default(),
            senders: VecDeque::new(),
            answers: VecDeque::new(),
            buffers: Buffers::default(),
            next_token: FIRST_STREAM,
            next_port: 0,
            refusals: Throttle::default(),
        })
    }

    /// Returns a descriptor that becomes readable when [`Device::poll`] has something to do.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Makes [`Device::events`] readable, to continue with remaining work after other events.
    pub(super) fn come_back(&self) {
        // Each write is a new edge. It fails only if the counter overflows, which does not happen.
        if let Err(error) = rustix::io::write(&self.again, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake the vsock device");
        }
    }

    /// Removes the host socket's file.
    pub(super) fn remove_socket(&self) -> io::Result<()> {
        self.socket.remove()
    }

    /// Handles events of the host's sockets and of the timer.
    pub(super) fn poll(&mut self) {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; 64];
        let events = match epoll::wait(&self.epoll, &mut space, Some(&Timespec::default())) {
            Ok((events, _)) => events,
            // The descriptor stays readable, so this is called again.
            Err(Errno::INTR) => return,
            Err(error) => return tracing::error!(%error, "cannot wait for host sockets"),
        };
        for event in events {
            // Copied out: the structure is packed.
            let (token, flags) = (event.data.u64(), event.flags);
            match token {
                LISTENER => self.accept(),
                TIMER => self.tick(Instant::now()),
                AGAIN if self.accept_later => self.accept(),
                AGAIN => {}
                token => self.on_stream(token, flags),
            }
        }
    }

    fn accept(&mut self) {
        self.accept_later = false;
        for _ in 0..ACCEPTS_PER_TURN {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a host connection");
                    self.accept_later = true;
                    return self.start_timer();
                }
            };
            if self.counts.all >= CONNECTIONS_MAX || self.counts.greeting >= GREETINGS_MAX {
                self.refused("too many connections from the host");
                continue;
            }
            let slot =
                |stream| Slot::Greeting { stream, greeting: Greeting::default(), since: Instant::now() };
            match stream.set_nonblocking(true).and_then(|()| self.add(stream, slot)) {
                Ok(token) => {
                    self.start_timer();
                    self.greet(token);
                }
                Err(error) => tracing::warn!(%error, "cannot watch a host connection"),
            }
        }
        self.accept_later = true;
        self.come_back();
    }

    fn add(&mut self, socket: UnixStream, slot: impl FnOnce(HostStream) -> Slot) -> io::Result<Token> {
        let token = self.next_token;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, EventData::new_u64(token), flags)?;
        self.next_token += 1;
        self.put(token, slot(HostStream::new(socket)));
        Ok(token)
    }

    fn put(&mut self, token: Token, slot: Slot) {
        self.counts.all += 1;
        self.counts.by_guest += usize::from(slot.by_guest());
        self.counts.greeting += usize::from(matches!(slot, Slot::Greeting { .. }));
        self.slots.insert(token, slot);
    }

    /// Takes a slot out. Unless the caller puts it back, its socket is closed, which also removes it from epoll.
    fn take(&mut self, token: Token) -> Option<Slot> {
        let slot = self.slots.remove(&token)?;
        self.counts.all -= 1;
        self.counts.by_guest -= usize::from(slot.by_guest());
        self.counts.greeting -= usize::from(matches!(slot, Slot::Greeting { .. }));
        Some(slot)
    }

    fn on_stream(&mut self, token: Token, flags: EventFlags) {
        match self.slots.get_mut(&token) {
            None | Some(Slot::Closing { .. }) => {}
            Some(Slot::Greeting { stream, .. }) => {
                stream.note(flags);
                self.greet(token);
            }
            Some(Slot::Draining { stream, .. }) => {
                stream.note(flags);
                stream.flush();
                if stream.is_flushed() {
                    self.take(token);
                }
            }
            Some(Slot::Live(live)) => {
                live.stream.note(flags);
                if live.connection.is_requesting() && live.stream.is_gone() {
                    return self.drop_live(token, true);
                }
                let settled = live.stream.flush();
                live.connection.forward(settled);
                self.enqueue(token);
            }
        }
    }

    /// Continues to read a host program's first line. Bytes after it stay in the socket.
    fn greet(&mut self, token: Token) {
        let Some(Slot::Greeting { stream, greeting, .. }) = self.slots.get_mut(&token) else { return };
        let mut bytes = [0; LINE_MAX];
        let progress = loop {
            let room = greeting.room();
            let seen = match rustix::net::recv(stream.socket(), &mut bytes[..room], RecvFlags::PEEK) {
                Ok((0, _)) => break Progress::Refused,
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                Err(_) => break Progress::Refused,
            };
            let (taken, progress) = greeting.take(&bytes[..seen]);
            // These bytes were peeked, so this reads all of them.
            match rustix::net::recv(stream.socket(), &mut bytes[..taken], RecvFlags::empty()) {
                Ok((count, _)) if count == taken => {}
                _ => break Progress::Refused,
            }
            if progress != Progress::More {
                break progress;
            }
        };
        let Some(Slot::Greeting { stream, .. }) = self.take(token) else { return };
        let Progress::Connect(guest) = progress else { return };
        let ports = Ports { host: self.free_port(guest), guest };
        let connection = Connection::from_host(ports);
        self.tokens.insert(ports, token);
        let since = Instant::now();
        self.put(token, Slot::Live(Live { connection, stream, by_guest: false, queued: false, since }));
        self.start_timer();
        self.enqueue(token);
    }

    /// Returns a host port that is not in use with this guest port, far from the ports that programs listen on.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            self.next_port = self.next_port.wrapping_add(1) & 0x3fff_ffff;
            let host = 0x4000_0000 | self.next_port;
            if !self.tokens.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn enqueue(&mut self, token: Token) {
        if let Some(Slot::Live(live)) = self.slots.get_mut(&token)
            && !live.queued
        {
            live.queued = true;
            self.senders.push_back(token);
        }
    }

    fn answer(&mut self, header: Option<Header>) {
        let Some(header) = header else { return };
        if self.answers.len() < ANSWERS_MAX {
            self.answers.push_back(header);
        } else {
            self.refused("the guest does not receive its answers");
        }
    }

    fn refused(&mut self, why: &'static str) {
        if let Some(suppressed) = self.refusals.admit(Instant::now()) {
            tracing::warn!(cid = self.cid, why, suppressed, "vsock packet or connection refused");
        }
    }

    /// Logs malformed data of the guest, rate-limited.
    pub(super) fn malformed(&mut self) {
        self.refused("malformed packet from the guest");
    }

    /// Ends a connection. Bytes that the guest sent before are still written.
    fn drop_live(&mut self, token: Token, reset: bool) {
        let Some(Slot::Live(mut live)) = self.take(token) else { return };
        self.tokens.remove(&live.connection.ports());
        if live.queued {
            // Remove it now: while the guest receives nothing, the queue is not cleared.
            self.senders.retain(|sender| *sender != token);
        }
        if reset && live.connection.is_known() {
            let header = live.connection.reset(self.cid);
            self.answer(Some(header));
        }
        live.stream.discard(&mut self.buffers);
        live.stream.flush();
        if !live.stream.is_flushed() {
            self.put(token, Slot::Draining { stream: live.stream, by_guest: live.by_guest });
        }
    }

    /// Handles a packet from the guest; `payload` has the header's length.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8]) {
        if header.source_cid != self.cid || header.destination_cid != HOST_CID || header.kind != STREAM {
            self.refused("packet of another guest or kind");
            return self.answer(header.reset());
        }
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let Some(&token) = self.tokens.get(&ports) else {
            if header.operation() == Some(Operation::Request) && self.open(header).is_some() {
                return;
            }
            return self.answer(header.reset());
        };
        match self.slots.get_mut(&token) {
            Some(Slot::Live(live)) => {
                let verdict = live.connection.receive(header);
                self.settle(token, verdict, payload);
            }
            Some(Slot::Closing { connection, .. }) => {
                if let Verdict::Over { reset } = connection.receive(header) {
                    self.take(token);
                    self.tokens.remove(&ports);
                    if reset {
                        self.answer(header.reset());
                    }
                }
            }
            // These slots have no ports.
            None | Some(Slot::Greeting { .. } | Slot::Draining { .. }) => {}
        }
    }

    fn settle(&mut self, token: Token, verdict: Verdict, payload: &[u8]) {
        let Some(Slot::Live(live)) = self.slots.get_mut(&token) else { return };
        match verdict {
            Verdict::Continue => {}
            Verdict::Accepted => {
                let line = format!("OK {}\n", live.connection.ports().host);
                // Nothing has been written yet, so the line fits, unless the host program has disconnected.
                if live.stream.send(line.as_bytes()) < line.len() {
                    return self.drop_live(token, true);
                }
            }
            Verdict::Deliver => {
                let settled = live.stream.send(payload);
                live.connection.forward(settled);
            }
            Verdict::Shut => {
                if !live.connection.guest_receives() {
                    live.stream.refuse(&mut self.buffers);
                }
                if !live.connection.guest_sends() {
                    let settled = live.stream.finish();
                    live.connection.forward(settled);
                }
            }
            Verdict::Over { reset } => return self.drop_live(token, reset),
        }
        self.enqueue(token);
    }

    /// Opens a connection that the guest requests.
    fn open(&mut self, request: &Header) -> Option<()> {
        let (host, guest) = (request.destination_port, request.source_port);
        if matches!(host, HOST_PORT | EGRESS_PORT) && guest >= PRIVILEGED_PORTS {
            self.refused("an unprivileged program of the guest connects to the host");
            return None;
        }
        if self.counts.all >= CONNECTIONS_MAX || self.counts.by_guest >= GUEST_CONNECTIONS_MAX {
            self.refused("too many connections from the guest");
            return None;
        }
        let socket = match self.socket.connect(host) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::trace!(port = host, %error, "cannot connect for the guest");
                return None;
            }
        };
        let connection = Connection::from_guest(request);
        let since = Instant::now();
        let slot = |stream| Slot::Live(Live { connection, stream, by_guest: true, queued: false, since });
        let token = self.add(socket, slot).ok()?;
        self.tokens.insert(connection.ports(), token);
        self.enqueue(token);
        Some(())
    }

    /// Returns whether there is a packet for the guest. Reads from host programs as far as the guest has credit.
    pub(super) fn has_packet(&mut self) -> bool {
        if !self.answers.is_empty() {
            return true;
        }
        while let Some(token) = self.senders.front() {
            if let Some(Slot::Live(live)) = self.slots.get_mut(token) {
                live.stream.fill(live.connection.wants(), &mut self.buffers);
                if live.connection.next(live.stream.side(), usize::MAX).is_some() {
                    return true;
                }
                live.queued = false;
            }
            self.senders.pop_front();
        }
        false
    }

    /// Passes the next packet to `write`, with at most `room` bytes of payload (at least one). Call it only after
    /// [`Device::has_packet`] has returned true.
    pub(super) fn next_packet(&mut self, room: usize, write: impl FnOnce(&Header, &[u8])) {
        if let Some(header) = self.answers.pop_front() {
            return write(&header, &[]);
        }
        let Some(token) = self.senders.pop_front() else { return };
        let Some(Slot::Live(live)) = self.slots.get_mut(&token) else { return };
        let Some(packet) = live.connection.next(live.stream.side(), room) else {
            live.queued = false;
            return;
        };
        let header = live.connection.sent(packet, self.cid);
        let length = packet.length as usize;
        write(&header, &live.stream.pending()[..length]);
        live.stream.consume(length, &mut self.buffers);
        if !live.connection.is_closing() {
            // Back to the end of the queue: each connection sends one packet in turn.
            self.senders.push_back(token);
        } else if let Some(Slot::Live(live)) = self.take(token) {
            let Live { connection, by_guest, .. } = live;
            self.put(token, Slot::Closing { connection, by_guest, since: Instant::now() });
            self.start_timer();
        }
    }

    /// Ends all connections that the guest knew of, since its reset has ended them. Connections that it does not know of yet stay.
    pub(super) fn guest_reset(&mut self) {
        self.answers.clear();
        let tokens: Vec<Token> = self.slots.keys().copied().collect();
        let mut ended = 0;
        for token in tokens {
            match self.slots.get(&token) {
                Some(Slot::Live(live)) if live.connection.is_known() => {
                    self.drop_live(token, false);
                    ended += 1;
                }
                Some(Slot::Closing { connection, .. }) => {
                    self.tokens.remove(&connection.ports());
                    self.take(token);
                }
                _ => {}
            }
        }
        tracing::debug!(cid = self.cid, ended, "guest driver reset");
    }

    fn start_timer(&mut self) {
        if self.timer_runs {
            return;
        }
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec { tv_sec: TICK.as_secs() as i64, tv_nsec: TICK.subsec_nanos().into() },
        };
        match rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            Ok(_) => self.timer_runs = true,
            Err(error) => tracing::error!(%error, "cannot set the vsock timer"),
        }
    }

    /// Ends connections that have been half-open for too long at `now`.
    fn tick(&mut self, now: Instant) {
        self.timer_runs = false;
        let late = |since: Instant, limit| now.saturating_duration_since(since) >= limit;
        let (mut expired, mut waiting) = (vec![], false);
        for (token, slot) in &self.slots {
            let over = match slot {
                Slot::Greeting { since, .. } => late(*since, GREETING_TIMEOUT),
                Slot::Live(live) if live.connection.is_requesting() => late(live.since, REQUEST_TIMEOUT),
                Slot::Closing { since, .. } => late(*since, CLOSING_TIMEOUT),
                Slot::Live(_) | Slot::Draining { .. } => continue,
            };
            if over {
                expired.push(*token);
            } else {
                waiting = true;
            }
        }
        for token in expired {
            if let Some(Slot::Live(_)) = self.slots.get(&token) {
                self.drop_live(token, true);
            } else if let Some(Slot::Closing { connection, .. }) = self.take(token) {
                self.tokens.remove(&connection.ports());
                self.answer(Some(connection.reset(self.cid)));
            }
        }
        if waiting {
            self.start_timer();
        }
        if self.accept_later {
            self.accept();
        }
    }
}

impl Slot {
    fn by_guest(&self) -> bool {
        match self {
            Slot::Greeting { .. } => false,
            Slot::Live(Live { by_guest, .. }) => *by_guest,
            Slot::Closing { by_guest, .. } | Slot::Draining { by_guest, .. } => *by_guest,
        }
    }
}

#[cfg(test)]
mod tests;
