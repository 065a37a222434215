//! The network side of a download: requests, interruptions and resuming.

use std::io::{self, Read};
use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderValue};
use tokio::sync::mpsc;

use super::{Fetcher, Want, too_long};
use crate::asset::AssetError;
use crate::os::tls;
use crate::progress::Progress;

impl Fetcher {
    /// Sends the file's bytes from the beginning, with as many requests as needed.
    pub(super) async fn pump(
        &self,
        want: &Want,
        start: &Start,
        tx: &mpsc::Sender<Piece>,
        progress: &Progress,
    ) -> Result<Pumped, AssetError> {
        let mut at = Position { sent: start.at, total: want.size, validator: start.validator.clone() };
        let mut failures = 0;
        loop {
            if want.size.is_some_and(|size| at.sent >= size) {
                return Ok(if tx.send(Piece::End).await.is_ok() { Pumped::All } else { Pumped::NotWanted });
            }
            let attempt = match self.attempt(want, start, &mut at, tx, progress).await {
                Ok(pumped) => return Ok(pumped),
                Err(attempt) => attempt,
            };
            let (error, wait) = match attempt {
                Attempt::Final(error) => return Err(error),
                Attempt::Again(error, wait) => (*error, wait),
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
        start: &Start,
        at: &mut Position,
        tx: &mpsc::Sender<Piece>,
        progress: &Progress,
    ) -> Result<Pumped, Attempt> {
        let mut request = self.client.get(want.url.clone()).headers(start.headers.clone());
        if at.sent > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", at.sent));
            if let Some(validator) = &at.validator {
                request = request.header(header::IF_RANGE, validator);
            }
        }
        let again = |e: reqwest::Error| {
            if let Some(problem) = tls::refusal(&e) {
                return Attempt::Final(AssetError::Untrusted {
                    url: want.shown(),
                    problem: Box::new(problem),
                });
            }
            let error = AssetError::Transfer { url: want.shown(), source: Box::new(e.without_url()) };
            Attempt::Again(Box::new(error), None)
        };
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(e) if (e.is_builder() || e.is_redirect()) && tls::refusal(&e).is_none() => {
                let error = AssetError::Transfer { url: want.shown(), source: Box::new(e.without_url()) };
                return Err(Attempt::Final(error));
            }
            Err(e) => return Err(again(e)),
        };
        if is_whole(at, &response) {
            return Ok(if tx.send(Piece::End).await.is_ok() { Pumped::All } else { Pumped::NotWanted });
        }
        let mut skip = begin(want, start, at, &response)?;
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
            return Err(Attempt::Again(Box::new(error), None));
        }
        Ok(if tx.send(Piece::End).await.is_ok() { Pumped::All } else { Pumped::NotWanted })
    }
}

/// Checks a response's head; returns how many of its bytes were already received.
fn begin(
    want: &Want,
    start: &Start,
    at: &mut Position,
    response: &reqwest::Response,
) -> Result<u64, Attempt> {
    let status = response.status();
    let error = AssetError::Status { url: want.shown(), status: status.as_u16() };
    if let Some(limited) = rate_limit(want, start, response) {
        return Err(Attempt::Final(limited));
    }
    let skip = match status {
        StatusCode::OK => at.sent,
        StatusCode::PARTIAL_CONTENT if range_start(response) == Some(at.sent) => 0,
        // The partial file no longer fits: the check at the end reports it, and the caller starts over.
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
            return Err(Attempt::Again(Box::new(error), wait));
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
    let strong = |v: &&HeaderValue| !v.as_bytes().starts_with(b"W/");
    let headers = response.headers();
    let validator = headers.get(header::ETAG).filter(strong).or(headers.get(header::LAST_MODIFIED)).cloned();
    // With a digest, the final check tells whether all parts belong to one file (mirrors may send different
    // validators). Without a digest, only the validator can tell.
    let is_same = want.sha256.is_some() || (validator.is_some() && validator == at.validator);
    if at.sent > 0 && !is_same {
        return Err(Attempt::Final(AssetError::Changed { url: want.shown() }));
    }
    if let Some(on_head) = &start.on_head {
        on_head(validator.as_ref());
    }
    at.validator = validator;
    Ok(skip)
}

/// Whether a response says that the file is already complete.
fn is_whole(at: &Position, response: &reqwest::Response) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let length = range.and_then(|range| range.strip_prefix("bytes */")?.trim().parse::<u64>().ok());
    response.status() == StatusCode::RANGE_NOT_SATISFIABLE && at.sent > 0 && length == Some(at.sent)
}

/// The error for a response that reports an exceeded rate limit.
fn rate_limit(want: &Want, start: &Start, response: &reqwest::Response) -> Option<AssetError> {
    if !matches!(response.status(), StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS) {
        return None;
    }
    let header = |name: &str| response.headers().get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    let is_used_up = header("x-ratelimit-remaining") == Some(0);
    let is_counted = header("x-ratelimit-limit").is_some();
    let seconds = match header("retry-after") {
        Some(seconds) if is_counted => Some(seconds),
        _ if is_used_up => header("x-ratelimit-reset").map(|at| at.saturating_sub(now)),
        _ => return None,
    };
    Some(AssetError::RateLimited {
        host: want.url.host_str().unwrap_or_default().to_owned(),
        seconds,
        had_token: start.headers.contains_key(header::AUTHORIZATION),
    })
}

/// The longest wait that a server may request.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Where a download starts, and the headers of its requests.
#[derive(Default)]
pub(crate) struct Start {
    /// How many bytes are already there.
    pub(crate) at: u64,
    /// The validator that the server sent for them.
    pub(crate) validator: Option<HeaderValue>,
    /// Additional headers of each request. Secret ones are not sent to other hosts on a redirect.
    pub(crate) headers: HeaderMap,
    /// Called with the validator of each response.
    pub(crate) on_head: Option<OnHead>,
}

/// A callback that receives a file's validator.
pub(crate) type OnHead = Box<dyn Fn(Option<&HeaderValue>) + Send + Sync>;

/// How far a download is.
struct Position {
    sent: u64,
    total: Option<u64>,
    validator: Option<HeaderValue>,
}

/// How an attempt failed.
enum Attempt {
    /// Permanently.
    Final(AssetError),
    /// Temporarily; perhaps with a delay that the server asked for.
    Again(Box<AssetError>, Option<Duration>),
}

/// How pumping ended without an error.
pub(super) enum Pumped {
    /// All bytes were sent.
    All,
    /// The reader is gone.
    NotWanted,
}

/// An item of the channel. If the channel closes without an end, the download was interrupted.
pub(super) enum Piece {
    Data(Bytes),
    End,
}

/// The reading end of a download.
pub(crate) struct Pieces {
    rx: mpsc::Receiver<Piece>,
    current: Bytes,
    done: bool,
}

impl Pieces {
    pub(super) fn new(rx: mpsc::Receiver<Piece>) -> Self {
        Self { rx, current: Bytes::new(), done: false }
    }
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

/// Where a partial response begins: `bytes 100-199/200` is 100.
fn range_start(response: &reqwest::Response) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
