//! Busy-polls for an answer for a moment before blocking, because waking a processor often takes longer than the answer,
//! especially on virtual machines. As with KVM's `halt_poll_ns`, the last wait decides whether to poll.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// How long to poll. If the last answer took longer, the caller blocks at once.
const WINDOW: Duration = Duration::from_micros(250);
/// How many pause instructions there are between two polls: about a microsecond.
const PAUSES: u32 = 40;

/// Time without polling after another peer was active: polling would delay the others.
const ALONE: Duration = Duration::from_millis(2);

/// Whether a thread of this process is polling; the other threads need their processors.
static LOOKING: AtomicBool = AtomicBool::new(false);
/// Whether polling is disabled in this process.
static NEVER: AtomicBool = AtomicBool::new(false);
/// On a single processor, polling would take it away from the peer.
static HAS_PROCESSORS: LazyLock<bool> =
    LazyLock::new(|| std::thread::available_parallelism().is_ok_and(|n| n.get() > 1));

/// Disables polling in this process: callers block at once.
pub fn never() {
    NEVER.store(true, Ordering::Relaxed);
}

/// Peers of one kind. They are polled only while a single one of them is active.
#[derive(Debug)]
pub struct Crowd {
    next: AtomicU64,
    /// The peer that was active last, and until when it counts as sharing the time with the one before.
    last: Mutex<(u64, Option<Instant>)>,
}

impl Crowd {
    /// No peers yet.
    pub const fn new() -> Self {
        Self { next: AtomicU64::new(1), last: Mutex::new((0, None)) }
    }

    /// Records activity of a peer; returns whether it has been the only one for a while.
    fn is_alone(&self, peer: u64) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0 != peer {
            *last = (peer, (last.0 != 0).then(|| Instant::now() + ALONE));
        }
        if last.1.is_some_and(|until| until <= Instant::now()) {
            last.1 = None;
        }
        last.1.is_none()
    }
}

impl Default for Crowd {
    fn default() -> Self {
        Self::new()
    }
}

/// Decides whether to poll for the answers of one peer.
#[derive(Debug)]
pub struct BusyPoll {
    crowd: &'static Crowd,
    peer: u64,
    is_worth_it: bool,
}

impl BusyPoll {
    /// Adds another peer of this kind.
    pub fn of(crowd: &'static Crowd) -> Self {
        Self { crowd, peer: crowd.next.fetch_add(1, Ordering::Relaxed), is_worth_it: false }
    }

    /// Records how long an answer took.
    pub fn took(&mut self, wait: Duration) {
        self.is_worth_it = wait <= WINDOW;
    }

    /// Appends what arrives from a socket within a moment; `None` if the caller should block instead. Occupies the calling
    /// thread for up to 250 µs, but yields the processor to others.
    pub fn receive(&self, socket: impl AsFd, buffer: &mut Vec<u8>) -> Option<io::Result<usize>> {
        self.look(|| match rustix::net::recv(&socket, spare_capacity(buffer), RecvFlags::DONTWAIT) {
            Ok((_, length)) => Some(Ok(length)),
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(error) => Some(Err(error.into())),
        })
    }

    /// The same for callers that read in another way: returns as soon as there is something to read.
    pub fn watch(&self, socket: impl AsFd) {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.look(|| {
            let mut sockets = [PollFd::new(&socket, PollFlags::IN)];
            (rustix::event::poll(&mut sockets, Some(&at_once)) != Ok(0)).then_some(())
        });
    }

    fn look<T>(&self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        let is_alone = self.crowd.is_alone(self.peer);
        let may = *HAS_PROCESSORS && !NEVER.load(Ordering::Relaxed);
        if !is_alone || !self.is_worth_it || !may || LOOKING.swap(true, Ordering::Acquire) {
            return None;
        }
        let start = Instant::now();
        let found = loop {
            let found = find();
            if found.is_some() || start.elapsed() >= WINDOW {
                break found;
            }
            pause();
        };
        LOOKING.store(false, Ordering::Release);
        found
    }
}

/// Yields to other threads of the core, then to those without a processor.
fn pause() {
    for _ in 0..PAUSES {
        std::hint::spin_loop();
    }
    rustix::thread::sched_yield();
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Only one thread polls at a time, so this is one test.
    #[test]
    fn only_what_came_soon_the_last_time_is_looked_for() {
        let (mut near, far) = UnixStream::pair().unwrap();
        static CROWD: Crowd = Crowd::new();
        let mut poll = BusyPoll::of(&CROWD);
        let mut buffer = Vec::with_capacity(100);
        near.write_all(b"one").unwrap();
        assert!(poll.receive(&far, &mut buffer).is_none(), "nothing is known of the peer yet");

        poll.took(Duration::from_micros(20));
        assert_eq!(poll.receive(&far, &mut buffer).unwrap().unwrap(), 3);
        assert_eq!(buffer, b"one");
        assert!(poll.receive(&far, &mut buffer).is_none(), "it ends when nothing comes");

        near.write_all(b"two").unwrap();
        poll.took(Duration::from_secs(1));
        assert!(poll.receive(&far, &mut buffer).is_none());

        poll.took(Duration::ZERO);
        poll.watch(&far);
        near.write_all(b"!").unwrap();
        poll.watch(&far);
        drop(near);
        assert_eq!(poll.receive(&far, &mut buffer).unwrap().unwrap(), 4);
        assert_eq!(poll.receive(&far, &mut buffer).unwrap().unwrap(), 0, "the peer is gone");

        // Another peer is active: nobody is polled until one has been alone for a while.
        let mut other = BusyPoll::of(&CROWD);
        other.took(Duration::ZERO);
        assert!(other.receive(&far, &mut buffer).is_none());
        while other.receive(&far, &mut buffer).is_none() {
            std::thread::yield_now();
        }
        assert!(poll.receive(&far, &mut buffer).is_none());
    }
}
