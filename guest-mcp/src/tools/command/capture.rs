//! What a command writes: read to the end without ever holding more than is shown.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::StreamFacts;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::Notify;

use crate::tools::text::{continuation_start, decode, incomplete_end};

/// How much is read at once.
const CHUNK: usize = 16 << 10;
/// How long to wait for more output of a command that ended, each time that some came.
const DRAIN_QUIET: Duration = Duration::from_millis(100);
/// How long to wait for it in all.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// The head and the tail of a stream.
#[derive(Debug, Default)]
pub(super) struct Captured {
    head: Vec<u8>,
    head_max: usize,
    tail: VecDeque<u8>,
    tail_max: usize,
    total: u64,
}

impl Captured {
    fn new(cap: usize, keep_tail: bool) -> Self {
        let tail_max = if keep_tail { cap / 2 } else { 0 };
        Self { head_max: cap - tail_max, tail_max, ..Self::default() }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let room = self.head_max - self.head.len();
        let (head, rest) = bytes.split_at(room.min(bytes.len()));
        self.head.extend_from_slice(head);
        bytes = &rest[rest.len().saturating_sub(self.tail_max)..];
        let excess = (self.tail.len() + bytes.len()).saturating_sub(self.tail_max);
        self.tail.drain(..excess);
        self.tail.extend(bytes);
    }

    /// All that was written, in bytes.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    fn kept(&self) -> usize {
        self.head.len() + self.tail.len()
    }

    /// Keeps no more than `most` bytes, from both ends.
    fn shrink(&mut self, most: usize) {
        if self.kept() <= most {
            return;
        }
        let tail = (most / 2).min(self.tail.len());
        // What does not fit into the tail's share was the head's.
        let mut all = std::mem::take(&mut self.head);
        if self.total == (all.len() + self.tail.len()) as u64 {
            all.extend(self.tail.drain(..));
            let keep_tail = most / 2;
            self.tail = all.split_off(all.len() - keep_tail).into();
        } else {
            self.tail.drain(..self.tail.len() - tail);
        }
        all.truncate(most - self.tail.len());
        self.head = all;
    }
}

/// Collects one stream in a task of its own, so that the command never waits for its reader.
pub(super) struct Collector {
    shared: Arc<Shared>,
}

struct Shared {
    captured: Mutex<Captured>,
    /// Bytes that came so far; also counted after the result was taken.
    seen: AtomicU64,
    closed: AtomicBool,
    /// Whether nobody wants the rest.
    unwanted: AtomicBool,
    changed: Notify,
}

impl Collector {
    /// Starts to read `stream`.
    pub(super) fn start(
        stream: Option<impl AsyncRead + Send + Unpin + 'static>,
        cap: usize,
        keep_tail: bool,
    ) -> Self {
        let shared = Arc::new(Shared {
            captured: Mutex::new(Captured::new(cap, keep_tail)),
            seen: AtomicU64::new(0),
            closed: AtomicBool::new(stream.is_none()),
            unwanted: AtomicBool::new(false),
            changed: Notify::new(),
        });
        if let Some(stream) = stream {
            tokio::spawn(read(stream, shared.clone()));
        }
        Self { shared }
    }

    /// Whether the stream has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// What came until now. What comes later is thrown away, so that its writers never block on it.
    pub(super) fn take(self) -> Captured {
        self.shared.unwanted.store(true, Ordering::Release);
        std::mem::take(&mut *self.shared.captured.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn seen(&self) -> u64 {
        self.shared.seen.load(Ordering::Acquire)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.shared.unwanted.store(true, Ordering::Release);
    }
}

async fn read(mut stream: impl AsyncRead + Unpin, shared: Arc<Shared>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        // A pipe fails in no other way than by its end.
        let length = match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        if shared.unwanted.load(Ordering::Acquire) {
            chunk.truncate(512);
            chunk.shrink_to_fit();
            continue;
        }
        shared.captured.lock().unwrap_or_else(PoisonError::into_inner).push(&chunk[..length]);
        shared.seen.fetch_add(length as u64, Ordering::AcqRel);
        shared.changed.notify_one();
    }
    shared.closed.store(true, Ordering::Release);
    shared.changed.notify_one();
}

/// Waits until both streams of a command that ended are read, or until a process that it left behind keeps them open in
/// silence.
pub(super) async fn drain(streams: [&Collector; 2]) {
    let wait = async {
        while streams.iter().any(|stream| !stream.is_closed()) {
            let before = streams.map(Collector::seen);
            let [stdout, stderr] = streams.map(|stream| stream.shared.changed.notified());
            let change = async {
                tokio::select! {
                    () = stdout => {}
                    () = stderr => {}
                }
            };
            if tokio::time::timeout(DRAIN_QUIET, change).await.is_err()
                && streams.map(Collector::seen) == before
            {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_MAX, wait).await;
}

/// A stream as it is shown.
pub(super) struct Shown {
    /// The text.
    pub(super) text: String,
    /// The facts.
    pub(super) facts: StreamFacts,
}

/// Shows both streams, within what a result may show in all.
pub(super) fn show(streams: [Captured; 2], encoding: ContentEncoding) -> [Shown; 2] {
    let [mut stdout, mut stderr] = streams;
    match encoding {
        ContentEncoding::Text => {
            let most = OUTPUT_MAX as usize;
            let half = most / 2;
            if stdout.kept() + stderr.kept() > most {
                let for_stderr = stderr.kept().min(half.max(most.saturating_sub(stdout.kept())));
                stderr.shrink(for_stderr);
                stdout.shrink(most - for_stderr);
            }
            [text(stdout), text(stderr)]
        }
        ContentEncoding::Base64 => [base64(stdout), base64(stderr)],
    }
}

fn base64(captured: Captured) -> Shown {
    let omitted = captured.total - captured.head.len() as u64;
    let facts = StreamFacts { total_bytes: captured.total, omitted_bytes: omitted, lossy: false };
    Shown { text: data_encoding::BASE64.encode(&captured.head), facts }
}

fn text(captured: Captured) -> Shown {
    let Captured { mut head, tail, total, .. } = captured;
    let tail = Vec::from(tail);
    if total == (head.len() + tail.len()) as u64 {
        head.extend_from_slice(&tail);
        let (text, lossy) = decode(&head);
        return Shown { text, facts: StreamFacts { total_bytes: total, omitted_bytes: 0, lossy } };
    }
    // A character that the cut went through is left out whole.
    head.truncate(head.len() - incomplete_end(&head));
    let tail = &tail[continuation_start(&tail)..];
    let omitted = total - (head.len() + tail.len()) as u64;
    let (head, head_lossy) = decode(&head);
    let (tail, tail_lossy) = decode(tail);
    let text = format!(
        "{head}\n[... {omitted} bytes left out; write to a file and read it in parts, or raise max_output_bytes ...]\n{tail}"
    );
    let facts = StreamFacts { total_bytes: total, omitted_bytes: omitted, lossy: head_lossy || tail_lossy };
    Shown { text, facts }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(cap: usize, pieces: &[&[u8]]) -> Captured {
        let mut captured = Captured::new(cap, true);
        pieces.iter().for_each(|piece| captured.push(piece));
        captured
    }

    #[test]
    fn short_output_is_whole_and_long_output_loses_its_middle() {
        let shown = text(captured(10, &[b"hel", b"lo ", b"you"]));
        assert_eq!((shown.text.as_str(), shown.facts.omitted_bytes), ("hello you", 0));

        let shown = text(captured(10, &[b"0123456", b"789abc", b"defghijklmnop"]));
        assert!(shown.text.starts_with("01234\n[... 16 bytes left out"), "{}", shown.text);
        assert!(shown.text.ends_with("...]\nlmnop"), "{}", shown.text);
        assert_eq!(shown.facts, StreamFacts { total_bytes: 26, omitted_bytes: 16, lossy: false });
    }

    #[test]
    fn a_cut_through_a_character_is_not_lossy() {
        let shown = text(captured(7, &["ääääääää".as_bytes()]));
        assert!(!shown.facts.lossy, "{}", shown.text);
        assert!(shown.text.starts_with("ää\n[") && shown.text.ends_with("]\nä"), "{}", shown.text);
        assert_eq!(shown.facts.omitted_bytes, 10);
    }

    #[test]
    fn both_streams_share_what_may_be_shown() {
        let big = vec![b'x'; 60_000];
        let most = OUTPUT_MAX as usize;
        let [stdout, stderr] =
            show([captured(most, &[&big]), captured(most, &[&big])], ContentEncoding::Text);
        assert!(stdout.text.len() + stderr.text.len() < 50_000);
        let [stdout, stderr] =
            show([captured(most, &[&big]), captured(most, &[b"small"])], ContentEncoding::Text);
        assert_eq!(stderr.text, "small");
        assert!(stdout.text.len() > 47_000 && stdout.text.len() + stderr.text.len() < 50_000);
        // Whole streams that do not fit together lose their own middle.
        let both = [captured(most, &[&big[..40_000]]), captured(most, &[&big[..40_000]])];
        let [stdout, stderr] = show(both, ContentEncoding::Text);
        assert_eq!(stdout.facts.omitted_bytes + 24_000, 40_000);
        assert_eq!(stderr.facts.omitted_bytes + 24_000, 40_000);
    }

    #[test]
    fn base64_keeps_the_start() {
        let mut captured = Captured::new(4, false);
        captured.push(b"\x00\xFF\x01\x02\x03\x04");
        let shown = base64(captured);
        assert_eq!((shown.text.as_str(), shown.facts.omitted_bytes), ("AP8BAg==", 2));
    }
}
