//! Copies a VMM's output from its pipe to a log, in a separate thread, so that a busy shim does not block the guest.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::say;
use crate::vmm::log::LogWriter;
use crate::vmm::process::set_nonblocking;

/// Stack size of the thread, in bytes. Untouched pages cost nothing.
const STACK: usize = 64 << 10;
const CHUNK: usize = 16 << 10;
/// Maximum number of bytes that are still read from a pipe after the VMM has ended: more than a pipe holds.
const LAST_MAX: usize = 2 << 20;

/// A log that several pumps may write to.
pub(super) type SharedLog = Arc<Mutex<LogWriter>>;

/// A running pump.
pub(super) struct Pump {
    thread: JoinHandle<()>,
    stop: OwnedFd,
}

impl Pump {
    pub(super) fn start(
        name: &str,
        pipe: impl Read + AsFd + Send + 'static,
        log: SharedLog,
    ) -> io::Result<Self> {
        set_nonblocking(&pipe)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK)
            .spawn(move || pump(pipe, &log, &stopped))?;
        Ok(Self { thread, stop })
    }

    /// Drains the pipe and ends the thread, even if an orphaned child of the VMM still holds the other end.
    pub(super) fn finish(self) {
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            say(&format!("cannot stop a log: {error}"));
        }
        if self.thread.join().is_err() {
            say("a log's thread panicked");
        }
    }
}

fn pump(mut pipe: impl Read + AsFd, log: &SharedLog, stop: &OwnedFd) {
    let mut chunk = vec![0; CHUNK];
    let mut complained = false;
    let mut last = None;
    loop {
        match pipe.read(&mut chunk) {
            Ok(0) => return,
            Ok(read) => {
                // On a full disk, lines of the console are lost; the guest keeps running.
                let written = log.lock().unwrap_or_else(PoisonError::into_inner).write(&chunk[..read]);
                if let Err(error) = written
                    && !std::mem::replace(&mut complained, true)
                {
                    say(&format!("cannot write a log: {error}"));
                }
                if let Some(left) = &mut last {
                    if *left < read {
                        return;
                    }
                    *left -= read;
                }
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                say(&format!("cannot read the VMM's output: {error}"));
                return;
            }
        }
        if last.is_some() {
            return;
        }
        let mut fds = [PollFd::new(&pipe, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => last = Some(LAST_MAX),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                say(&format!("cannot wait for the VMM's output: {error}"));
                return;
            }
        }
    }
}
