//! Reads the output of commands to its end, so that no command is blocked by a slow reader unless it should be.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_schema::tools::command::LogFacts;
use nexus_wire::block::Block;
use nexus_wire::frames::{FULL, PIECE, whole};

use super::attach::Sink;
use super::command::{Command, Stream};
use super::streams::End;
use super::table::Table;
use crate::os::reason;

/// The size of one read, in bytes: one frame, and nearly the capacity of a pipe.
const CHUNK: usize = PIECE;
/// How long the rest of much output waits for more: a packet with little of it costs a client's stream nearly as much as a full one.
const GATHERING: Duration = Duration::from_millis(1);
/// How long a stream of an ended command must be silent before reading stops.
const DRAIN_QUIET: Duration = Duration::from_millis(100);
/// How long such a stream is read at most.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// The file that gets all output of a command.
#[derive(Debug)]
pub(super) struct Log {
    file: Arc<File>,
    path: PathBuf,
    written: AtomicU64,
    problem: Mutex<Option<String>>,
    is_broken: AtomicBool,
}

impl Log {
    pub(super) fn new(file: File) -> Self {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
        Self {
            file: Arc::new(file),
            path,
            written: AtomicU64::new(0),
            problem: Mutex::default(),
            is_broken: AtomicBool::new(false),
        }
    }

    pub(super) fn facts(&self) -> LogFacts {
        LogFacts {
            path: self.path.to_string_lossy().into_owned(),
            written_bytes: self.written.load(Ordering::Acquire),
            problem: self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Appends output. After a failure the rest is skipped, so that the file has the start of the output without gaps.
    async fn write(&self, bytes: Vec<u8>) {
        if self.is_broken.load(Ordering::Acquire) {
            return;
        }
        let (file, length) = (self.file.clone(), bytes.len() as u64);
        let written = tokio::task::spawn_blocking(move || (&*file).write_all(&bytes)).await;
        let problem = match written {
            Ok(Ok(())) => {
                self.written.fetch_add(length, Ordering::AcqRel);
                return;
            }
            Ok(Err(error)) => reason(&error),
            Err(_) => "the writer failed".to_owned(),
        };
        self.is_broken.store(true, Ordering::Release);
        // What was written before the failure is in the file.
        self.written.store(self.file.metadata().map_or(0, |metadata| metadata.len()), Ordering::Release);
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
    }
}

/// Reads one stream until it ends.
pub(super) async fn read(end: End, command: Arc<Command>, at: u8, table: Arc<Table>) {
    let stream = &command.streams[usize::from(at)];
    let mut is_bulk = false;
    loop {
        if is_bulk && end.unread() < FULL as u64 {
            // On a single processor the command writes as much as it can now, instead of being interrupted after each of its writes.
            rustix::thread::sched_yield();
        }
        let is_rest = is_bulk && end.gather(FULL, GATHERING).await;
        // The only failure of a pipe is its end.
        let most = stream.room(command.limits.keep).await.min(CHUNK);
        let Ok(Piece { length: length @ 1.., until, sink }) =
            read_some(&end, &command, at, &table, (most, is_rest)).await
        else {
            break;
        };
        is_bulk = sink.is_some() && length >= FULL;
        if let Some((sink, bytes)) = sink {
            sink.deliver(at, &bytes).await;
            stream.was_read(until);
        }
        command.seen.fetch_add(length as u64, Ordering::AcqRel);
        command.newest.store(at, Ordering::Release);
        command.changed();
        // A command that writes without a pause must not block the others.
        tokio::task::yield_now().await;
    }
    stream.close();
    command.changed();
}

/// The result of one read.
struct Piece {
    length: usize,
    /// The offset of its end in the stream.
    until: u64,
    /// The client that gets every byte, and the bytes.
    sink: Option<(Arc<Sink>, Bytes)>,
}

/// Reads what is available and keeps it; if a client gets every byte, also returns it, and of much output reads only what fills packets. With
/// `is_rest` there may be something without news of it.
async fn read_some(
    end: &End,
    command: &Command,
    at: u8,
    table: &Table,
    (most, is_rest): (usize, bool),
) -> std::io::Result<Piece> {
    thread_local! {
        /// One buffer for all: there is no await between filling and emptying it.
        static CHUNKS: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
    }
    let stream = &command.streams[usize::from(at)];
    let mut piece = Piece { length: 0, until: 0, sink: None };
    let mut taken = Vec::new();
    end.read_rest_with(is_rest, |read| {
        let is_kept = !command.is_forgotten.load(Ordering::Acquire);
        // An attaching client gets what is kept at that moment, and everything that is read later.
        let sink = command.exact();
        match &*sink {
            Some(sink) => {
                let there = usize::try_from(end.unread()).unwrap_or(usize::MAX);
                let mut block = Block::new();
                let length = read(&mut block.room()[..most.min(whole(there))])?;
                block.fill(length);
                let bytes = block.freeze();
                if command.log.is_some() {
                    taken = bytes.to_vec();
                }
                if is_kept {
                    table.keep(stream, |kept| kept.share(&bytes));
                }
                piece = Piece { length, until: stream.kept().total(), sink: Some((sink.clone(), bytes)) };
                Ok(length)
            }
            None => CHUNKS.with_borrow_mut(|chunk| -> std::io::Result<usize> {
                let length = read(&mut chunk[..most])?;
                if command.log.is_some() {
                    taken = chunk[..length].to_vec();
                }
                if is_kept {
                    table.keep(stream, |kept| kept.push(&chunk[..length]));
                }
                piece = Piece { length, until: stream.kept().total(), sink: None };
                Ok(length)
            }),
        }
    })
    .await?;
    if let (Some(log), true) = (&command.log, piece.length > 0) {
        log.write(taken).await;
    }
    Ok(piece)
}

/// Waits until the streams of an ended command have been read, or are silent but kept open by a process that it left behind.
pub(super) async fn drain(command: &Command) {
    let mut watch = command.watch();
    let wait = async {
        while !command.streams.iter().all(Stream::is_closed) {
            let before = command.seen.load(Ordering::Acquire);
            watch.mark_unchanged();
            if command.streams.iter().all(Stream::is_closed) {
                break;
            }
            let quiet = tokio::time::timeout(DRAIN_QUIET, watch.changed()).await.is_err();
            if quiet && command.seen.load(Ordering::Acquire) == before {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_MAX, wait).await;
}
