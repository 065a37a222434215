//! Downloads over HTTP, as the first stage of a pipeline.
//!
//! The network side is async and feeds a blocking reader, which can be wrapped in any stages. Interruptions are resumed
//! underneath with `Range` requests, so the stages see one continuous stream:
//!
//! ```text
//! [part file of an earlier run] + GET, Range, Range .. ─> channel ─> Read ─> capped ─> hashed ─> (decompressed ..) ─> file, memory
//! ```

mod pump;

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use reqwest::Url;
use reqwest::header::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::asset::AssetError;
use crate::asset::stream::{OverLimit, Sha256, capped, hashed};
pub use crate::config::{FetchSettings, ProxyRules, ProxySetting};
use crate::os::failpoint;
use crate::progress::Progress;

pub(crate) use crate::os::shown::shown;
use pump::Pumped;
pub(crate) use pump::{OnHead, Pieces, Start};

/// A file to download.
#[derive(Debug, Clone)]
pub struct Want {
    /// Its address.
    pub url: Url,
    /// Its length, where it is known.
    pub size: Option<u64>,
    /// Its digest, where it is known.
    pub sha256: Option<Sha256>,
    /// How many bytes it may have at most.
    pub max_bytes: u64,
}

impl Want {
    /// The address without credentials, for messages and logs.
    fn shown(&self) -> String {
        shown(&self.url)
    }
}

/// A downloaded file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Where it is.
    pub path: PathBuf,
    /// Its digest.
    pub sha256: Sha256,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// The version of the package that it comes from, if it comes from one.
    pub version: Option<String>,
}

/// A client for downloads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Fetcher {
    client: reqwest::Client,
    settings: Arc<FetchSettings>,
}

/// How many pieces may be buffered between network and reader.
const PIECES_AHEAD: usize = 8;

impl Fetcher {
    /// A client with these settings.
    pub fn new(settings: FetchSettings) -> Result<Self, AssetError> {
        let client = settings.trust.client(|builder| {
            let builder =
                builder.connect_timeout(settings.connect_timeout).read_timeout(settings.idle_timeout);
            match &settings.proxy {
                ProxySetting::Environment => builder,
                ProxySetting::Rules(rules) => {
                    let rules = rules.clone();
                    builder.proxy(reqwest::Proxy::custom(move |url| rules.proxy_for(url)))
                }
            }
        });
        let client = client
            .map_err(|e| AssetError::Transfer { url: "(no address yet)".into(), source: Box::new(e) })?;
        Ok(Self { client, settings: Arc::new(settings) })
    }

    /// Downloads a file into memory.
    pub async fn to_memory(&self, want: &Want, progress: &Progress) -> Result<Vec<u8>, AssetError> {
        self.to_memory_with(want, &HeaderMap::new(), progress).await
    }

    /// The same, with additional headers.
    pub(crate) async fn to_memory_with(
        &self,
        want: &Want,
        headers: &HeaderMap,
        progress: &Progress,
    ) -> Result<Vec<u8>, AssetError> {
        let mut tries = 0;
        loop {
            let wanted = want.clone();
            let start = Start { headers: headers.clone(), ..Start::default() };
            let result = self
                .stream(want, &start, progress, move |pieces| {
                    let mut reader = hashed(capped(pieces, wanted.max_bytes));
                    let mut bytes = Vec::new();
                    reader.read_to_end(&mut bytes).map_err(|e| read_error(e, &wanted))?;
                    let (digest, length) = reader.finish().map_err(|e| read_error(e, &wanted))?;
                    check(&wanted, digest, length)?;
                    Ok(bytes)
                })
                .await;
            tries += 1;
            match result {
                Err(AssetError::Changed { .. }) if tries <= self.settings.retries => {}
                result => return result,
            }
        }
    }

    /// Downloads a file to `path`, which appears only once the file is complete and verified. An interrupted download leaves
    /// `path` + `.part`; if the file's digest is known, a later one resumes it.
    pub async fn to_file(
        &self,
        want: &Want,
        path: &Path,
        progress: &Progress,
    ) -> Result<Fetched, AssetError> {
        let part = part_of(path);
        let have = match (want.sha256, fs::metadata(&part)) {
            (Some(_), Ok(meta)) if want.size.is_none_or(|size| meta.len() <= size) => meta.len(),
            _ => 0,
        };
        let mut result = self.to_file_after(want, path, &part, have, progress).await;
        if have > 0 && result.as_ref().is_err_and(is_another_file) {
            // The partial file may belong to an older version: retry without it.
            result = self.to_file_after(want, path, &part, 0, progress).await;
        }
        if result.as_ref().is_err_and(is_another_file) {
            let _ = fs::remove_file(&part);
        }
        result
    }

    async fn to_file_after(
        &self,
        want: &Want,
        path: &Path,
        part: &Path,
        have: u64,
        progress: &Progress,
    ) -> Result<Fetched, AssetError> {
        let (wanted, path, part) = (want.clone(), path.to_owned(), part.to_owned());
        let start = Start { at: have, ..Start::default() };
        self.stream(want, &start, progress, move |pieces| {
            let doing = AssetError::io("write a download");
            let mut file = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&part)
                .map_err(&doing)?;
            file.set_len(have).map_err(&doing)?;
            let old = fs::File::open(&part).map_err(&doing)?.take(have);
            let mut reader = hashed(capped(old.chain(pieces), wanted.max_bytes));
            // The partial file is hashed, but not written again.
            io::copy(&mut (&mut reader).take(have), &mut io::sink()).map_err(|e| read_error(e, &wanted))?;
            file.seek(SeekFrom::Start(have)).map_err(&doing)?;
            copy(&mut reader, &mut file, &wanted, &doing)?;
            let (sha256, size_bytes) = reader.finish().map_err(|e| read_error(e, &wanted))?;
            check(&wanted, sha256, size_bytes)?;
            file.sync_data().map_err(&doing)?;
            fs::rename(&part, &path).map_err(&doing)?;
            Ok(Fetched { path, sha256, size_bytes, version: None })
        })
        .await
    }

    /// Runs `consume` on a blocking thread, over the file's bytes from the beginning.
    pub(crate) async fn stream<T: Send + 'static>(
        &self,
        want: &Want,
        start: &Start,
        progress: &Progress,
        consume: impl FnOnce(Pieces) -> Result<T, AssetError> + Send + 'static,
    ) -> Result<T, AssetError> {
        let (tx, rx) = mpsc::channel(PIECES_AHEAD);
        let consumer = tokio::task::spawn_blocking(move || consume(Pieces::new(rx)));
        let deadline = Instant::now() + self.settings.deadline;
        let network = async move {
            tokio::select! {
                result = self.pump(want, start, &tx, progress) => result,
                () = progress.cancelled() => Err(AssetError::Cancelled),
                () = tokio::time::sleep_until(deadline) => {
                    Err(AssetError::Timeout { url: want.shown(), seconds: self.settings.deadline.as_secs() })
                }
            }
            // `tx` is dropped here, so a waiting consumer sees the end of the stream.
        };
        let network = network.await;
        let consumed = consumer.await?;
        match network {
            Ok(Pumped::All) => consumed,
            // The reader stopped early: its own result says why.
            Ok(Pumped::NotWanted) => consumed,
            Err(error) => Err(error),
        }
    }
}

/// The digest and the length of a file of the host.
pub(crate) fn hash_file(path: &Path, progress: &Progress) -> Result<(Sha256, u64), AssetError> {
    let doing = AssetError::io("hash a file");
    let mut reader = hashed(fs::File::open(path).map_err(&doing)?);
    let total = fs::metadata(path).map_err(&doing)?.len();
    let (mut buffer, mut done) = (vec![0; 256 << 10], 0);
    loop {
        progress.check()?;
        match reader.read(&mut buffer).map_err(&doing)? {
            0 => return reader.finish().map_err(&doing),
            n => done += n as u64,
        }
        progress.advance(done, Some(total));
    }
}

/// Copies to a file, keeping errors of reading and of writing apart.
fn copy(
    reader: &mut impl Read,
    file: &mut impl Write,
    want: &Want,
    doing: &impl Fn(io::Error) -> AssetError,
) -> Result<(), AssetError> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) => return Err(read_error(e, want)),
        };
        file.write_all(&buffer[..n]).map_err(doing)?;
        failpoint::reach("package-piece");
    }
}

pub(crate) fn read_error(error: io::Error, want: &Want) -> AssetError {
    match OverLimit::in_error(&error) {
        Some(OverLimit { limit }) => AssetError::TooLarge { what: want.shown(), limit },
        None => AssetError::Transfer { url: want.shown(), source: Box::new(error) },
    }
}

fn too_long(want: &Want, found: u64) -> AssetError {
    match want.size {
        Some(expected) => AssetError::Length { what: want.shown(), expected, found },
        None => AssetError::TooLarge { what: want.shown(), limit: want.max_bytes },
    }
}

fn check(want: &Want, found: Sha256, length: u64) -> Result<(), AssetError> {
    if let Some(expected) = want.size
        && expected != length
    {
        return Err(AssetError::Length { what: want.shown(), expected, found: length });
    }
    match want.sha256 {
        Some(expected) if expected != found => {
            Err(AssetError::Checksum { what: want.shown(), expected, found })
        }
        _ => Ok(()),
    }
}

/// Whether the received bytes belong to another file, so that there is nothing to resume.
fn is_another_file(error: &AssetError) -> bool {
    matches!(error, AssetError::Checksum { .. } | AssetError::Length { .. } | AssetError::TooLarge { .. })
}

/// The name of an incomplete file.
fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

#[cfg(test)]
mod tests;
