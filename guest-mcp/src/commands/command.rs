//! One command from its start to its end.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::error::ErrorCode;
use nexus_schema::id::CommandId;
use nexus_schema::tools::command::{CommandEntry, CommandState, Descendants, LogFacts};
use nexus_schema::{Timestamp, ToolError};
use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::attach::Sink;
use super::kept::Kept;
use super::launch::Started;
use super::oom;
use super::reading::{self, Log};
use super::streams::End;
use super::table::Table;
use super::tree::Tree;

/// Timeout for a process to exit after it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a command waits for its reader before output is dropped anyway.
const READER_TIMEOUT: Duration = Duration::from_secs(120);

/// The limits of a command.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    /// Its timeout, after which it is killed; `None`: none.
    pub(super) timeout: Option<Duration>,
    /// The time between SIGTERM and SIGKILL after the timeout.
    pub(super) grace: Duration,
    /// Whether processes that it leaves running are killed when it ends.
    pub(super) kill_descendants: bool,
    /// How much output of each stream is kept, in bytes.
    pub(super) keep: usize,
    /// Whether it waits for its reader instead of dropping output.
    pub(super) lossless: bool,
}

/// One of a command's output streams.
#[derive(Debug)]
pub(super) struct Stream {
    kept: Mutex<Kept>,
    /// Our end of the pipe or terminal; `None` once the stream has ended.
    end: Mutex<Option<End>>,
    /// The offset up to which the reader has read. `is_paced` says whether the command waits for it.
    read: watch::Sender<u64>,
    is_paced: AtomicBool,
}

impl Stream {
    fn new(limits: &Limits, end: Option<End>) -> Self {
        let kept = if limits.lossless { Kept::newest(limits.keep) } else { Kept::new(limits.keep) };
        Self {
            kept: Mutex::new(kept),
            end: Mutex::new(end),
            read: watch::Sender::new(0),
            is_paced: AtomicBool::new(limits.lossless),
        }
    }

    fn end(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the kept output.
    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.end().is_none()
    }

    pub(super) fn close(&self) {
        self.end().take();
        self.kept().end();
        // Tasks that wait for a reader's progress must also notice the end.
        self.read.send_modify(|_| {});
    }

    /// Waits until the reader has everything that was written so far, or until the stream has ended.
    pub(super) async fn caught_up(&self) {
        let unread = self.end().as_ref().map_or(0, End::unread);
        let target = self.kept().total() + unread;
        let mut read = self.read.subscribe();
        // The sender lives as long as `self`.
        let _ = read.wait_for(|read| self.is_closed() || *read >= target).await;
    }

    /// Returns whether the command has written something that was not read yet.
    pub(super) fn has_unread(&self) -> bool {
        self.end().as_ref().is_some_and(|end| end.unread() > 0)
    }

    /// Records that a reader has everything before `offset`.
    pub(super) fn was_read(&self, offset: u64) {
        self.read.send_if_modified(|read| std::mem::replace(read, (*read).max(offset)) < offset);
    }

    /// Returns whether the command is blocked because its output is not read.
    pub(super) fn is_full(&self, keep: usize) -> bool {
        let unread = self.kept().total().saturating_sub(*self.read.borrow());
        self.is_paced.load(Ordering::Acquire) && unread >= keep as u64
    }

    /// Waits until there is room for more output, and returns how much. After [`READER_TIMEOUT`] it stops waiting for readers for good.
    pub(super) async fn room(&self, keep: usize) -> usize {
        let unread = |read: &u64| self.kept().total().saturating_sub(*read) as usize;
        if !self.is_paced.load(Ordering::Acquire) {
            return usize::MAX;
        }
        let mut read = self.read.subscribe();
        let room =
            async { read.wait_for(|read| unread(read) < keep).await.map_or(0, |read| keep - unread(&read)) };
        match tokio::time::timeout(READER_TIMEOUT, room).await {
            Ok(room @ 1..) => room,
            Ok(0) | Err(_) => {
                self.is_paced.store(false, Ordering::Release);
                usize::MAX
            }
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Ending {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) timed_out: bool,
    pub(super) duration: Duration,
    pub(super) oom_killed: Vec<String>,
    /// The processes that it left running, as last seen.
    pub(super) left: Descendants,
}

impl Ending {
    /// Returns the exit status as a shell reports it.
    pub(super) fn status(&self) -> u8 {
        match (self.code, self.signal) {
            (Some(code), _) => (code & 0xff) as u8,
            (None, Some(signal)) => u8::try_from(signal).unwrap_or(127).saturating_add(128),
            (None, None) => u8::MAX,
        }
    }
}

/// Who started a command.
#[derive(Debug, Clone, Default)]
pub(super) struct Whose {
    /// The client, if one started it.
    pub(super) client: Option<String>,
    /// The name of the service, if it is one.
    pub(super) service: Option<String>,
    /// Whether the call that starts it waits for its end.
    pub(super) is_waited_for: bool,
}

/// A command.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) id: CommandId,
    pub(super) line: String,
    pub(super) whose: Whose,
    pub(super) user: String,
    pub(super) cwd: String,
    pub(super) begun_at: SystemTime,
    pub(super) begun: Instant,
    /// Standard output and standard error.
    pub(super) streams: [Stream; 2],
    pub(super) log: Option<Log>,
    /// Our end of its terminal.
    pub(super) terminal: Option<End>,
    /// Our end of its standard input; `None` once that is closed.
    pub(super) input: tokio::sync::Mutex<Option<End>>,
    /// The client that gets every byte of its output; the command waits for it. Locked before the kept output.
    pub(super) exact: Mutex<Option<Arc<Sink>>>,
    pub(super) tree: Tree,
    pub(super) limits: Limits,
    /// The index of the stream that was written to last.
    pub(super) newest: AtomicU8,
    /// The number of bytes of output so far, including dropped ones.
    pub(super) seen: AtomicU64,
    /// Whether a reply contained all of its output, so that it can be forgotten sooner.
    pub(super) is_delivered: AtomicBool,
    /// Whether a call has sent it a signal that ends it.
    pub(super) was_told_to_end: AtomicBool,
    /// Whether the call that started it still waits for its end, which is not announced then.
    pub(super) is_waited_for: AtomicBool,
    /// Whether it is no longer in the table.
    pub(super) is_forgotten: AtomicBool,
    ending: Mutex<Option<Ending>>,
    ended_at: Mutex<Option<Instant>>,
    /// Whether `ending` is there. Apart from `changed`, so that those who wait for the end are not woken by each piece of output.
    over: watch::Sender<bool>,
    /// Incremented by every change.
    changed: watch::Sender<u64>,
}

impl Command {
    /// Supervises a started command until it ends.
    pub(super) fn live(
        table: &Arc<Table>,
        id: CommandId,
        whose: Whose,
        started: Started,
        limits: Limits,
        stdin_open: bool,
        memory: oom::Before,
    ) -> Arc<Self> {
        let Started { child, tree, line, cwd, user, ends, input, held, log } = started;
        let terminal = ends.stdin.clone().filter(End::is_terminal);
        let stdin_open = stdin_open || terminal.is_some();
        let is_waited_for = whose.is_waited_for;
        let command = Arc::new(Self {
            id,
            line,
            whose,
            user,
            cwd,
            begun_at: SystemTime::now(),
            begun: Instant::now(),
            streams: [
                Stream::new(&limits, Some(ends.stdout.clone())),
                Stream::new(&limits, ends.stderr.clone()),
            ],
            log: log.map(Log::new),
            terminal,
            input: tokio::sync::Mutex::new(ends.stdin),
            exact: Mutex::default(),
            tree,
            limits,
            newest: AtomicU8::new(0),
            seen: AtomicU64::new(0),
            is_delivered: AtomicBool::new(false),
            was_told_to_end: AtomicBool::new(false),
            is_waited_for: AtomicBool::new(is_waited_for),
            is_forgotten: AtomicBool::new(false),
            ending: Mutex::default(),
            ended_at: Mutex::default(),
            over: watch::Sender::new(false),
            changed: watch::Sender::new(0),
        });
        table.add(&command);
        for (at, end) in [(0, Some(ends.stdout)), (1, ends.stderr)] {
            if let Some(end) = end {
                tokio::spawn(reading::read(end, command.clone(), at, table.clone()));
            }
        }
        if let Some(input) = input {
            tokio::spawn(feed(command.clone(), input, held, stdin_open));
        }
        tokio::spawn(watch_over(child, command.clone(), table.clone(), memory));
        command
    }

    /// Returns the client that gets every byte of its output.
    pub(super) fn exact(&self) -> MutexGuard<'_, Option<Arc<Sink>>> {
        self.exact.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notifies all waiting tasks of a change.
    pub(super) fn changed(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Watches for changes.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns how it ended, if it has.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when it ended.
    pub(super) fn ended_at(&self) -> Option<Instant> {
        *self.ended_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether its main process is running.
    pub(super) fn is_running(&self) -> bool {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Waits until it has ended.
    pub(super) async fn ended(&self) {
        let mut over = self.over.subscribe();
        // The sender lives as long as `self`.
        let _ = over.wait_for(|over| *over).await;
    }

    /// Kills all its processes.
    pub(super) async fn kill(self: &Arc<Self>) {
        self.tree.signal_group(Signal::KILL);
        // Without another thread, because there may be no memory for one.
        if self.tree.kill_at_once() {
            return;
        }
        let this = self.clone();
        // Searching for its processes may take a moment on a busy machine.
        let _ = tokio::task::spawn_blocking(move || this.tree.kill()).await;
    }

    /// Kills all its processes, and waits until it has ended.
    pub(super) async fn kill_to_the_end(self: &Arc<Self>) -> Result<(), ToolError> {
        let gone = tokio::time::timeout(KILL_TIMEOUT, async {
            self.kill().await;
            self.ended().await;
        });
        gone.await.map_err(|_| {
            ToolError::new(ErrorCode::Timeout, "the command hangs in the kernel and could not be killed")
        })
    }

    /// Sends a signal: to its process group while it is running, afterwards to all processes that are left.
    pub(super) async fn signal(self: &Arc<Self>, signal: Signal) {
        if signal == Signal::KILL {
            return self.kill().await;
        }
        if self.is_running() {
            return self.tree.signal_group(signal);
        }
        let this = self.clone();
        let _ = tokio::task::spawn_blocking(move || this.tree.signal_all(signal)).await;
    }

    /// Returns the processes that it left running, as of now.
    pub(super) async fn left(self: &Arc<Self>) -> Option<Descendants> {
        let ending = self.ending()?;
        if ending.left.count == 0 {
            return None;
        }
        let left = self.look_for_left().await;
        if let Some(ending) = &mut *self.ending.lock().unwrap_or_else(PoisonError::into_inner) {
            ending.left = left.clone();
        }
        if left.count == 0 {
            self.tree.release();
        }
        (left.count > 0).then_some(left)
    }

    async fn look_for_left(self: &Arc<Self>) -> Descendants {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.tree.left()).await.unwrap_or_default()
    }

    /// Returns the state of the file that gets all output.
    pub(super) fn log_facts(&self) -> Option<LogFacts> {
        self.log.as_ref().map(Log::facts)
    }

    /// Returns its entry in lists.
    pub(super) fn entry(&self) -> CommandEntry {
        let ending = self.ending();
        let duration = ending.as_ref().map_or_else(|| self.begun.elapsed(), |ending| ending.duration);
        CommandEntry {
            command_id: self.id,
            command: self.line.clone(),
            client: self.whose.client.clone(),
            service: self.whose.service.clone(),
            started_at: Timestamp::from(self.begun_at),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            pid: self.tree.root().as_raw_nonzero().get().cast_unsigned(),
            tty: self.terminal.is_some(),
            state: if ending.is_some() { CommandState::Ended } else { CommandState::Running },
            status: ending.as_ref().map(Ending::status),
            timed_out: ending.as_ref().is_some_and(|ending| ending.timed_out),
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            output_bytes: self.streams.iter().map(|stream| stream.kept().total()).sum(),
            descendants: ending.map(|ending| ending.left).filter(|left| left.count > 0),
            problem: None,
        }
    }
}

/// Waits for a command's process, kills it after its timeout, and records how it ended.
async fn watch_over(mut child: Child, command: Arc<Command>, table: Arc<Table>, memory: oom::Before) {
    let limits = command.limits;
    let time_is_up = async {
        match limits.timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut timed_out = false;
    let status = tokio::select! {
        // If it ends at the same moment as the timeout, it counts as ended in time.
        biased;
        status = child.wait() => status,
        () = time_is_up => {
            timed_out = true;
            let ended = if limits.grace.is_zero() {
                None
            } else {
                command.tree.signal_group(Signal::TERM);
                let this = command.clone();
                let _ = tokio::task::spawn_blocking(move || this.tree.signal_all(Signal::TERM)).await;
                tokio::time::timeout(limits.grace, child.wait()).await.ok()
            };
            match ended {
                // Processes that ignored SIGTERM are killed too.
                Some(status) => {
                    command.tree.reaped();
                    command.kill().await;
                    status
                }
                None => {
                    command.kill().await;
                    child.wait().await
                }
            }
        }
    };
    command.tree.reaped();
    let duration = command.begun.elapsed();
    // This fails only if something else has reaped the process; then there is no exit status.
    let status = status.unwrap_or_else(|_: std::io::Error| ExitStatus::default());
    // A signal that was asked for ends the whole command, if it ends its main process.
    let was_ended = status.signal().is_some() && command.was_told_to_end.load(Ordering::Acquire);
    if limits.kill_descendants || was_ended {
        command.kill().await;
    }
    reading::drain(&command).await;
    let oom_killed = memory.killed_since().await;
    let left = command.look_for_left().await;
    if left.count == 0 {
        command.tree.release();
        // If input is being written, that task closes it.
        if let Ok(mut input) = command.input.try_lock() {
            *input = None;
        }
    }
    let ending =
        Ending { code: status.code(), signal: status.signal(), timed_out, duration, oom_killed, left };
    *command.ended_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    *command.ending.lock().unwrap_or_else(PoisonError::into_inner) = Some(ending);
    command.over.send_replace(true);
    command.changed();
    table.ended(&command);
}

/// Writes the input from the start of a command. A command that does not read it is not an error.
async fn feed(command: Arc<Command>, bytes: Vec<u8>, _held: Option<OwnedSemaphorePermit>, stays_open: bool) {
    let mut input = command.input.lock().await;
    let Some(end) = input.as_ref() else { return };
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let written = tokio::select! {
            written = end.write(rest) => written,
            () = command.ended() => break,
        };
        match written {
            Ok(written) => rest = &rest[written..],
            Err(_) => break,
        }
    }
    if !stays_open {
        *input = None;
    }
}
