//! Keeps the agent running: starts it, and restarts it after a pause when it dies.

use std::process::Command;
use std::time::{Duration, Instant};

use nexus_schema::link::InitMode;
use rustix::process::{Pid, Signal, kill_process};

use super::Ended;
use crate::console::say;
use crate::os::reason;
use crate::role::BINARY;

/// The pause before the first restart; each further one is twice as long.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// An agent that ran this long is considered healthy.
const STEADY: Duration = Duration::from_secs(60);

/// The agent as its parent sees it.
enum State {
    Running {
        pid: Pid,
        since: Instant,
    },
    Pausing {
        until: Instant,
    },
    /// It exited because the guest is shutting down.
    Done,
}

/// Keeps one agent running.
pub(super) struct Keeper {
    word: &'static str,
    state: State,
    pause: Duration,
}

impl Keeper {
    /// Creates a keeper that has not started its agent yet.
    pub(super) fn new(init: InitMode) -> Self {
        let word = match init {
            InitMode::Agent => "agent",
            InitMode::System => "agent-beside",
        };
        Self { word, state: State::Pausing { until: Instant::now() }, pause: PAUSE_FIRST }
    }

    /// Starts the agent if it is time to.
    pub(super) fn start_if_due(&mut self) {
        let State::Pausing { until } = self.state else { return };
        if Instant::now() < until {
            return;
        }
        let started = Command::new(BINARY).arg(self.word).spawn();
        match started.map(|child| Pid::from_raw(child.id() as i32)) {
            Ok(Some(pid)) => self.state = State::Running { pid, since: Instant::now() },
            Ok(None) => self.wait_longer(),
            Err(error) => {
                say(format_args!("start the agent: {}", reason(&error)));
                self.wait_longer();
            }
        }
    }

    fn wait_longer(&mut self) {
        self.state = State::Pausing { until: Instant::now() + self.pause };
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// Returns how long there is nothing to do; `None` means until a signal arrives.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self.state {
            State::Pausing { until } => Some(until.saturating_duration_since(Instant::now())),
            State::Running { .. } | State::Done => None,
        }
    }

    /// Handles the end of a child, if it was the agent.
    pub(super) fn ended(&mut self, ended: Ended) {
        let State::Running { pid, since } = self.state else { return };
        if pid != ended.pid {
            return;
        }
        if ended.code == Some(0) {
            self.state = State::Done;
            return;
        }
        match (ended.code, ended.signal) {
            (Some(code), _) => say(format_args!("the agent ended with code {code}")),
            (None, Some(signal)) => say(format_args!("the agent was killed by signal {signal}")),
            (None, None) => say(format_args!("the agent ended")),
        }
        if since.elapsed() >= STEADY {
            self.pause = PAUSE_FIRST;
        }
        self.wait_longer();
    }

    /// Sends a signal to the agent, if it is running.
    pub(super) fn signal(&self, signal: Signal) {
        if let State::Running { pid, .. } = self.state {
            // It may have ended.
            let _ = kill_process(pid, signal);
        }
    }

    /// Returns whether the agent is running.
    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Returns whether the agent exited because the guest is shutting down.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }
}
