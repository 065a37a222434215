//! Looking for an answer for a moment before going to sleep for it: to wake a processor takes longer than many an answer,
//! on virtual machines above all. When it is worth it is judged as KVM judges it for its `halt_poll_ns`: by the last wait.

use std::io;
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// How long is looked; what took longer the last time is slept for.
const WINDOW: Duration = Duration::from_micros(250);
/// For how many turns the processor rests between two looks: about a microsecond.
const PAUSES: u32 = 40;

/// Whether a thread of this process looks: the others have work to do.
static LOOKING: AtomicBool = AtomicBool::new(false);
/// Whoever looks takes the only processor from whom it waits for.
static HAS_PROCESSORS: LazyLock<bool> =
    LazyLock::new(|| std::thread::available_parallelism().is_ok_and(|n| n.get() > 1));

/// Whether the answers of one peer are worth looking for.
#[derive(Debug, Default)]
pub struct BusyPoll {
    is_worth_it: bool,
}

impl BusyPoll {
    /// An answer came after so long.
    pub fn took(&mut self, wait: Duration) {
        self.is_worth_it = wait <= WINDOW;
    }

    /// Appends what comes from a socket within a moment; `None` if it is to be slept for. Keeps the calling thread for up to
    /// 250 µs, but lets others have the processor.
    pub fn receive(&self, socket: impl AsFd, buffer: &mut Vec<u8>) -> Option<io::Result<usize>> {
        self.look(|| match rustix::net::recv(&socket, spare_capacity(buffer), RecvFlags::DONTWAIT) {
            Ok((_, length)) => Some(Ok(length)),
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(error) => Some(Err(error.into())),
        })
    }

    /// The same for who reads in another way: ends as soon as there is something to be read.
    pub fn watch(&self, socket: impl AsFd) {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.look(|| {
            let mut sockets = [PollFd::new(&socket, PollFlags::IN)];
            (rustix::event::poll(&mut sockets, Some(&at_once)) != Ok(0)).then_some(())
        });
    }

    fn look<T>(&self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        if !self.is_worth_it || !*HAS_PROCESSORS || LOOKING.swap(true, Ordering::Acquire) {
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

/// Lets the other threads of the core work, then those that have no processor.
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

    /// One thread looks at a time, so one test does.
    #[test]
    fn only_what_came_soon_the_last_time_is_looked_for() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let mut poll = BusyPoll::default();
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
    }
}
