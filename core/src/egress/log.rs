//! Logs the connections of each VM as lines of JSON. A full file is rotated; one older file is kept.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use nexus_schema::id::VmId;
use nexus_schema::tools::network::LoggedConnection;
use serde::{Deserialize, Serialize};

/// File length from which on the file is rotated, in bytes.
const FILE_MAX: u64 = 512 << 10;
/// Maximum number of connections that wait to be written; further ones are not logged.
const WAITING_MAX: usize = 4096;
/// Maximum number of open files.
const OPEN_MAX: usize = 64;
/// File name suffix of the rotated file.
const BEFORE: &str = "1";

/// A line of the log.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// Sequence number among the lines of a VM.
    seq: u64,
    #[serde(flatten)]
    connection: LoggedConnection,
}

/// A job for the writing thread.
enum Job {
    Write(VmId, LoggedConnection),
    Remove(VmId),
}

/// Writes the logs in a separate thread, so that callers do not wait for the disk.
#[derive(Debug, Clone)]
pub(super) struct Writer(SyncSender<Job>);

impl Writer {
    /// Starts the thread; the logs are in `directory`.
    pub(super) fn start(directory: PathBuf) -> Self {
        let (jobs, taken) = sync_channel(WAITING_MAX);
        // The thread ends when the last sender is dropped.
        let started = std::thread::Builder::new()
            .name("network-log".into())
            .spawn(move || write_all(&directory, &taken));
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start the thread that logs connections of VMs");
        }
        Self(jobs)
    }

    /// Logs a connection.
    pub(super) fn write(&self, vm: VmId, connection: LoggedConnection) {
        // If too many wait, this one is not logged. The log shows a VM with that many connections anyway.
        let _ = self.0.try_send(Job::Write(vm, connection));
    }

    /// Removes the log of a VM.
    pub(super) fn remove(&self, vm: VmId) {
        let _ = self.0.send(Job::Remove(vm));
    }
}

/// A log that is open for writing.
struct Log {
    file: File,
    length: u64,
    next: u64,
}

fn write_all(directory: &Path, jobs: &Receiver<Job>) {
    let mut logs: HashMap<VmId, Log> = HashMap::new();
    let mut is_failing = false;
    while let Ok(job) = jobs.recv() {
        let done = match job {
            Job::Write(vm, connection) => {
                if logs.len() >= OPEN_MAX && !logs.contains_key(&vm) {
                    logs.clear();
                }
                append(directory, &mut logs, vm, connection)
            }
            Job::Remove(vm) => {
                logs.remove(&vm);
                files(directory, vm).iter().try_for_each(|path| match std::fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                })
            }
        };
        if let Err(error) = &done
            && !is_failing
        {
            tracing::warn!(%error, "cannot write the log of a VM's connections");
        }
        is_failing = done.is_err();
    }
}

/// Returns the files of a VM's log, the rotated one first.
fn files(directory: &Path, vm: VmId) -> [PathBuf; 2] {
    let now = directory.join(format!("{vm}.jsonl"));
    [now.with_extension(format!("jsonl.{BEFORE}")), now]
}

fn append(
    directory: &Path,
    logs: &mut HashMap<VmId, Log>,
    vm: VmId,
    connection: LoggedConnection,
) -> io::Result<()> {
    let [before, now] = files(directory, vm);
    let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(&now);
    let log = match logs.entry(vm) {
        Entry::Occupied(log) => log.into_mut(),
        Entry::Vacant(place) => {
            let next = lines(directory, vm)?.last().map_or(0, |line| line.seq + 1);
            let file = open()?;
            let length = file.metadata()?.len();
            place.insert(Log { file, length, next })
        }
    };
    let mut line = serde_json::to_vec(&Line { seq: log.next, connection })?;
    line.push(b'\n');
    if log.length + line.len() as u64 > FILE_MAX {
        std::fs::rename(&now, before)?;
        (log.file, log.length) = (open()?, 0);
    }
    log.file.write_all(&line)?;
    log.length += line.len() as u64;
    log.next += 1;
    Ok(())
}

/// Reads all lines, oldest first. Incomplete and damaged lines are skipped.
fn lines(directory: &Path, vm: VmId) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for path in files(directory, vm) {
        match std::fs::read(path) {
            Ok(bytes) => {
                let found = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
                lines.extend(found.filter_map(|line| serde_json::from_slice::<Line>(line).ok()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lines)
}

/// Reads at most `limit` connections of a VM: the first ones from `from` on, or else the last ones. Also returns where to continue.
pub(crate) fn read(
    directory: &Path,
    vm: VmId,
    from: Option<u64>,
    limit: usize,
) -> io::Result<(Vec<LoggedConnection>, u64)> {
    let mut lines = lines(directory, vm)?;
    let end = lines.last().map_or(0, |line| line.seq + 1);
    match from {
        Some(from) => {
            lines.retain(|line| line.seq >= from);
            lines.truncate(limit);
        }
        None => drop(lines.drain(..lines.len().saturating_sub(limit))),
    }
    let next = lines.last().map_or(from.unwrap_or(end), |line| line.seq + 1);
    Ok((lines.into_iter().map(|line| line.connection).collect(), next))
}

#[cfg(test)]
mod tests {
    use nexus_schema::tools::network::Verdict;

    use super::*;

    fn connection(port: u16) -> LoggedConnection {
        LoggedConnection {
            at: crate::os::clock::now(),
            verdict: Verdict::Denied,
            protocol: "tcp".into(),
            host: "example.org".into(),
            address: None,
            port,
            reason: Some(nexus_schema::network::DenyReason::Private),
        }
    }

    fn ports(read: &(Vec<LoggedConnection>, u64)) -> Vec<u16> {
        read.0.iter().map(|one| one.port).collect()
    }

    #[test]
    fn a_log_goes_on_where_it_was_and_keeps_the_last_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let (path, vm) = (directory.path(), VmId::from_i64(1).unwrap());
        assert_eq!(read(path, vm, None, 9).unwrap(), (vec![], 0));
        let write = |first: u16, last: u16| {
            // Each call begins with no open files, as after a restart of the daemon.
            let mut logs = HashMap::new();
            (first..=last).for_each(|port| append(path, &mut logs, vm, connection(port)).unwrap());
        };
        write(1, 3);
        write(4, 5);
        let last = read(path, vm, None, 2).unwrap();
        assert_eq!((ports(&last), last.1), (vec![4, 5], 5));
        assert_eq!(ports(&read(path, vm, Some(1), 2).unwrap()), [2, 3]);
        assert_eq!(read(path, vm, Some(5), 2).unwrap(), (vec![], 5));
        // An incomplete line.
        std::fs::OpenOptions::new()
            .append(true)
            .open(&files(path, vm)[1])
            .unwrap()
            .write_all(b"{\"seq\":9")
            .unwrap();
        write(6, 6);
        // With thousands of lines there are at most two files, and the numbers continue.
        write(7, 9000);
        let all = read(path, vm, Some(0), usize::MAX).unwrap();
        assert_eq!(ports(&all).last(), Some(&9000));
        let size: u64 = files(path, vm).iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
        assert!((FILE_MAX..=2 * FILE_MAX).contains(&size), "{size}");
    }

    #[test]
    fn the_thread_writes_and_removes() {
        let directory = tempfile::tempdir().unwrap();
        let vm = VmId::from_i64(1).unwrap();
        let writer = Writer::start(directory.path().to_owned());
        let soon = |what: &dyn Fn() -> bool| {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !what() {
                assert!(std::time::Instant::now() < deadline, "the line is written soon");
                std::thread::yield_now();
            }
        };
        writer.write(vm, connection(7));
        soon(&|| ports(&read(directory.path(), vm, None, 9).unwrap()) == [7]);
        writer.remove(vm);
        soon(&|| std::fs::read_dir(directory.path()).unwrap().next().is_none());
    }
}
