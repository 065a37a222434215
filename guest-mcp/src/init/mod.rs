//! PID 1 in init mode `agent`: a small init without tokio. It sets up the system, keeps the agent running, reaps all orphans,
//! and shuts the system down in order.
//!
//! ```text
//! set up ─> agent runs ──SIGUSR2, SIGUSR1, SIGTERM, SIGINT──> agent says bye ─> SIGTERM to all ─> SIGKILL ─> sync, unmount ─> reboot
//!              ^   │ ends
//!              └───┘ started again, after a pause
//! ```
//! The signals are BusyBox's: SIGUSR2 powers off, SIGUSR1 halts, SIGTERM reboots. Ctrl-Alt-Del sends SIGINT; only the host can
//! press that, in order to stop the VM, so it powers off.

mod down;
mod keeper;
mod setup;

pub(crate) mod power;

use std::convert::Infallible;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nexus_schema::link::{ByeReason, InitMode};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, WaitOptions};

use self::keeper::Keeper;
use crate::console;

/// Why PID 1 cannot work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// Signals cannot be received.
    #[error("receive signals")]
    Signals(#[source] Errno),
}

/// Runs as PID 1. Returns only after a failure.
pub(crate) fn live() -> Result<Infallible, InitError> {
    let mut signals =
        Signals::catch(&[Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR])?;
    setup::set_up();
    let mut keeper = Keeper::new(InitMode::Agent);
    loop {
        keeper.start_if_due();
        let reason = match signals.wait(keeper.pause())? {
            Some(Signal::SIGTERM) => ByeReason::Reboot,
            Some(Signal::SIGUSR1 | Signal::SIGUSR2 | Signal::SIGINT | Signal::SIGPWR) => ByeReason::Poweroff,
            Some(_) | None => {
                while let Some(Some(pid)) = reap() {
                    keeper.ended(pid);
                }
                continue;
            }
        };
        down::take_down(&mut signals, &mut keeper, reason);
    }
}

/// Keeps an agent running beside the image's own init, until it is told to stop.
pub(crate) fn supervise() -> ExitCode {
    let mut signals = match Signals::catch(&[Signal::SIGTERM]) {
        Ok(signals) => signals,
        Err(error) => {
            console::say(format_args!("cannot supervise the agent: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let mut keeper = Keeper::new(InitMode::System);
    let mut leaving = None;
    loop {
        if leaving.is_none() {
            keeper.start_if_due();
        }
        let pause = leaving
            .map_or(keeper.pause(), |until: Instant| Some(until.saturating_duration_since(Instant::now())));
        let signal = signals.wait(pause);
        while let Some(Some(pid)) = reap() {
            keeper.ended(pid);
        }
        match signal {
            Ok(Some(Signal::SIGTERM)) => {
                keeper.signal(rustix::process::Signal::TERM);
                leaving.get_or_insert(Instant::now() + down::AGENT_TIMEOUT);
            }
            Ok(_) => {}
            Err(_) => return ExitCode::FAILURE,
        }
        if keeper.is_done() || leaving.is_some_and(|until| !keeper.is_running() || Instant::now() >= until) {
            return ExitCode::SUCCESS;
        }
    }
}

/// The signals to wait for, including SIGCHLD.
struct Signals {
    fd: SignalFd,
}

impl Signals {
    fn catch(wanted: &[Signal]) -> Result<Self, InitError> {
        let mut set: SigSet = wanted.iter().copied().collect();
        set.add(Signal::SIGCHLD);
        set.thread_block().map_err(InitError::Signals)?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Self { fd: fd.map_err(InitError::Signals)? })
    }

    /// Waits for the next signal, at most for `most`.
    fn wait(&mut self, most: Option<Duration>) -> Result<Option<Signal>, InitError> {
        let timeout = most.map_or(PollTimeout::NONE, |most| {
            // Rounded up, so that a pause is over when this returns.
            PollTimeout::try_from(most.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&self.fd), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(InitError::Signals(error)),
        }
        let caught = self.fd.read_signal().map_err(InitError::Signals)?;
        Ok(caught.and_then(|info| Signal::try_from(info.ssi_signo as i32).ok()))
    }
}

/// Reaps one child that has ended: `Some(None)` if none has, `None` if there are no children.
fn reap() -> Option<Option<Ended>> {
    match rustix::process::wait(WaitOptions::NOHANG) {
        Ok(Some((pid, status))) => {
            Some(Some(Ended { pid, code: status.exit_status(), signal: status.terminating_signal() }))
        }
        Ok(None) | Err(rustix::io::Errno::INTR) => Some(None),
        Err(_) => None,
    }
}

/// A child that has ended.
#[derive(Debug, Clone, Copy)]
struct Ended {
    pid: Pid,
    code: Option<i32>,
    signal: Option<i32>,
}
