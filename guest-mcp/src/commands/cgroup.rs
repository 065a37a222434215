//! The cgroup of one command: the only reliable way to kill every process that it started. Version 2 only.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

use crate::os::read_small;

pub(super) const ROOT: &str = "/sys/fs/cgroup";
pub(super) const OURS: &str = "/sys/fs/cgroup/nexus";
/// The memory events of all commands together.
pub(super) const MEMORY_EVENTS: &str = "/sys/fs/cgroup/nexus/memory.events";
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2: u64 = 0x6367_7270;
/// How many times the processes of a cgroup are killed one by one if the kernel cannot kill the whole cgroup.
const ROUNDS: usize = 100;

/// The bounds of the memory that is reserved for the agent and the kernel, in bytes; within them it is 1/32 of all memory.
const MEMORY_KEPT: (u64, u64) = (8 << 20, 64 << 20);
/// Cgroups of commands that left processes behind; removed once those are gone.
static LEFT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The cgroup of one command.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates a cgroup; also returns the file through which a child enters it. `None` if there is no cgroup filesystem.
    pub(super) fn create(name: &str) -> Option<(Self, OwnedFd)> {
        if rustix::fs::statfs(ROOT).ok()?.f_type as u64 != CGROUP2 {
            return None;
        }
        sweep();
        static LIMITED: Once = Once::new();
        LIMITED.call_once(limit);
        let path = Path::new(OURS).join(name);
        if std::fs::create_dir(&path).is_err() {
            std::fs::create_dir_all(&path).ok()?;
        }
        let cgroup = Self { path };
        let procs = File::options().write(true).open(cgroup.path.join("cgroup.procs")).ok()?;
        Some((cgroup, procs.into()))
    }

    /// Finds a cgroup that an earlier holder created.
    pub(super) fn left_behind(name: &str) -> Option<Self> {
        let path = Path::new(OURS).join(name);
        path.is_dir().then_some(Self { path })
    }

    /// Takes a directory for a cgroup.
    #[cfg(test)]
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Returns the processes in it.
    pub(super) fn processes(&self) -> Vec<Pid> {
        let list = read_small(self.path.join("cgroup.procs"), 1 << 20).unwrap_or_default();
        list.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw).collect()
    }

    /// Freezes it, and kills all its processes.
    pub(super) fn kill(&self) -> io::Result<()> {
        // Frozen processes cannot fork or run until they are dead.
        let _ = std::fs::write(self.path.join("cgroup.freeze"), "1");
        let whole = File::options().write(true).open(self.path.join("cgroup.kill"));
        match whole.and_then(|mut file| file.write_all(b"1")) {
            Ok(()) => Ok(()),
            // For kernels before Linux 5.14.
            Err(_) => self.kill_one_by_one(),
        }
    }

    /// Removes it; one that is gone counts as removed.
    ///
    /// # Errors
    /// If it has processes or other cgroups.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn kill_one_by_one(&self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let mut any = false;
            for pid in self.processes() {
                any = true;
                // It may have exited.
                let _ = kill_process(pid, Signal::KILL);
            }
            if !any {
                return Ok(());
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if self.remove().is_err() {
            LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.path));
        }
    }
}

/// Limits all commands together, so that the agent always has resources. Without these controllers there are no limits.
fn limit() {
    if std::fs::create_dir_all(OURS).is_err() {
        return;
    }
    // With `cpu`, all commands together get the same share as the agent, however many they are.
    for controller in ["+memory", "+pids", "+cpu"] {
        let _ = std::fs::write(Path::new(ROOT).join("cgroup.subtree_control"), controller);
    }
    let system = rustix::system::sysinfo();
    let total = system.totalram.saturating_mul(u64::from(system.mem_unit.max(1)));
    let high = memory_high(total);
    let number = |path: &str| read_small(path, 32).and_then(|text| text.trim().parse::<u64>().ok());
    let tasks = [number("/proc/sys/kernel/threads-max"), number("/proc/sys/kernel/pid_max")];
    let mut limits = vec![
        ("memory.high", high),
        // Slightly more: with `memory.high` alone, a command with growing memory would be slowed down forever instead of killed.
        ("memory.max", high + (high / 100).min((total - high) / 2)),
    ];
    limits.extend(tasks.into_iter().flatten().min().map(|most| ("pids.max", pids_max(most))));
    for (file, value) in limits {
        let _ = std::fs::write(Path::new(OURS).join(file), value.to_string());
    }
}

fn memory_high(total: u64) -> u64 {
    total - (total / 32).clamp(MEMORY_KEPT.0, MEMORY_KEPT.1).min(total / 2)
}

/// Returns half of the kernel's limit of tasks. With the full limit, the stacks and tables of the tasks could fill the memory.
fn pids_max(most: u64) -> u64 {
    most / 2
}

/// Removes a few cgroups that have become empty.
fn sweep() {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    let mut tries = 8;
    left.retain(|path| {
        if tries == 0 {
            return true;
        }
        tries -= 1;
        matches!(std::fs::remove_dir(path), Err(error) if error.kind() != io::ErrorKind::NotFound)
    });
    // The next call tries others.
    let seen = 8.min(left.len());
    left.rotate_left(seen);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_left_room() {
        assert_eq!(memory_high(64 << 20), 56 << 20);
        assert_eq!(memory_high(1 << 30), (1 << 30) - (32 << 20));
        assert_eq!(memory_high(64 << 30), (64 << 30) - (64 << 20));
        assert_eq!((pids_max(32_768), pids_max(400), pids_max(10)), (16_384, 200, 5));
        assert_eq!((memory_high(0), pids_max(0)), (0, 0));
    }
}
