//! All processes that a command started, and how they are killed.
//!
//! With a cgroup that is one write. Without one, `/proc` is searched for processes of the command: its process group and session, its descendants,
//! and any process that still carries its mark in the environment, even after it forked twice and started a session of its own.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_schema::tools::command::Descendants;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::cgroup::Cgroup;
use crate::os::read_small;

/// The environment variable that marks the processes of a command when there are no cgroups.
pub(super) const MARK: &str = "NEXUS_COMMAND";
/// The maximum number of searches of the process table. Each finds what was forked during the previous one.
const ROUNDS: usize = 20;
/// How much of a process's environment is searched, in bytes.
const ENVIRONMENT_MAX: u64 = 256 << 10;
/// How long a process may have no environment while it executes a program.
const EXEC_TIME: Duration = Duration::from_millis(5);
/// The maximum number of named processes that a command left behind.
const NAMES_MAX: usize = 16;

/// The processes of one command.
#[derive(Debug)]
pub(super) struct Tree {
    /// The first process, leader of its own session and group.
    root: Pid,
    mark: String,
    /// `None` without cgroups, and once it was removed.
    cgroup: Mutex<Option<Cgroup>>,
    /// Whether it has or had one: then `/proc` is not searched.
    is_confined: bool,
    /// Whether the first process was reaped, so that another process may get its number.
    is_reaped: AtomicBool,
}

impl Tree {
    /// Creates the tree of the command whose first process is `root`, leader of its own session.
    pub(super) fn new(root: Pid, mark: String, cgroup: Option<Cgroup>) -> Self {
        let is_confined = cgroup.is_some();
        Self { root, mark, cgroup: Mutex::new(cgroup), is_confined, is_reaped: AtomicBool::new(false) }
    }

    /// Returns the number of the first process.
    pub(super) fn root(&self) -> Pid {
        self.root
    }

    fn cgroup(&self) -> MutexGuard<'_, Option<Cgroup>> {
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reaped(&self) -> bool {
        self.is_reaped.load(Ordering::Acquire)
    }

    /// Records that the first process was reaped.
    pub(super) fn reaped(&self) {
        self.is_reaped.store(true, Ordering::Release);
    }

    /// Sends a signal to the process group of a running command. Call it only on the thread that reaps the first process.
    pub(super) fn signal_group(&self, signal: Signal) {
        if !self.is_reaped() {
            // It may have exited.
            let _ = kill_process_group(self.root, signal);
        }
    }

    /// Sends a signal to all processes of the command. May take a moment.
    pub(super) fn signal_all(&self, signal: Signal) {
        for pid in self.processes() {
            // It may have exited.
            let _ = kill_process(pid, signal);
        }
    }

    /// Kills all processes of the command if a single write can do it, or if there are none; returns whether it did.
    pub(super) fn kill_at_once(&self) -> bool {
        match self.cgroup().as_ref() {
            Some(cgroup) => cgroup.kill().is_ok(),
            None => self.is_confined,
        }
    }

    /// Kills all processes of the command. May take a moment.
    pub(super) fn kill(&self) {
        if self.kill_at_once() {
            return;
        }
        let mut was_empty = false;
        for _ in 0..ROUNDS {
            let found = self.processes();
            if found.is_empty() {
                if was_empty {
                    return;
                }
                // A process that is executing a program at this moment has no environment to identify it by.
                std::thread::park_timeout(EXEC_TIME);
            }
            was_empty = found.is_empty();
            for pid in found {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Returns the running processes of an ended command. May take a moment.
    pub(super) fn left(&self) -> Descendants {
        let processes = self.processes();
        let name = |pid: &Pid| {
            let number = pid.as_raw_nonzero();
            let name = read_small(format!("/proc/{number}/comm"), 64)?;
            let name: String =
                name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            Some(format!("{name} (pid {number})"))
        };
        let names = processes.iter().filter_map(name).take(NAMES_MAX).collect();
        Descendants { count: u32::try_from(processes.len()).unwrap_or(u32::MAX), names }
    }

    /// Removes the command's cgroup, once it has no processes. It stays if it cannot be removed: a command may have made cgroups in it, whose processes are
    /// not listed, but are killed with it.
    pub(super) fn release(&self) {
        let mut cgroup = self.cgroup();
        if cgroup.as_ref().is_some_and(|cgroup| cgroup.remove().is_ok()) {
            *cgroup = None;
        }
    }

    fn processes(&self) -> Vec<Pid> {
        match self.cgroup().as_ref() {
            Some(cgroup) => cgroup.processes(),
            None if self.is_confined => Vec::new(),
            None => marked((!self.is_reaped()).then_some(self.root), &self.mark),
        }
    }
}

/// Kills the processes of a command of an earlier holder.
pub(super) fn kill_left_behind(mark: &str) {
    if Cgroup::left_behind(mark).is_some_and(|cgroup| cgroup.kill().is_ok()) {
        return;
    }
    for pid in marked(None, mark) {
        // It may have exited.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Returns the living processes that carry a mark, and those that belong to `root` or descend from any of them.
fn marked(root: Option<Pid>, mark: &str) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let all: Vec<Process> = pids.filter_map(Process::read).collect();
    let root = root.map(|root| root.as_raw_nonzero().get());
    let belongs = |process: &&Process| {
        root.is_some_and(|root| process.group == root || process.session == root)
            || is_marked(process.pid, mark)
    };
    let mut ours: HashSet<i32> = all.iter().filter(belongs).map(|process| process.pid).chain(root).collect();
    // Children usually follow their parents in the list, but not always.
    loop {
        let before = ours.len();
        for process in &all {
            if ours.contains(&process.parent) {
                ours.insert(process.pid);
            }
        }
        if ours.len() == before {
            break;
        }
    }
    let living = all.iter().filter(|process| ours.contains(&process.pid) && !process.is_dead);
    living.filter_map(|process| Pid::from_raw(process.pid)).collect()
}

fn is_marked(pid: i32, mark: &str) -> bool {
    use std::io::Read;

    let mut environment = Vec::new();
    let Ok(file) = std::fs::File::open(format!("/proc/{pid}/environ")) else { return false };
    if file.take(ENVIRONMENT_MAX).read_to_end(&mut environment).is_err() {
        return false;
    }
    let mark = format!("{MARK}={mark}");
    environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
}

/// The fields of `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    is_dead: bool,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(pid, &read_small(format!("/proc/{pid}/stat"), 4 << 10)?)
    }

    fn parse(pid: i32, stat: &str) -> Option<Self> {
        // The name is in parentheses and may contain anything, including parentheses.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        let state = fields.next()?;
        let mut number = || fields.next()?.parse().ok();
        Some(Self {
            pid,
            parent: number()?,
            group: number()?,
            session: number()?,
            is_dead: matches!(state, "Z" | "X"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Otherwise the end of a VM would search for each command that it ever ran, and read what any process has as its environment.
    #[test]
    fn processes_are_searched_for_only_without_cgroups() {
        use std::io::{Read, Write};
        use std::process::{Command, Stdio};

        let mark = format!("test-{}", std::process::id());
        let mut cat = Command::new("cat");
        cat.env(MARK, &mark).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cat = cat.spawn().unwrap();
        // Once it answers, it has executed its program.
        let mut answer = [0];
        cat.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        cat.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
        let pid = Pid::from_raw(cat.id().cast_signed()).unwrap();
        let tree = |cgroup| {
            let tree = Tree::new(pid, mark.clone(), cgroup);
            tree.reaped();
            tree
        };
        let place = tempfile::tempdir().unwrap();
        let confined = tree(Some(Cgroup::at(place.path().join("none"))));
        confined.release();
        assert_eq!(confined.left().count, 0);
        assert!(confined.kill_at_once(), "there is nothing to kill");
        let free = tree(None);
        assert_eq!(free.left().count, 1);
        assert!(!free.kill_at_once());
        free.kill();
        cat.wait().unwrap();
    }

    /// As of a command that runs containers. Plain directories cannot be removed either if there is something in them.
    #[test]
    fn a_cgroup_with_others_in_it_is_kept_and_killed() {
        let place = tempfile::tempdir().unwrap();
        let tree = |path: &Path| {
            Tree::new(rustix::process::getpid(), "test".to_owned(), Some(Cgroup::at(path.to_owned())))
        };
        let nested = place.path().join("nested");
        std::fs::create_dir_all(nested.join("inner")).unwrap();
        let kept = tree(&nested);
        kept.release();
        std::fs::write(nested.join("cgroup.kill"), "").unwrap();
        assert!(kept.kill_at_once());
        assert_eq!(std::fs::read_to_string(nested.join("cgroup.kill")).unwrap(), "1");
        let empty = place.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        let removed = tree(&empty);
        removed.release();
        assert!(!empty.exists());
        assert!(removed.cgroup().is_none());
        assert!(removed.kill_at_once(), "there is nothing to kill");
    }

    #[test]
    fn stat_is_read_whatever_the_name_is() {
        let process = Process::parse(7, "7 (a) R (b)) S 1 7 6 0 -1 4194560");
        assert_eq!(process, Some(Process { pid: 7, parent: 1, group: 7, session: 6, is_dead: false }));
        assert!(Process::parse(7, "7 (x) Z 1 2 3").unwrap().is_dead);
        assert_eq!(Process::parse(7, "7 (x"), None);
    }
}
