//! Identifies processes. A pid alone is not enough, because pids are reused; the start time distinguishes them.

use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What `/proc/PID/stat` says about a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessStat {
    /// The state's letter: `R`, `S`, `D`, `Z` and so on (proc_pid_stat(5)).
    pub state: char,
    /// The parent's pid.
    pub parent: u32,
    /// Its start time, in clock ticks since the host booted: field 22.
    pub start_time: u64,
}

impl ProcessStat {
    /// Whether the process has ended and only waits to be reaped.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// Reads `/proc/PID/stat`; `None` if there is no such process.
pub fn stat(pid: u32) -> io::Result<Option<ProcessStat>> {
    match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(text) => Ok(parse_stat(&String::from_utf8_lossy(&text))),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(e),
    }
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessUsage {
    /// CPU time of all its threads, in milliseconds.
    pub cpu_ms: u64,
    /// Its resident memory, in bytes.
    pub memory_bytes: u64,
}

/// Milliseconds in a tick of `/proc/PID/stat`: USER_HZ is 100 in the kernel's interface on all architectures that Nexus knows.
const TICK_MS: u64 = 10;

/// Reads what a process uses; `None` if there is no such process.
pub fn usage(pid: u32) -> io::Result<Option<ProcessUsage>> {
    let read = |file: &str| match std::fs::read(format!("/proc/{pid}/{file}")) {
        Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(e),
    };
    let (Some(stat), Some(status)) = (read("stat")?, read("status")?) else { return Ok(None) };
    Ok(parse_usage(&stat, &status))
}

/// How many bytes of the disk or of memory a file occupies that a process has open, by its path. `None` if it has none such open, or if that cannot be
/// seen.
pub(crate) fn allocated_to_open(pid: u32, is_it: &dyn Fn(&str) -> bool) -> Option<u64> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    open.flatten().find_map(|entry| {
        let path = std::fs::read_link(entry.path()).ok()?;
        if !is_it(&path.to_string_lossy()) {
            return None;
        }
        std::fs::metadata(entry.path()).ok().filter(Metadata::is_file).map(|file| file.blocks() * 512)
    })
}

fn parse_usage(stat: &str, status: &str) -> Option<ProcessUsage> {
    let (_, rest) = stat.rsplit_once(')')?;
    // Fields 14 and 15 are the CPU time in user and kernel mode; the first one here is field 3.
    let mut fields = rest.split_ascii_whitespace().skip(14 - 3);
    let ticks = fields.next()?.parse::<u64>().ok()?.saturating_add(fields.next()?.parse().ok()?);
    // A kernel thread and a zombie have none.
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = resident.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(ProcessUsage { cpu_ms: ticks.saturating_mul(TICK_MS), memory_bytes: kib.saturating_mul(1024) })
}

/// A process name may contain anything, even parentheses, so fields are counted after the last one.
fn parse_stat(text: &str) -> Option<ProcessStat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    // Fields 3 and 4 are already read; 22 is the 18th from there.
    let start_time = fields.nth(17)?.parse().ok()?;
    Some(ProcessStat { state, parent, start_time })
}

/// A handle of a process: signals reach exactly this process or none.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: u32,
    start_time: u64,
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Opens a live process; `None` if there is none with this pid (a zombie does not count).
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The handle is opened before the inspection, and the process is still alive after it, so the inspection was of this process.
        let Some(stat) = stat(pid)? else { return Ok(None) };
        let handle = Self { pid, start_time: stat.start_time, fd };
        // That state is of the first thread only: it may be dead while other threads still hold the process's files. The
        // handle reports the end of all threads (pidfd_poll() in the kernel's pid.c).
        if handle.has_ended()? { Ok(None) } else { Ok(Some(handle)) }
    }

    /// Opens the process that was started at `start_time`; `None` if it has ended.
    pub fn open_identified(pid: u32, start_time: u64) -> io::Result<Option<Self>> {
        Ok(Self::open(pid)?.filter(|handle| handle.start_time == start_time))
    }

    /// Opens a child of this process that may have ended but is not reaped yet, so its pid cannot have been reused.
    pub(crate) fn of_child(child: &std::process::Child) -> io::Result<Self> {
        let pid = child.id();
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let fd = pidfd_open(raw, PidfdFlags::empty())?;
        let start_time = stat(pid)?.ok_or_else(gone)?.start_time;
        Ok(Self { pid, start_time, fd })
    }

    /// The pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its start time, in clock ticks since the host booted.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Sends SIGKILL; a process that has already ended is not an error.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Stops the process, or makes it go on. Stopping one that is stopped already is no error.
    pub fn set_stopped(&self, stopped: bool) -> io::Result<()> {
        self.signal(if stopped { Signal::STOP } else { Signal::CONT })
    }

    /// Sends SIGTERM; a process that has already ended is not an error.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The same for an async runtime: it becomes readable, and stays so, when the process has ended.
    pub(crate) fn watched(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: a handle gives the same number always, keeps the descriptor open, and closes it only when it is dropped.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }.map_err(io::Error::from)
    }

    /// Whether the process has ended, reaped or not.
    pub fn has_ended(&self) -> io::Result<bool> {
        self.wait_ended(Duration::ZERO)
    }

    /// Waits up to `timeout` until the process has ended; returns whether it has.
    pub fn wait_ended(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for ProcessHandle {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A duration in the kernel's form.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn reads_a_stat_line_with_a_hostile_name() {
        let text =
            "42 (a) R (b) Z 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 2 3 18446744073709551615";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat, ProcessStat { state: 'Z', parent: 7, start_time: 987_654 });
        assert!(stat.is_dead());
        assert_eq!(parse_stat("42 (sh) S"), None);
        assert_eq!(parse_stat(""), None);
        let busy = "42 (a) R (b) S 7 1 1 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 1 0 987654 2 3 4";
        let usage = ProcessUsage { cpu_ms: 420, memory_bytes: 3 << 20 };
        assert_eq!(parse_usage(busy, "Name:\tx\nVmRSS:\t    3072 kB\n"), Some(usage));
        assert_eq!(parse_usage(busy, "Name:\tx\n"), None);
    }

    #[test]
    fn knows_itself() {
        let me = std::process::id();
        let stat = stat(me).unwrap().unwrap();
        assert!(!stat.is_dead());
        assert!(ProcessHandle::open_identified(me, stat.start_time).unwrap().is_some());
        assert!(ProcessHandle::open_identified(me, stat.start_time + 1).unwrap().is_none());
        assert!(ProcessHandle::open(u32::MAX).unwrap().is_none());
        assert!(ProcessHandle::open(0).unwrap().is_none());
        assert!(usage(me).unwrap().unwrap().memory_bytes > 100 << 10);
        assert_eq!(usage(u32::MAX).unwrap(), None);
    }

    #[test]
    fn the_pages_of_a_memory_count_though_nobody_has_mapped_them() {
        use std::os::unix::fs::FileExt as _;
        let memory = rustix::fs::memfd_create("nexus-pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memory = std::fs::File::from(memory);
        memory.set_len(64 << 20).unwrap();
        let occupied =
            || allocated_to_open(std::process::id(), &|path| path.starts_with("/memfd:nexus-pages"));
        assert_eq!(occupied(), Some(0));
        memory.write_all_at(&[7; 8192], 4 << 20).unwrap();
        assert!((8192..1 << 22).contains(&occupied().unwrap()), "{:?}", occupied());
        assert_eq!(allocated_to_open(std::process::id(), &|path| path == "/nonexistent"), None);
    }

    #[test]
    fn a_zombie_counts_as_none() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let handle = ProcessHandle::open(child.id()).unwrap().unwrap();
        assert!(!handle.has_ended().unwrap());
        handle.kill().unwrap();
        assert!(handle.wait_ended(Duration::from_secs(10)).unwrap());
        assert!(stat(child.id()).unwrap().unwrap().is_dead());
        assert!(ProcessHandle::open(child.id()).unwrap().is_none());
        assert!(ProcessHandle::open_identified(child.id(), handle.start_time()).unwrap().is_none());
        child.wait().unwrap();
        handle.kill().unwrap();
        assert_eq!(stat(child.id()).unwrap(), None);
    }
}
