//! A device without its transport: all connections, the assignment of packets to them, and the sockets of near programs.
//!
//! ```text
//!  accept ─> Greeting ── CONNECT n ──> Live ── SHUTDOWN sent ────> Closing ── far side's reset ──> gone
//!  dial ───────────────────────────────> │
//!               │ garbage, slow         │ far: REQUEST ─> Live       │ slow
//!               v                       v                            v
//!              gone              over; bytes left? ─> Draining ──>  gone
//! ```
//! Everything here has a limit: connections, those that one side may open, queued answers, and how long a connection may stay half-open.

mod near;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::connection::{Cids, Connection, Ports, Verdict};
use crate::greeting::Greeting;
use crate::packet::{Header, Operation, STREAM};
use crate::stream::{Buffers, NearStream};
use crate::throttle::Throttle;

/// Maximum number of connections, by either side and in any state.
pub(super) const CONNECTIONS_MAX: usize = 400;
/// Maximum number of near connections that have not sent their `CONNECT` line.
pub(super) const GREETINGS_MAX: usize = 64;
/// Maximum number of queued answers to the far side; more are dropped.
pub(super) const ANSWERS_MAX: usize = 1024;
/// Timeout of a near program to send its `CONNECT` line.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of the far side to accept, counted from `CONNECT`. It includes a guest's boot.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of the far side to reset a connection whose near end is closed.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval between two checks of pending timeouts.
const TICK: Duration = Duration::from_secs(1);
/// Maximum number of connections that are accepted before other events get their turn.
const ACCEPTS_PER_TURN: usize = 64;

/// Maximum number of events that are handled at once.
const EVENTS: usize = 64;

type Token = u64;
const LISTENER: Token = 0;
const TIMER: Token = 1;
const AGAIN: Token = 2;
const FIRST_STREAM: Token = 3;

#[derive(Debug)]
enum Slot {
    Greeting { stream: NearStream, greeting: Greeting, since: Instant },
    Live(Live),
    Closing { connection: Connection, by_far: bool, lane: usize, since: Instant },
    Draining { stream: NearStream, by_far: bool },
}

#[derive(Debug)]
struct Live {
    connection: Connection,
    stream: NearStream,
    by_far: bool,
    /// Whether its program waits for the line `OK`.
    greeted: bool,
    /// The lane that its packets take.
    lane: usize,
    /// Whether it is in the queue of connections that may have a packet for the far side.
    queued: bool,
    since: Instant,
}

/// What is to be sent over one transport.
#[derive(Debug, Default)]
struct Lane {
    senders: VecDeque<Token>,
    answers: VecDeque<Header>,
}

/// Number of connections, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    all: usize,
    by_far: usize,
    greeting: usize,
}

/// Where the far side's connections lead.
pub trait Front {
    /// Connects to the program that serves `port` on the near side; `far` is the port that the far side connects from. Must not wait. The
    /// socket is non-blocking.
    ///
    /// # Errors
    /// When the far side's request is to be refused. [`io::ErrorKind::PermissionDenied`] is logged.
    fn connect(&mut self, port: u32, far: u32) -> io::Result<UnixStream>;

    /// Returns the listener for near programs that say `CONNECT`, if there is one. It is non-blocking.
    fn listener(&self) -> Option<&UnixListener>;
}

/// The properties of a device.
#[derive(Debug, Clone, Copy)]
pub struct Traits {
    /// Context ids of its sides.
    pub cids: Cids,
    /// Maximum number of connections by the far side, so that it cannot block the near side's.
    pub far_max: usize,
    /// Number of transports that its packets take.
    pub lanes: usize,
    /// Returns the lane of connections to a port, whichever side opens them.
    pub lane_of: fn(u32) -> usize,
    /// Writes a line to the log of this process.
    pub say: fn(fmt::Arguments<'_>),
}

/// The vsock device of one side.
#[derive(Debug)]
pub struct Device<F> {
    traits: Traits,
    front: F,
    epoll: OwnedFd,
    timer: OwnedFd,
    timer_runs: bool,
    /// Whether more connections must be accepted later: descriptors ran out, or other events had to get their turn.
    accept_later: bool,
    again: OwnedFd,
    slots: HashMap<Token, Slot>,
    tokens: HashMap<Ports, Token>,
    counts: Counts,
    lanes: Vec<Lane>,
    buffers: Buffers,
    next_token: Token,
    next_port: u32,
    refusals: Throttle,
}

impl<F: Front> Device<F> {
    /// Makes a device.
    ///
    /// # Errors
    /// When the process has run out of descriptors.
    pub fn new(traits: Traits, front: F) -> io::Result<Self> {
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
        if let Some(listener) = front.listener() {
            epoll::add(&epoll, listener, EventData::new_u64(LISTENER), edge)?;
        }
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), edge)?;
        epoll::add(&epoll, &again, EventData::new_u64(AGAIN), edge)?;
        Ok(Self {
            traits,
            front,
            epoll,
            timer,
            timer_runs: false,
            accept_later: false,
            again,
            slots: HashMap::new(),
            tokens: HashMap::new(),
            counts: Counts::default(),
            lanes: (0..traits.lanes.max(1)).map(|_| Lane::default()).collect(),
            buffers: Buffers::default(),
            next_token: FIRST_STREAM,
            next_port: 0,
            refusals: Throttle::default(),
        })
    }

    /// Returns a descriptor that becomes readable when [`Device::poll`] has something to do.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Makes [`Device::events`] readable, to continue with remaining work after other events.
    pub fn come_back(&self) {
        // Each write is a new edge. It fails only if the counter overflows, which does not happen.
        if let Err(error) = rustix::io::write(&self.again, &1u64.to_ne_bytes()) {
            (self.traits.say)(format_args!("cannot wake the vsock device: {error}"));
        }
    }

    /// Returns where the far side's connections lead.
    pub fn front(&self) -> &F {
        &self.front
    }

    /// Returns where the far side's connections lead, to take them from there.
    pub fn front_mut(&mut self) -> &mut F {
        &mut self.front
    }

    /// Handles events of near sockets and of the timer. Returns whether there may be more of them.
    pub fn poll(&mut self) -> bool {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let events = match epoll::wait(&self.epoll, &mut space, Some(&Timespec::default())) {
            Ok((events, _)) => events,
            // The descriptor stays readable, so this is called again.
            Err(Errno::INTR) => return true,
            Err(error) => {
                (self.traits.say)(format_args!("cannot wait for sockets: {error}"));
                return false;
            }
        };
        let more = events.len() == EVENTS;
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
        more
    }

    fn lane_of(&self, port: u32) -> usize {
        (self.traits.lane_of)(port).min(self.lanes.len() - 1)
    }

    fn add(&mut self, socket: UnixStream, slot: impl FnOnce(NearStream) -> Slot) -> io::Result<Token> {
        let token = self.next_token;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, EventData::new_u64(token), flags)?;
        self.next_token += 1;
        self.put(token, slot(NearStream::new(socket)));
        Ok(token)
    }

    fn put(&mut self, token: Token, slot: Slot) {
        self.counts.all += 1;
        self.counts.by_far += usize::from(slot.by_far());
        self.counts.greeting += usize::from(matches!(slot, Slot::Greeting { .. }));
        self.slots.insert(token, slot);
    }

    /// Takes a slot out. Unless the caller puts it back, its socket is closed, which also removes it from epoll.
    fn take(&mut self, token: Token) -> Option<Slot> {
        let slot = self.slots.remove(&token)?;
        self.counts.all -= 1;
        self.counts.by_far -= usize::from(slot.by_far());
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

    fn enqueue(&mut self, token: Token) {
        if let Some(Slot::Live(live)) = self.slots.get_mut(&token)
            && !live.queued
        {
            live.queued = true;
            self.lanes[live.lane].senders.push_back(token);
        }
    }

    fn answer(&mut self, lane: usize, header: Option<Header>) {
        let Some(header) = header else { return };
        let answers = &mut self.lanes[lane].answers;
        if answers.len() < ANSWERS_MAX {
            answers.push_back(header);
        } else {
            self.refused("the far side does not receive its answers");
        }
    }

    fn refused(&mut self, why: &'static str) {
        if let Some(suppressed) = self.refusals.admit(Instant::now()) {
            (self.traits.say)(format_args!(
                "vsock packet or connection refused: {why} (and {suppressed} not logged before it)"
            ));
        }
    }

    /// Logs malformed data of the far side, rate-limited.
    pub fn malformed(&mut self) {
        self.refused("malformed packet from the far side");
    }

    /// Ends a connection. Bytes that the far side sent before are still written.
    fn drop_live(&mut self, token: Token, reset: bool) {
        let Some(Slot::Live(mut live)) = self.take(token) else { return };
        self.tokens.remove(&live.connection.ports());
        if live.queued {
            // Remove it now: while the far side receives nothing, the queue is not cleared.
            self.lanes[live.lane].senders.retain(|sender| *sender != token);
        }
        if reset && live.connection.is_known() {
            let header = live.connection.reset(self.traits.cids);
            self.answer(live.lane, Some(header));
        }
        live.stream.discard(&mut self.buffers);
        live.stream.flush();
        if !live.stream.is_flushed() {
            self.put(token, Slot::Draining { stream: live.stream, by_far: live.by_far });
        }
    }

    /// Handles a packet from the far side, which came by a lane; `payload` has the header's length.
    pub fn receive(&mut self, lane: usize, header: &Header, payload: &[u8]) {
        let Cids { near, far } = self.traits.cids;
        if header.source_cid != far || header.destination_cid != near || header.kind != STREAM {
            self.refused("packet of another guest or kind");
            return self.answer(lane, header.reset());
        }
        let ports = Ports { near: header.destination_port, far: header.source_port };
        let Some(&token) = self.tokens.get(&ports) else {
            if header.operation() == Some(Operation::Request) && self.open(header).is_some() {
                return;
            }
            return self.answer(lane, header.reset());
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
                        self.answer(lane, header.reset());
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
            Verdict::Accepted if !live.greeted => {}
            Verdict::Accepted => {
                let line = format!("OK {}\n", live.connection.ports().near);
                // Nothing has been written yet, so the line fits, unless the near program has disconnected.
                if live.stream.send(line.as_bytes()) < line.len() {
                    return self.drop_live(token, true);
                }
            }
            Verdict::Deliver => {
                let settled = live.stream.send(payload);
                live.connection.forward(settled);
            }
            Verdict::Shut => {
                if !live.connection.far_receives() {
                    live.stream.refuse(&mut self.buffers);
                }
                if !live.connection.far_sends() {
                    let settled = live.stream.finish();
                    live.connection.forward(settled);
                }
            }
            Verdict::Over { reset } => return self.drop_live(token, reset),
        }
        self.enqueue(token);
    }

    /// Opens a connection that the far side requests.
    fn open(&mut self, request: &Header) -> Option<()> {
        let (near, far) = (request.destination_port, request.source_port);
        if self.counts.all >= CONNECTIONS_MAX || self.counts.by_far >= self.traits.far_max {
            self.refused("too many connections from the far side");
            return None;
        }
        let socket = match self.front.connect(near, far) {
            Ok(socket) => socket,
            Err(error) => {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    self.refused("an unprivileged program of the guest connects to the host");
                }
                return None;
            }
        };
        let connection = Connection::from_far(request);
        let (lane, since) = (self.lane_of(near), Instant::now());
        let (by_far, greeted, queued) = (true, false, false);
        let slot = |stream| Slot::Live(Live { connection, stream, by_far, greeted, lane, queued, since });
        let token = self.add(socket, slot).ok()?;
        self.tokens.insert(connection.ports(), token);
        self.enqueue(token);
        Some(())
    }

    /// Returns whether a lane has a packet for the far side. Reads from near programs as far as the far side has credit.
    pub fn has_packet(&mut self, lane: usize) -> bool {
        let Lane { senders, answers } = &mut self.lanes[lane];
        if !answers.is_empty() {
            return true;
        }
        while let Some(token) = senders.front() {
            if let Some(Slot::Live(live)) = self.slots.get_mut(token) {
                live.stream.fill(live.connection.wants(), &mut self.buffers);
                if live.connection.next(live.stream.side(), usize::MAX).is_some() {
                    return true;
                }
                live.queued = false;
            }
            senders.pop_front();
        }
        false
    }

    /// Passes a lane's next packet to `write`, with at most `room` bytes of payload (at least one). Call it only after
    /// [`Device::has_packet`] has returned true.
    pub fn next_packet(&mut self, lane: usize, room: usize, write: impl FnOnce(&Header, &[u8])) {
        let Lane { senders, answers } = &mut self.lanes[lane];
        if let Some(header) = answers.pop_front() {
            return write(&header, &[]);
        }
        let Some(token) = senders.pop_front() else { return };
        let Some(Slot::Live(live)) = self.slots.get_mut(&token) else { return };
        let Some(packet) = live.connection.next(live.stream.side(), room) else {
            live.queued = false;
            return;
        };
        let header = live.connection.sent(packet, self.traits.cids);
        let length = packet.length as usize;
        write(&header, &live.stream.pending()[..length]);
        live.stream.consume(length, &mut self.buffers);
        if !live.connection.is_closing() {
            // Back to the end of the queue: each connection sends one packet in turn.
            self.lanes[lane].senders.push_back(token);
        } else if let Some(Slot::Live(live)) = self.take(token) {
            let Live { connection, by_far, lane, .. } = live;
            self.put(token, Slot::Closing { connection, by_far, lane, since: Instant::now() });
            self.start_timer();
        }
    }

    /// Ends all connections of a lane that the far side knew of, since its reset has ended them. Connections that it does not know of yet
    /// stay.
    pub fn far_reset(&mut self, lane: usize) {
        self.lanes[lane].answers.clear();
        let tokens: Vec<Token> = self.slots.keys().copied().collect();
        for token in tokens {
            match self.slots.get(&token) {
                Some(Slot::Live(live)) if live.lane == lane && live.connection.is_known() => {
                    self.drop_live(token, false);
                }
                Some(Slot::Closing { connection, lane: own, .. }) if *own == lane => {
                    self.tokens.remove(&connection.ports());
                    self.take(token);
                }
                _ => {}
            }
        }
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
            Err(error) => (self.traits.say)(format_args!("cannot set the vsock timer: {error}")),
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
            } else if let Some(Slot::Closing { connection, lane, .. }) = self.take(token) {
                self.tokens.remove(&connection.ports());
                self.answer(lane, Some(connection.reset(self.traits.cids)));
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
    fn by_far(&self) -> bool {
        match self {
            Slot::Greeting { .. } => false,
            Slot::Live(Live { by_far, .. }) => *by_far,
            Slot::Closing { by_far, .. } | Slot::Draining { by_far, .. } => *by_far,
        }
    }
}

#[cfg(test)]
mod tests;
