//! All processes that a command started, and how they are ended.
//!
//! With a cgroup that is one write. Without, `/proc` is searched for what belongs to the command: its process group and
//! session, its descendants, and whatever still carries its mark in the environment after it forked twice and moved to a
//! session of its own.

use std::collections::HashSet;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::cgroup::Cgroup;

/// The environment variable that marks the processes of a command where there are no cgroups.
pub(super) const MARK: &str = "NEXUS_COMMAND";
/// How often the process table is searched at most: each round finds what was forked during the one before.
const ROUNDS: usize = 20;
/// How much of a process's environment is searched, in bytes.
const ENVIRONMENT_MAX: u64 = 256 << 10;

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pid: Pid,
    mark: String,
    cgroup: std::sync::Mutex<Option<Cgroup>>,
}

impl Running {
    /// The command whose first process is `pid`, leader of its own session.
    pub(super) fn new(pid: Pid, mark: String, cgroup: Option<Cgroup>) -> Self {
        Self { pid, mark, cgroup: std::sync::Mutex::new(cgroup) }
    }

    /// Kills every process of it. Only to be called while its first process is not reaped.
    pub(crate) fn kill(&self) {
        // It may be gone already.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let cgroup = self.cgroup.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if cgroup.as_ref().is_some_and(|cgroup| cgroup.kill().is_ok()) {
            return;
        }
        drop(cgroup);
        for _ in 0..ROUNDS {
            let found = self.find();
            if found.is_empty() {
                return;
            }
            for pid in found {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }

    /// Lets go of what belongs to the command, once it ended.
    pub(super) fn release(&self) {
        drop(self.cgroup.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
    }

    /// Its processes that still live.
    fn find(&self) -> Vec<Pid> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let all: Vec<Process> = pids.filter_map(Process::read).collect();
        let root = self.pid.as_raw_nonzero().get();
        let mut ours: HashSet<i32> = all
            .iter()
            .filter(|process| process.group == root || process.session == root || self.is_marked(process.pid))
            .map(|process| process.pid)
            .collect();
        ours.insert(root);
        // Children come after their parents most of the time, but not always.
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

    fn is_marked(&self, pid: i32) -> bool {
        use std::io::Read;

        let mut environment = Vec::new();
        let Ok(file) = std::fs::File::open(format!("/proc/{pid}/environ")) else { return false };
        if file.take(ENVIRONMENT_MAX).read_to_end(&mut environment).is_err() {
            return false;
        }
        let mark = format!("{MARK}={}", self.mark);
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    }
}

/// What `/proc/PID/stat` says of a process.
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
        Self::parse(pid, &crate::os::read_small(format!("/proc/{pid}/stat"), 4 << 10)?)
    }

    fn parse(pid: i32, stat: &str) -> Option<Self> {
        // The name is in parentheses and may hold anything, parentheses included.
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
    use super::*;

    #[test]
    fn stat_is_read_whatever_the_name_is() {
        let process = Process::parse(7, "7 (a) R (b)) S 1 7 6 0 -1 4194560");
        assert_eq!(process, Some(Process { pid: 7, parent: 1, group: 7, session: 6, is_dead: false }));
        assert!(Process::parse(7, "7 (x) Z 1 2 3").unwrap().is_dead);
        assert_eq!(Process::parse(7, "7 (x"), None);
    }
}
