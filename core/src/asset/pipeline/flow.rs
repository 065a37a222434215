//! Moves the bytes through a pipeline, on a blocking thread.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt as _;
use nexus_schema::tools::asset::AssetFile;
use sha2::Digest as _;

use super::documents::Resolved;
use super::{Job, extract};
use crate::asset::AssetError;
use crate::asset::error::PackageProblem;
use crate::asset::provider::{Expect, Format, Plan, Taken};
use crate::asset::read_ahead::{ReadAhead, read_ahead};
use crate::asset::stream::{Compression, Sha256, decompressed, hashed};
use crate::asset::xz::{Blocks, Unkept};
use crate::os::failpoint;
use crate::progress::Progress;

/// How many bytes are moved at a time.
const PIECE: usize = 256 << 10;
/// Written data is flushed to disk after this many bytes.
const FLUSH: u64 = 32 << 20;

/// One run: what happens to the bytes of one source.
pub(super) struct Flow {
    what: String,
    part: Option<(PathBuf, u64)>,
    max_bytes: u64,
    decompress: Option<Format>,
    max_unpacked: u64,
    extract: Vec<Taken>,
    raw: Vec<Sha256>,
    unpacked: Vec<Sha256>,
    given: Option<Sha256>,
    into: PathBuf,
    name: &'static str,
    executable: bool,
    progress: Progress,
}

/// The result of a run.
#[derive(Debug)]
pub(super) struct Flowed {
    pub(super) files: Vec<AssetFile>,
    pub(super) raw: (Sha256, u64),
}

impl Flow {
    pub(super) fn new(
        job: &Job,
        plan: &Plan,
        resolved: &Resolved,
        what: &str,
        part: Option<(PathBuf, u64)>,
        progress: &Progress,
    ) -> Self {
        let takes_given = plan.raw.iter().chain(&plan.unpacked).any(|check| check.expect == Expect::Given);
        debug_assert!(takes_given || job.sha256.is_none() || plan.is_checked());
        Self {
            what: what.to_owned(),
            part,
            max_bytes: plan.max_bytes,
            decompress: plan.decompress,
            max_unpacked: plan.max_unpacked,
            extract: plan.extract.clone(),
            raw: resolved.raw.clone(),
            unpacked: resolved.unpacked.clone(),
            given: job.sha256,
            into: job.into.clone(),
            name: job.name,
            executable: job.executable,
            progress: progress.clone(),
        }
    }

    /// Moves the bytes all the way: into the files, and through the checks.
    pub(super) fn run(self, source: impl Read + Send + 'static) -> Result<Flowed, AssetError> {
        let doing = AssetError::io("write a download");
        fs::create_dir_all(&self.into).map_err(&doing)?;
        let (old, file): (Box<dyn Read + Send>, _) = match &self.part {
            Some((path, have)) => {
                let file = fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)
                    .map_err(&doing)?;
                file.set_len(*have).map_err(&doing)?;
                let old = fs::File::open(path).map_err(&doing)?.take(*have);
                let mut file = file;
                io::Seek::seek(&mut file, io::SeekFrom::Start(*have)).map_err(&doing)?;
                (Box::new(old), Some((file, *have)))
            }
            None => (Box::new(io::empty()), None),
        };
        let raw = Raw::new(Box::new(old.chain(source)), file, self.max_bytes, self.progress.clone());
        let outcome = self.write(&raw);
        // The downloaded file includes bytes that the decoder did not need. And if the bytes cannot be decoded, the
        // error first says whether their digest was right.
        if matches!(outcome, Ok(_) | Err(AssetError::Package { .. })) {
            match raw.drain() {
                Ok(()) => {
                    failpoint::reach("download-arrived");
                    self.check(&self.raw, raw.digest().0)?;
                }
                Err(e) if outcome.is_ok() => return Err(self.read_error(&raw, e)),
                Err(_) => {}
            }
        }
        let (files, unpacked) = outcome?;
        self.check(&self.unpacked, unpacked)?;
        let digest = raw.digest();
        if let Some(given) = self.given
            && given != unpacked
        {
            self.check(&[given], digest.0)?;
        }
        self.progress.check()?;
        failpoint::reach("download-checked");
        Ok(Flowed { files, raw: digest })
    }

    fn check(&self, expected: &[Sha256], found: Sha256) -> Result<(), AssetError> {
        match expected.iter().find(|expected| **expected != found) {
            Some(expected) => {
                Err(AssetError::Checksum { what: self.what.clone(), expected: *expected, found })
            }
            None => Ok(()),
        }
    }

    /// Writes the files from the raw bytes; also returns the digest of the unpacked bytes.
    fn write(&self, raw: &Raw) -> Result<(Vec<AssetFile>, Sha256), AssetError> {
        let read_error = |e| self.read_error(raw, e);
        let inner = self.unpack(raw).map_err(read_error)?;
        let mut bounded =
            Bounded { inner, left: self.max_unpacked, limit: self.max_unpacked, raw: raw.clone() };
        if self.extract.is_empty() {
            let (file, digest) =
                write_file(&mut bounded, &self.into, self.name, self.executable, &read_error)?;
            return Ok((vec![file], digest));
        }
        let mut unpacked = hashed(bounded);
        let files = extract::files(&mut unpacked, &self.extract, &self.into, &self.what, &read_error)?;
        let (digest, _) = unpacked.finish().map_err(read_error)?;
        Ok((files, digest))
    }

    /// The bytes to store. One thread receives them, another decompresses.
    fn unpack(&self, raw: &Raw) -> io::Result<ReadAhead> {
        let Some(format) = self.decompress else { return read_ahead(raw.clone()) };
        let start = start_of(&mut raw.clone())?;
        let compression = format.of(&start);
        let packed = read_ahead(io::Cursor::new(start).chain(raw.clone()))?;
        match compression {
            Compression::Plain => Ok(packed),
            Compression::Xz => {
                let packed = io::BufReader::with_capacity(PIECE, packed);
                read_ahead(Blocks::new(packed, self.into.clone(), self.max_unpacked)?)
            }
            compression => read_ahead(decompressed(packed, compression)?),
        }
    }

    /// The error for a failed read: a full disk, a limit, an interrupted download, or malformed bytes.
    fn read_error(&self, raw: &Raw, error: io::Error) -> AssetError {
        let what = self.what.clone();
        match raw.stopped() {
            Some(Stopped::Write(error)) => AssetError::io("write a download")(error),
            Some(Stopped::Over(limit)) => AssetError::TooLarge { what, limit },
            Some(Stopped::Source(error)) => AssetError::Transfer { url: what, source: Box::new(error) },
            Some(Stopped::Cancelled) => AssetError::Cancelled,
            None => match Unkept::in_error(&error) {
                Some(error) => AssetError::io("write a download")(error),
                None => AssetError::Package { package: what, problem: PackageProblem::Data(error) },
            },
        }
    }
}

/// Writes one file of an asset while hashing it; it is synced to disk when this returns. Also returns its own digest.
pub(super) fn write_file(
    reader: &mut dyn Read,
    into: &Path,
    name: &str,
    executable: bool,
    read_error: &dyn Fn(io::Error) -> AssetError,
) -> Result<(AssetFile, Sha256), AssetError> {
    let doing = AssetError::io("write an asset");
    let mode = if executable { 0o755 } else { 0o644 };
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let mut file = options.open(into.join(name)).map_err(&doing)?;
    let mut flusher = None;
    let mut hasher = sha2::Sha256::new();
    let mut size_bytes = 0;
    let mut buffer = vec![0; PIECE];
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(read_error(e)),
        };
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n]).map_err(&doing)?;
        failpoint::reach("download-unpacking");
        let before = size_bytes / FLUSH;
        size_bytes += n as u64;
        if size_bytes / FLUSH > before {
            let flusher = match &mut flusher {
                Some(flusher) => flusher,
                none => none.insert(Flusher::start(&file).map_err(&doing)?),
            };
            flusher.flush();
        }
    }
    if let Some(flusher) = flusher {
        flusher.finish().map_err(&doing)?;
    }
    file.sync_data().map_err(&doing)?;
    let digest = Sha256(hasher.finalize().into());
    Ok((AssetFile { name: name.to_owned(), sha256: digest.to_string(), size_bytes }, digest))
}

/// Syncs a file to disk while it is still being written, so that little is left to sync at the end.
struct Flusher {
    turns: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    fn start(file: &fs::File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (turns, received) = sync_channel(1);
        let thread = thread::Builder::new().name("flush".into());
        let thread = thread.spawn(move || received.iter().try_for_each(|()| file.sync_data()))?;
        Ok(Self { turns, thread })
    }

    /// Requests a sync; one that is already pending covers this one too.
    fn flush(&self) {
        // If the thread ended, it failed; `finish` returns the error.
        let _ = self.turns.try_send(());
    }

    /// Waits for the last sync. The kernel reports a write error only once, so it must not be lost.
    fn finish(self) -> io::Result<()> {
        drop(self.turns);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the pipeline ended")))
    }
}

/// The first bytes, enough to detect a compression.
fn start_of(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    reader.take(8).read_to_end(&mut start)?;
    Ok(start)
}

/// Why the bytes stopped. It is kept separately, because readers may hide it in an error of their own.
#[derive(Debug)]
enum Stopped {
    /// The part file cannot be written.
    Write(io::Error),
    /// The download or the unpacked data exceeds its limit.
    Over(u64),
    /// The download was interrupted, or the file cannot be read.
    Source(io::Error),
    Cancelled,
}

/// The raw bytes: hashed, capped, and copied to the part file. Clones share one stream.
#[derive(Clone)]
struct Raw {
    state: Arc<Mutex<RawState>>,
    /// Not in the state, which stays locked while a read waits for data.
    stopped: Arc<Mutex<Option<Stopped>>>,
}

struct RawState {
    inner: Box<dyn Read + Send>,
    hasher: sha2::Sha256,
    bytes: u64,
    limit: u64,
    /// The part file, and its length at the start.
    part: Option<(fs::File, u64)>,
    progress: Progress,
}

impl Raw {
    fn new(
        inner: Box<dyn Read + Send>,
        part: Option<(fs::File, u64)>,
        limit: u64,
        progress: Progress,
    ) -> Self {
        let hasher = sha2::Sha256::new();
        let state = RawState { inner, hasher, bytes: 0, limit, part, progress };
        Self { state: Arc::new(Mutex::new(state)), stopped: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, RawState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, stopped: Stopped) {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(stopped);
    }

    /// Reads what is left.
    fn drain(&self) -> io::Result<()> {
        let mut buffer = vec![0; PIECE];
        let mut rest = self.clone();
        while rest.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// The digest and the number of bytes so far.
    fn digest(&self) -> (Sha256, u64) {
        let state = self.state();
        (Sha256(state.hasher.clone().finalize().into()), state.bytes)
    }

    /// Records that the unpacked data exceeds its limit.
    fn note_over(&self, limit: u64) {
        self.stop(Stopped::Over(limit));
    }

    fn stopped(&self) -> Option<Stopped> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Read for Raw {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let result = self.state().step(buf);
        result.map_err(|stopped| {
            let error = match &stopped {
                Stopped::Write(e) | Stopped::Source(e) => io::Error::from(e.kind()),
                Stopped::Over(_) | Stopped::Cancelled => io::Error::other("stopped"),
            };
            self.stop(stopped);
            error
        })
    }
}

impl RawState {
    fn step(&mut self, buf: &mut [u8]) -> Result<usize, Stopped> {
        self.progress.check().map_err(|_| Stopped::Cancelled)?;
        let n = loop {
            match self.inner.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(Stopped::Source)?,
            }
        };
        if self.bytes + n as u64 > self.limit {
            return Err(Stopped::Over(self.limit));
        }
        self.hasher.update(&buf[..n]);
        if let Some((file, had)) = &mut self.part
            && self.bytes >= *had
        {
            file.write_all(&buf[..n]).map_err(Stopped::Write)?;
            failpoint::reach("download-piece");
        }
        self.bytes += n as u64;
        Ok(n)
    }
}

/// The unpacked data, up to a limit.
struct Bounded {
    inner: ReadAhead,
    left: u64,
    limit: u64,
    raw: Raw,
}

impl Read for Bounded {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                self.raw.note_over(self.limit);
                return Err(io::Error::other("over the limit"));
            }
        }
        Ok(n)
    }
}

/// A file of the host that reports how far it was read.
pub(super) struct Watched<R> {
    pub(super) inner: R,
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) progress: Progress,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.done += n as u64;
        self.progress.advance(self.done, Some(self.total));
        Ok(n)
    }
}
