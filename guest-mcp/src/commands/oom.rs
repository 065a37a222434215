//! Detects whether memory ran out while a command ran, and which processes the kernel killed for it.
//!
//! The kernel increments its counter before it kills, so it has changed when a command ends because of that. The names follow in the kernel's log a
//! moment later.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use super::cgroup;
use crate::os::read_small;

/// The counters of the whole system, used if the commands' cgroup has none.
const VMSTAT: &str = "/proc/vmstat";
/// The kernel's log; each read returns one record.
const LOG: &str = "/dev/kmsg";
/// The maximum size of a record (`PRINTK_MESSAGE_MAX` of kernel/printk/internal.h), in bytes.
const RECORD_MAX: usize = 2048;
/// Timeout for the names to appear in the kernel's log.
const NAMES_TIMEOUT: Duration = Duration::from_millis(500);
/// The interval of reading the log meanwhile.
const STEP: Duration = Duration::from_millis(10);
/// The maximum number of processes that are named.
const NAMES_MAX: usize = 16;

/// The state before a command.
#[derive(Debug)]
pub(super) struct Before {
    /// The file of the counter, and its value.
    kills: Option<(&'static str, u64)>,
    log: Option<File>,
}

impl Before {
    /// Reads the counter, and marks the end of the kernel's log.
    pub(super) fn look() -> Self {
        let log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(LOG);
        let log = log.and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log));
        let kills = [cgroup::MEMORY_EVENTS, VMSTAT].into_iter().find_map(|path| Some((path, kills(path)?)));
        Self { kills, log: log.ok() }
    }

    /// Returns the processes killed since then, such as `python3 (pid 123)`.
    pub(super) async fn killed_since(self) -> Vec<String> {
        let since = |(path, before)| Some(kills(path)?.saturating_sub(before));
        let count = self.kills.and_then(since).unwrap_or(0);
        let count = usize::try_from(count).unwrap_or(NAMES_MAX).min(NAMES_MAX);
        let mut names = Vec::new();
        let Some(mut log) = self.log else { return unnamed(names, count) };
        let deadline = Instant::now() + NAMES_TIMEOUT;
        while names.len() < count {
            match next(&mut log) {
                Record::Text(text) => names.extend(victim(&text)),
                Record::Lost => {}
                Record::End if Instant::now() < deadline => tokio::time::sleep(STEP).await,
                Record::End => break,
            }
        }
        unnamed(names, count)
    }
}

fn unnamed(mut names: Vec<String>, count: usize) -> Vec<String> {
    names.resize(count, "a process".to_owned());
    names
}

/// Returns how many processes the OOM killer has killed since the boot.
fn kills(path: &str) -> Option<u64> {
    counter(&read_small(path, 64 << 10)?)
}

fn counter(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

enum Record {
    Text(String),
    /// Some records were overwritten before they were read.
    Lost,
    End,
}

fn next(log: &mut File) -> Record {
    let mut record = [0; RECORD_MAX];
    loop {
        return match log.read(&mut record) {
            Ok(0) => Record::End,
            Ok(length) => Record::Text(String::from_utf8_lossy(&record[..length]).into_owned()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => Record::Lost,
            Err(_) => Record::End,
        };
    }
}

/// Parses the process of a record `PREFIX;Out of memory: Killed process PID (NAME) …`, or with `Memory cgroup out of memory:` (`__oom_kill_process`
/// of mm/oom_kill.c).
fn victim(record: &str) -> Option<String> {
    let (_, text) = record.split_once(';')?;
    let (_, rest) = text
        .split_once("out of memory: Killed process ")
        .or_else(|| text.split_once("Out of memory: Killed process "))?;
    let (pid, rest) = rest.split_once(" (")?;
    // A name has at most 15 bytes and may contain anything, including parentheses; the text after it does not.
    let (name, _) = rest.split_once(") total-vm:").or_else(|| rest.split_once(')'))?;
    let name: String = name.chars().filter(|c| !c.is_control()).take(32).collect();
    pid.parse::<u32>().ok().map(|pid| format!("{name} (pid {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        assert_eq!(counter("low 0\nhigh 7\noom 2\noom_kill 3\noom_group_kill 0\n"), Some(3));
        assert_eq!(counter("nr_free_pages 1\noom_kill 0\n"), Some(0));
        assert_eq!(counter(""), None);
    }

    #[test]
    fn victims_are_named() {
        let record = "3,519,8140900,-;Out of memory: Killed process 61 (a) (b) total-vm:1kB, anon-rss:2kB\n SUBSYSTEM=x\n";
        assert_eq!(victim(record).as_deref(), Some("a) (b (pid 61)"));
        let record = "3,1,2,-;Memory cgroup out of memory: Killed process 7 (tail) total-vm:1kB";
        assert_eq!(victim(record).as_deref(), Some("tail (pid 7)"));
        for other in
            ["6,1,2,-;oom_reaper: reaped process 7 (tail)", "Out of memory: Killed process 1 (x)", ""]
        {
            assert_eq!(victim(other), None, "{other}");
        }
    }
}
