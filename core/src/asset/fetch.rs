//! Downloads over HTTP, as the first stage of a pipeline.
//!
//! The network side is async and gives pieces to a blocking reader, which any stages can be put around; interruptions are
//! healed underneath it with `Range` requests, so that the stages see one unbroken stream:
//!
//! ```text
//! [part file of an earlier run] + GET, Range, Range .. ─> channel ─> Read ─> capped ─> hashed ─> (decompressed ..) ─> file, memory
//! ```

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use fs_err as fs;
use reqwest::header;
use reqwest::{StatusCode, Url};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::asset::AssetError;
use crate::asset::stream::{OverLimit, Sha256, capped, hashed};
use crate::op::Progress;

/// How downloads are made.
#[derive(Debug, Clone)]
pub struct FetchSettings {
    /// Which proxy is used.
    pub proxy: ProxySetting,
    /// How long a connection may take.
    pub connect_timeout: Duration,
    /// How long nothing may come.
    pub idle_timeout: Duration,
    /// How long one file may take in all.
    pub deadline: Duration,
    /// How many failures of one file are endured before the download fails.
    pub retries: u32,
    /// How long to wait after the first failure; it doubles with each one, up to 32 times.
    pub backoff: Duration,
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            proxy: ProxySetting::Environment,
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(3600),
            retries: 4,
            backoff: Duration::from_millis(500),
        }
    }
}

/// Which proxy is used.
#[derive(Debug, Clone)]
pub enum ProxySetting {
    /// The one that `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` name; the HTTP client reads them itself.
    Environment,
    /// The one that rules name, and the environment is not asked.
    Rules(Arc<dyn ProxyRules>),
}

/// Rules that name a proxy for an address.
pub trait ProxyRules: std::fmt::Debug + Send + Sync {
    /// The proxy for an address; `None` is a direct connection.
    fn proxy_for(&self, url: &Url) -> Option<Url>;
}

/// What is wanted.
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

/// An address without credentials.
pub(crate) fn shown(url: &Url) -> String {
    if url.username().is_empty() && url.password().is_none() {
        return url.to_string();
    }
    let mut url = url.clone();
    // Both fail only for addresses that cannot have credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// A file that was fetched.
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

/// How many pieces may wait between network and reader.
const PIECES_AHEAD: usize = 32;

impl Fetcher {
    /// A client with these settings.
    pub fn new(settings: FetchSettings) -> Result<Self, AssetError> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            // Another part of the process may have installed one: any will do.
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        let build = || {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("nexus/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(settings.connect_timeout)
                .read_timeout(settings.idle_timeout)
                .redirect(reqwest::redirect::Policy::limited(8))
                .referer(false);
            match &settings.proxy {
                ProxySetting::Environment => builder,
                ProxySetting::Rules(rules) => {
                    let rules = rules.clone();
                    builder.proxy(reqwest::Proxy::custom(move |url| rules.proxy_for(url)))
                }
            }
        };
        // Without any CA certificates on the host the verifier cannot be made: plain HTTP, which package archives use,
        // works all the same; HTTPS then trusts nobody.
        let client = build()
            .build()
            .or_else(|_| build().tls_certs_only([]).build())
            .map_err(|e| AssetError::Transfer { url: "(no address yet)".into(), source: Box::new(e) })?;
        Ok(Self { client, settings: Arc::new(settings) })
    }

    /// Downloads a file into memory.
    pub async fn to_memory(&self, want: &Want, progress: &Progress) -> Result<Vec<u8>, AssetError> {
        let wanted = want.clone();
        self.stream(want, 0, progress, move |pieces| {
            let mut reader = hashed(capped(pieces, wanted.max_bytes));
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map_err(|e| read_error(e, &wanted))?;
            let (digest, length) = reader.finish().map_err(|e| read_error(e, &wanted))?;
            check(&wanted, digest, length)?;
            Ok(bytes)
        })
        .await
    }

    /// Downloads a file to `path`: verified first, then there as a whole. What came of an earlier try that was
    /// interrupted is in `path` + `.part`, and is gone on with where the file's digest is known.
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
            // The part that was there may have been another file's: once more without it.
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
        self.stream(want, have, progress, move |pieces| {
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
            // The part that is there already: hashed, not written again.
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

    /// Runs `consume` on a thread of its own over the file's bytes from `start` on.
    async fn stream<T: Send + 'static>(
        &self,
        want: &Want,
        start: u64,
        progress: &Progress,
        consume: impl FnOnce(Pieces) -> Result<T, AssetError> + Send + 'static,
    ) -> Result<T, AssetError> {
        let (tx, rx) = mpsc::channel(PIECES_AHEAD);
        let consumer =
            tokio::task::spawn_blocking(move || consume(Pieces { rx, current: Bytes::new(), done: false }));
        let deadline = Instant::now() + self.settings.deadline;
        let network = async move {
            tokio::select! {
                result = self.pump(want, start, &tx, progress) => result,
                () = progress.cancelled() => Err(AssetError::Cancelled),
                () = tokio::time::sleep_until(deadline) => {
                    Err(AssetError::Timeout { url: want.shown(), seconds: self.settings.deadline.as_secs() })
                }
            }
            // `tx` is dropped here: a consumer that waits learns that nothing more comes.
        };
        let network = network.await;
        let consumed = consumer.await?;
        match network {
            Ok(Pumped::All) => consumed,
            // The reader wanted no more: its own result says why.
            Ok(Pumped::NotWanted) => consumed,
            Err(error) => Err(error),
        }
    }

    /// Sends the file's bytes from `start` on, through as many requests as it takes.
    async fn pump(
        &self,
        want: &Want,
        start: u64,
        tx: &mpsc::Sender<Piece>,
        progress: &Progress,
    ) -> Result<Pumped, AssetError> {
        let mut at = Position { sent: start, total: want.size, validator: None };
        let mut failures = 0;
        loop {
            if want.size.is_some_and(|size| at.sent >= size) {
                return Ok(if tx.send(Piece::End).await.is_ok() { Pumped::All } else { Pumped::NotWanted });
            }
            let attempt = match self.attempt(want, &mut at, tx, progress).await {
                Ok(pumped) => return Ok(pumped),
                Err(attempt) => attempt,
            };
            let (error, wait) = match attempt {
                Attempt::Final(error) => return Err(error),
                Attempt::Again(error, wait) => (error, wait),
            };
            failures += 1;
            if failures > self.settings.retries {
                return Err(error);
            }
            let backoff = self.settings.backoff * 2u32.pow((failures - 1).min(5));
            tracing::debug!(url = want.shown(), sent = at.sent, failures, %error, "download interrupted");
            tokio::time::sleep(wait.unwrap_or(backoff).min(MAX_WAIT).max(backoff)).await;
        }
    }

    /// One request.
    async fn attempt(
        &self,
        want: &Want,
        at: &mut Position,
        tx: &mpsc::Sender<Piece>,
        progress: &Progress,
    ) -> Result<Pumped, Attempt> {
        let mut request = self.client.get(want.url.clone());
        if at.sent > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", at.sent));
            if let Some(validator) = &at.validator {
                request = request.header(header::IF_RANGE, validator);
            }
        }
        let again = |e: reqwest::Error| {
            let error = AssetError::Transfer { url: want.shown(), source: Box::new(e.without_url()) };
            Attempt::Again(error, None)
        };
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(e) if e.is_builder() || e.is_redirect() => {
                let error = AssetError::Transfer { url: want.shown(), source: Box::new(e.without_url()) };
                return Err(Attempt::Final(error));
            }
            Err(e) => return Err(again(e)),
        };
        let mut skip = self.begin(want, at, &response)?;
        while let Some(mut piece) = response.chunk().await.map_err(again)? {
            let skipped = skip.min(piece.len() as u64);
            skip -= skipped;
            let piece = piece.split_off(usize::try_from(skipped).unwrap_or(usize::MAX));
            if piece.is_empty() {
                continue;
            }
            at.sent += piece.len() as u64;
            if at.sent > want.max_bytes || want.size.is_some_and(|size| at.sent > size) {
                return Err(Attempt::Final(too_long(want, at.sent)));
            }
            progress.advance(at.sent, at.total);
            if tx.send(Piece::Data(piece)).await.is_err() {
                return Ok(Pumped::NotWanted);
            }
        }
        if let Some(total) = at.total
            && at.sent < total
        {
            let error = AssetError::Length { what: want.shown(), expected: total, found: at.sent };
            return Err(Attempt::Again(error, None));
        }
        Ok(if tx.send(Piece::End).await.is_ok() { Pumped::All } else { Pumped::NotWanted })
    }

    /// Looks at a response's head; gives how many of its bytes are known already.
    fn begin(&self, want: &Want, at: &mut Position, response: &reqwest::Response) -> Result<u64, Attempt> {
        let status = response.status();
        let error = AssetError::Status { url: want.shown(), status: status.as_u16() };
        let skip = match status {
            StatusCode::OK => at.sent,
            StatusCode::PARTIAL_CONTENT if range_start(response) == Some(at.sent) => 0,
            // What is there no longer fits: the check at the end says so, and the caller begins anew.
            StatusCode::RANGE_NOT_SATISFIABLE => return Err(Attempt::Final(too_long(want, at.sent))),
            s if s.is_server_error()
                || matches!(
                    s,
                    StatusCode::REQUEST_TIMEOUT
                        | StatusCode::TOO_MANY_REQUESTS
                        | StatusCode::PARTIAL_CONTENT
                        | StatusCode::TOO_EARLY
                ) =>
            {
                let wait = response.headers().get(header::RETRY_AFTER);
                let wait = wait.and_then(|v| v.to_str().ok()?.trim().parse().ok()).map(Duration::from_secs);
                return Err(Attempt::Again(error, wait));
            }
            _ => return Err(Attempt::Final(error)),
        };
        if let Some(length) = response.content_length() {
            let total = if skip > 0 { length } else { at.sent.saturating_add(length) };
            if want.size.is_some_and(|size| size != total) || total > want.max_bytes {
                return Err(Attempt::Final(too_long(want, total)));
            }
            at.total = Some(total);
        }
        let strong = |v: &&header::HeaderValue| !v.as_bytes().starts_with(b"W/");
        let headers = response.headers();
        at.validator =
            headers.get(header::ETAG).filter(strong).or(headers.get(header::LAST_MODIFIED)).cloned();
        Ok(skip)
    }
}

/// How long a server may make a download wait.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// How far a download is.
struct Position {
    sent: u64,
    total: Option<u64>,
    validator: Option<header::HeaderValue>,
}

/// How an attempt failed.
enum Attempt {
    /// For good.
    Final(AssetError),
    /// In a way that may pass, perhaps after a time that the server named.
    Again(AssetError, Option<Duration>),
}

/// How pumping ended well.
enum Pumped {
    /// All bytes were sent.
    All,
    /// The reader is gone.
    NotWanted,
}

/// What goes through the channel. Its closing without an end is an interruption.
enum Piece {
    Data(Bytes),
    End,
}

/// The reading end of a download.
struct Pieces {
    rx: mpsc::Receiver<Piece>,
    current: Bytes,
    done: bool,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.done {
            match self.rx.blocking_recv() {
                Some(Piece::Data(bytes)) => self.current = bytes,
                Some(Piece::End) => self.done = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let n = buf.len().min(self.current.len());
        buf[..n].copy_from_slice(&self.current.split_to(n));
        Ok(n)
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
    }
}

fn read_error(error: io::Error, want: &Want) -> AssetError {
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

/// Whether what came is not what was wanted, and thus nothing to go on with.
fn is_another_file(error: &AssetError) -> bool {
    matches!(error, AssetError::Checksum { .. } | AssetError::Length { .. } | AssetError::TooLarge { .. })
}

/// Where a partial response begins: `bytes 100-199/200` is 100.
fn range_start(response: &reqwest::Response) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// The name of a file that is not whole yet.
fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

#[cfg(test)]
mod tests;
