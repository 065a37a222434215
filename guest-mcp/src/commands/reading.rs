//! Reads what a command writes to its end, so that no command ever waits for a reader.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_schema::tools::command::LogFacts;

use super::attach::Sink;
use super::command::{Command, Stream};
use super::streams::End;
use super::table::Table;
use crate::os::reason;

/// How much is read at once, in bytes: what a pipe holds.
const CHUNK: usize = 256 << 10;
/// How long to wait for more output of a command that ended, each time that some came.
const DRAIN_QUIET: Duration = Duration::from_millis(100);
/// How long to wait for it in all.
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

    /// Appends. After a failure the rest is left out, so that what is there is the start of all.
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
        // What fitted before it failed is there.
        self.written.store(self.file.metadata().map_or(0, |metadata| metadata.len()), Ordering::Release);
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
    }
}

/// Reads one stream to its end.
pub(super) async fn read(end: End, command: Arc<Command>, at: u8, table: Arc<Table>) {
    let stream = &command.streams[usize::from(at)];
    let mut own = Vec::new();
    loop {
        // A pipe fails in no other way than by its end.
        let most = stream.room(command.limits.keep).await.min(CHUNK);
        let Ok(Piece { length: length @ 1.., until, sink }) =
            read_some(&end, &command, at, &table, &mut own, most).await
        else {
            break;
        };
        if let Some(sink) = sink {
            sink.deliver(at, &own[..length]).await;
            stream.was_read(until);
        }
        command.seen.fetch_add(length as u64, Ordering::AcqRel);
        command.newest.store(at, Ordering::Release);
        command.changed();
        // One that writes without a pause keeps nobody else.
        tokio::task::yield_now().await;
    }
    stream.close();
    command.changed();
}

/// What was read at once.
struct Piece {
    length: usize,
    /// Where in the stream it ends.
    until: u64,
    /// Who gets it to the byte.
    sink: Option<Arc<Sink>>,
}

/// Reads what is there, keeps it, and leaves it in `own` if somebody is attached.
async fn read_some(
    end: &End,
    command: &Command,
    at: u8,
    table: &Table,
    own: &mut Vec<u8>,
    most: usize,
) -> std::io::Result<Piece> {
    thread_local! {
        /// One for all: nothing is between reading into it and taking it out.
        static CHUNKS: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
    }
    let stream = &command.streams[usize::from(at)];
    let mut piece = Piece { length: 0, until: 0, sink: None };
    let mut taken = Vec::new();
    end.read_with(|read| {
        let mut take = |chunk: &mut [u8]| {
            piece.length = read(&mut chunk[..most])?;
            if command.log.is_some() {
                taken = chunk[..piece.length].to_vec();
            }
            if !command.is_forgotten.load(Ordering::Acquire) {
                table.keep(stream, &chunk[..piece.length]);
            }
            piece.until = stream.kept().total();
            Ok(piece.length)
        };
        // Whoever attaches gets what is kept by then, and all that is read later.
        let sink = command.exact();
        match &*sink {
            Some(sink) => {
                own.resize(CHUNK, 0);
                let length = take(own)?;
                piece.sink = Some(sink.clone());
                Ok(length)
            }
            None => CHUNKS.with_borrow_mut(|chunk| take(chunk)),
        }
    })
    .await?;
    if let (Some(log), true) = (&command.log, piece.length > 0) {
        log.write(taken).await;
    }
    Ok(piece)
}

/// Waits until the streams of a command that ended are read, or until a process that it left behind keeps them open in silence.
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
