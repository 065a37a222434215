//! The table of all commands. It finds and forgets commands, and limits how much of their output is kept in total.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::id::CommandId;
use nexus_schema::link::CommandEnded;
use nexus_schema::tools::command::{CommandEntry, CommandState};
use rustix::process::Signal;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};

use super::command::{Command, Stream};
use super::kept::Kept;
use super::mcp::{MCP_DIRECTORY, Server};
use super::tree;
use crate::console::say;
use crate::os::{read_small, reason, uptime};

/// The maximum number of running commands.
const RUNNING_MAX: usize = 1024;
/// The maximum number of ended commands that are remembered.
const ENDED_MAX: usize = 256;
/// The maximum number of lost commands that are reported.
const LOST_MAX: usize = 100;
/// How long an ended command is remembered.
const AGE_MAX: Duration = Duration::from_secs(3600);
/// The same, if a reply contained all of its output.
const AGE_DELIVERED: Duration = Duration::from_secs(300);
/// The maximum number of ends of commands that wait to be announced.
const ENDS_MAX: usize = 64;
/// The interval of checks for commands to forget.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// The bounds of all kept output, in bytes; within them it is 1/16 of the memory.
const KEPT_BOUNDS: (u64, u64) = (8 << 20, 64 << 20);
/// What a stream of a running command may always keep, in bytes.
const KEPT_ALWAYS: usize = 16 << 10;
/// The maximum size of the input of all commands that is not written to them yet, in bytes.
const INPUT_MAX: usize = 64 << 20;

/// All commands of a boot.
#[derive(Debug)]
pub(crate) struct Table {
    /// The directory with a record of each running command, for a later holder.
    directory: PathBuf,
    pub(super) in_vm: bool,
    boot: u32,
    kept_max: usize,
    kept: AtomicUsize,
    /// How many bytes of input may still be held.
    input: Arc<Semaphore>,
    /// Whether the VM is shutting down, so that no service is restarted.
    closing: AtomicBool,
    inner: Mutex<Inner>,
    /// The ends of commands that no call was waiting for.
    ends: broadcast::Sender<CommandEnded>,
}

#[derive(Debug, Default)]
struct Inner {
    /// In the order of their start.
    commands: Vec<Arc<Command>>,
    /// The lost commands of an earlier holder.
    lost: Vec<CommandEntry>,
    last: u32,
    /// The names of supervised services.
    services: BTreeSet<String>,
    /// The image's MCP servers that were used.
    servers: BTreeMap<String, Arc<Server>>,
}

impl Table {
    /// Creates a table with its records in `directory`. Reports the commands that an earlier holder left there, and kills their processes.
    pub(crate) fn new(directory: PathBuf, in_vm: bool) -> Arc<Self> {
        let id = if in_vm { "/proc/sys/kernel/random/boot_id" } else { "/proc/sys/kernel/random/uuid" };
        let boot = read_small(id, 64).unwrap_or_default();
        let boot = boot.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(2).max(2);
        let system = rustix::system::sysinfo();
        let memory = system.totalram.saturating_mul(u64::from(system.mem_unit.max(1)));
        let kept_max = (memory / 16).clamp(KEPT_BOUNDS.0, KEPT_BOUNDS.1) as usize;
        let lost = lost(&directory);
        for entry in &lost {
            tree::kill_left_behind(&entry.command_id.to_string());
        }
        let inner = Mutex::new(Inner { lost, ..Inner::default() });
        let table = Arc::new(Self {
            directory,
            in_vm,
            boot,
            kept_max,
            kept: AtomicUsize::new(0),
            input: Arc::new(Semaphore::new(INPUT_MAX)),
            closing: AtomicBool::new(false),
            inner,
            ends: broadcast::Sender::new(ENDS_MAX),
        });
        let weak = Arc::downgrade(&table);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PRUNE_EVERY).await;
                let Some(table) = weak.upgrade() else { return };
                table.prune(&mut table.inner());
            }
        });
        table
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a new id; fails if too many commands are running.
    pub(super) fn new_id(&self) -> Result<CommandId, ToolError> {
        let mut inner = self.inner();
        let running = inner.commands.iter().filter(|command| command.is_running()).count();
        if running >= RUNNING_MAX {
            let text = format!("{RUNNING_MAX} commands are already running in this VM");
            return Err(ToolError::new(ErrorCode::CommandFailed, text)
                .hint("wait for some to end, or end some: see command_list and command_signal"));
        }
        // After a restart of the holder, new ids must be higher than all earlier ones.
        let ticks = u32::try_from(uptime().as_millis() / 64 % u128::from(u32::MAX)).unwrap_or(0);
        inner.last = ticks.max(inner.last.wrapping_add(1));
        CommandId::of_boot(self.boot, inner.last)
            .ok_or_else(|| crate::tools::agent_failed("there is no id left for a command"))
    }

    /// Adds a started command.
    pub(super) fn add(&self, command: &Arc<Command>) {
        let record = serde_json::to_vec(&command.entry()).unwrap_or_default();
        if let Err(error) = std::fs::write(self.record(command.id), record) {
            say(format_args!("record the command {}: {}", command.id, reason(&error)));
        }
        let mut inner = self.inner();
        inner.commands.push(command.clone());
        self.prune(&mut inner);
    }

    /// Handles the end of a command.
    pub(super) fn ended(&self, command: &Command) {
        // It is missing if writing it failed.
        let _ = std::fs::remove_file(self.record(command.id));
        self.prune(&mut self.inner());
        if !command.is_waited_for.load(Ordering::SeqCst) {
            let entry = command.entry();
            let (status, duration_ms) = (entry.status.unwrap_or(u8::MAX), entry.duration_ms);
            // Without an agent, nobody hears it.
            let _ = self.ends.send(CommandEnded { command_id: command.id, status, duration_ms });
        }
    }

    /// Hears of the ends of commands that no call was waiting for.
    pub(crate) fn ends(&self) -> broadcast::Receiver<CommandEnded> {
        self.ends.subscribe()
    }

    fn record(&self, id: CommandId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Returns the command with an id.
    pub(super) fn find(&self, id: CommandId) -> Result<Arc<Command>, ToolError> {
        let inner = self.inner();
        if let Some(command) = inner.commands.iter().find(|command| command.id == id) {
            return Ok(command.clone());
        }
        let lost = inner.lost.iter().any(|entry| entry.command_id == id);
        let text = if lost {
            format!("the command {id} is lost: {LOST}")
        } else if id.is_of_boot(self.boot) {
            format!("no command {id}, or it ended too long ago")
        } else {
            format!(
                "the command {id} is from another boot or another VM: a restart of the VM ends its commands"
            )
        };
        Err(ToolError::new(ErrorCode::CommandNotFound, text).hint("command_list shows the existing commands"))
    }

    /// Returns all commands: the running ones first, then the newest first.
    pub(super) fn list(&self) -> Vec<CommandEntry> {
        let mut inner = self.inner();
        self.prune(&mut inner);
        let mut list: Vec<_> = inner.commands.iter().map(|command| command.entry()).collect();
        list.extend(inner.lost.iter().cloned());
        list.reverse();
        list.sort_by_key(|entry| entry.state != CommandState::Running);
        list
    }

    /// Waits until no command runs.
    pub(crate) async fn all_ended(&self) {
        loop {
            let running = self.inner().commands.iter().find(|command| command.is_running()).cloned();
            match running {
                Some(command) => command.ended().await,
                None => return,
            }
        }
    }

    /// Records that a service is supervised; returns false if it already was.
    pub(super) fn is_new_service(&self, name: &str) -> bool {
        self.inner().services.insert(name.to_owned())
    }

    /// Returns an MCP server of the image.
    pub(super) fn server(&self, name: &str) -> Arc<Server> {
        self.inner().servers.entry(name.to_owned()).or_default().clone()
    }

    /// Returns the directory of the image's MCP server files.
    pub(super) fn mcp_directory(&self) -> PathBuf {
        if self.in_vm { MCP_DIRECTORY.into() } else { self.directory.with_file_name("mcp.d") }
    }

    /// Forgets an ended command.
    pub(super) fn forget(&self, command: &Arc<Command>) {
        command.is_forgotten.store(true, Ordering::Release);
        self.inner().commands.retain(|other| !Arc::ptr_eq(other, command));
        self.give_back(command, 0);
    }

    /// Returns whether the VM is shutting down.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Handles the VM's shutdown: hangs up all terminals, and stops restarting services.
    pub(crate) fn go_down(&self) {
        self.closing.store(true, Ordering::Release);
        for command in self.inner().commands.iter().filter(|command| command.terminal.is_some()) {
            command.tree.signal_group(Signal::HUP);
        }
    }

    /// Kills all commands and the processes that they left behind.
    pub(crate) async fn kill_all(&self) {
        let commands = self.inner().commands.clone();
        for command in &commands {
            if command.is_running() || command.left().await.is_some() {
                command.kill().await;
            }
        }
        for command in &commands {
            // A process that hangs in the kernel cannot be killed.
            let _ = command.kill_to_the_end().await;
        }
    }

    /// Looks again what ended commands left running: it ends without a word.
    pub(super) async fn look_at_left(&self) {
        let commands = self.inner().commands.clone();
        for command in &commands {
            command.left().await;
        }
    }

    /// Counts input that is not written to a command yet, in bytes, until the result is dropped. Fails if commands have too much of it already.
    pub(super) fn hold_input(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ToolError> {
        let count = u32::try_from(bytes).ok();
        count.and_then(|count| self.input.clone().try_acquire_many_owned(count).ok()).ok_or_else(|| {
            let text = "the commands of this VM have too much input that they have not read yet";
            ToolError::new(ErrorCode::TooLarge, text)
                .hint("write it to a file and give stdin_path, or end commands that do not read their input")
        })
    }

    /// Keeps output of a stream, which `add` adds, as far as there is room.
    pub(super) fn keep(&self, stream: &Stream, add: impl FnOnce(&mut Kept)) {
        let (before, after) = {
            let mut kept = stream.kept();
            let before = kept.len();
            add(&mut kept);
            (before, kept.len())
        };
        let all = self.kept.fetch_add(after - before, Ordering::AcqRel) + after - before;
        if all > self.kept_max {
            self.make_room();
        }
    }

    /// Drops kept output: that of ended commands, the oldest first; then the middle of the largest streams.
    fn make_room(&self) {
        let inner = self.inner();
        let mut ended: Vec<_> =
            inner.commands.iter().filter_map(|command| Some((command.ended_at()?, command))).collect();
        ended.sort_by_key(|(at, _)| *at);
        for (_, command) in ended {
            if self.kept.load(Ordering::Acquire) <= self.kept_max {
                return;
            }
            self.give_back(command, 0);
        }
        while self.kept.load(Ordering::Acquire) > self.kept_max {
            let largest = inner.commands.iter().max_by_key(|command| largest_of(command));
            let Some(command) = largest.filter(|command| largest_of(command) > KEPT_ALWAYS) else { return };
            self.give_back(command, (largest_of(command) / 2).max(KEPT_ALWAYS));
        }
    }

    /// Reduces the kept output of each stream of a command to `most` bytes.
    fn give_back(&self, command: &Command, most: usize) {
        for stream in &command.streams {
            let mut kept = stream.kept();
            let before = kept.len();
            match most {
                0 => kept.clear(),
                most if before > most => kept.shrink(most),
                _ => {}
            }
            self.kept.fetch_sub(before - kept.len(), Ordering::AcqRel);
        }
    }

    /// Forgets ended commands that are too old, or too many; then those that ended first.
    fn prune(&self, inner: &mut Inner) {
        let mut ends: Vec<_> = inner.commands.iter().filter_map(|command| command.ended_at()).collect();
        ends.sort_unstable_by_key(|at| std::cmp::Reverse(*at));
        let first = ends.get(ENDED_MAX - 1).copied();
        inner.commands.retain(|command| {
            let Some(at) = command.ended_at() else { return true };
            let age_max = if command.is_delivered.load(Ordering::Acquire) { AGE_DELIVERED } else { AGE_MAX };
            if first.is_none_or(|first| at >= first) && at.elapsed() <= age_max {
                return true;
            }
            command.is_forgotten.store(true, Ordering::Release);
            self.give_back(command, 0);
            false
        });
    }
}

fn largest_of(command: &Command) -> usize {
    command.streams.iter().map(|stream| stream.kept().len()).max().unwrap_or(0)
}

/// Why a command is lost.
const LOST: &str = "the command holder was killed, and the command with it";

/// Returns the commands that were running when an earlier holder was killed.
fn lost(directory: &std::path::Path) -> Vec<CommandEntry> {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut lost: Vec<(PathBuf, CommandEntry)> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|path| {
            let entry: CommandEntry = serde_json::from_str(&read_small(&path, 64 << 10)?).ok()?;
            let entry = CommandEntry { state: CommandState::Lost, problem: Some(LOST.to_owned()), ..entry };
            Some((path, entry))
        })
        .collect();
    lost.sort_by_key(|(_, entry)| entry.started_at);
    let old = lost.len().saturating_sub(LOST_MAX);
    for (path, _) in lost.drain(..old) {
        // The next holder tries again.
        let _ = std::fs::remove_file(path);
    }
    lost.into_iter().map(|(_, entry)| entry).collect()
}
