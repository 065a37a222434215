//! A cgroup for one command: the one way to end all that it started, however it tries to hide. Version 2 only.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::os::read_small;

const ROOT: &str = "/sys/fs/cgroup";
const OURS: &str = "/sys/fs/cgroup/nexus";
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2: u64 = 0x6367_7270;
/// How often the processes of a cgroup are killed one by one where the kernel cannot kill it whole.
const ROUNDS: usize = 100;

/// Cgroups of commands that left processes behind; removed once those are gone.
static LEFT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The cgroup of one command.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one, with the file through which a child enters it; `None` where there is no cgroup filesystem.
    pub(super) fn create() -> Option<(Self, OwnedFd)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if rustix::fs::statfs(ROOT).ok()?.f_type as u64 != CGROUP2 {
            return None;
        }
        sweep();
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(OURS).join(name);
        if std::fs::create_dir(&path).is_err() {
            std::fs::create_dir_all(&path).ok()?;
        }
        let cgroup = Self { path };
        let procs = File::options().write(true).open(cgroup.path.join("cgroup.procs")).ok()?;
        Some((cgroup, procs.into()))
    }

    /// Kills every process in it.
    pub(super) fn kill(&self) -> io::Result<()> {
        let whole = File::options().write(true).open(self.path.join("cgroup.kill"));
        match whole.and_then(|mut file| file.write_all(b"1")) {
            Ok(()) => Ok(()),
            // Before Linux 5.14.
            Err(_) => self.kill_one_by_one(),
        }
    }

    fn kill_one_by_one(&self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let list = read_small(self.path.join("cgroup.procs"), 1 << 20).unwrap_or_default();
            let mut any = false;
            for pid in
                list.lines().filter_map(|line| line.parse().ok()).filter_map(rustix::process::Pid::from_raw)
            {
                any = true;
                // It may be gone by now.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
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
        if std::fs::remove_dir(&self.path).is_err() {
            LEFT.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.path));
        }
    }
}

/// Removes a few cgroups that are empty by now.
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
