//! The log on stderr, written by a separate thread, so that a blocked stderr does not block the daemon.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing_subscriber::fmt::MakeWriter;

/// How much may be buffered, in bytes. Further lines are dropped and counted.
const WAITING_MAX: usize = 256 << 10;
/// How long the process waits at exit for a blocked stderr.
const FLUSH: Duration = Duration::from_millis(500);

static LOG: OnceLock<Log> = OnceLock::new();

/// Logs to stderr what passes the filter, including panics. Only the first call in a process has an effect.
pub fn start(filter: &str) {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let log = LOG.get_or_init(Log::default).clone();
    let writing = log.clone();
    let thread = std::thread::Builder::new().name("log".to_owned());
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(io::stderr().is_terminal());
    let started = match thread.spawn(move || writing.write_to(write_to_stderr)) {
        Ok(_) => format.with_writer(log).try_init(),
        // A log that may block the daemon is better than none.
        Err(_) => format.with_writer(io::stderr).try_init(),
    };
    // A second log in one process happens only in tests; the first one stays.
    if started.is_ok() {
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    }
}

/// Writes a line to stderr after everything logged before, and briefly waits until it is written.
pub fn say(line: &str) {
    match LOG.get() {
        Some(log) => {
            log.put(format!("{line}\n").as_bytes());
            log.flush(FLUSH);
        }
        None => {
            write_to_stderr(format!("{line}\n").as_bytes());
        }
    }
}

/// Waits briefly until everything logged is written; call it before the process ends.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush(FLUSH);
    }
}

/// Lines that wait to be written. Cheap to clone.
#[derive(Debug, Clone, Default)]
struct Log {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    queue: Mutex<Queue>,
    /// A line was added, or one was written.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// How many lines were dropped since the last one was taken.
    dropped: u64,
    /// Whether a line is being written.
    is_writing: bool,
}

impl Log {
    fn put(&self, line: &[u8]) {
        let mut queue = self.lock();
        if queue.bytes + line.len() > WAITING_MAX {
            queue.dropped += 1;
            return;
        }
        if queue.dropped > 0 {
            let dropped = std::mem::take(&mut queue.dropped);
            queue.push(format!("nexusd: {dropped} log lines dropped because stderr was not read\n").into());
        }
        queue.push(line.to_vec());
        drop(queue);
        self.inner.changed.notify_all();
    }

    /// Writes lines as they arrive, forever.
    fn write_to(&self, write: impl Fn(&[u8])) {
        loop {
            let mut queue = self.lock();
            queue.is_writing = false;
            self.inner.changed.notify_all();
            let line = loop {
                if let Some(line) = queue.pop() {
                    break line;
                }
                queue = self.inner.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            queue.is_writing = true;
            drop(queue);
            write(&line);
        }
    }

    fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut queue = self.lock();
        while !queue.lines.is_empty() || queue.is_writing {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self.inner.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A panic of another holder leaves no inconsistent state here.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.inner.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&mut self, line: Vec<u8>) {
        self.bytes += line.len();
        self.lines.push_back(line);
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let line = self.lines.pop_front()?;
        self.bytes -= line.len();
        Some(line)
    }
}

/// Each event is written by a single call.
impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Blocks until somebody reads. Does not use [`io::stderr`], because others would wait for its lock.
fn write_to_stderr(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(rustix::stdio::stderr(), bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Whoever opened it made it non-blocking.
            Err(Errno::AGAIN) => {
                let stderr = rustix::stdio::stderr();
                // Even if interrupted, it tries again.
                let _ = poll(&mut [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)], None);
            }
            // It is closed.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn lines_that_nobody_takes_are_dropped_and_counted() {
        let log = Log::default();
        let line = [b'x'; 1024];
        for _ in 0..WAITING_MAX / line.len() + 7 {
            log.put(&line);
        }
        let before = Instant::now();
        log.flush(Duration::from_millis(50));
        assert!(before.elapsed() >= Duration::from_millis(50), "it is dropped, and nobody waits forever");
        let (written, lines) = mpsc::channel();
        let writing = log.clone();
        std::thread::spawn(move || writing.write_to(|line| drop(written.send(line.to_vec()))));
        for _ in 0..WAITING_MAX / line.len() {
            assert_eq!(lines.recv().unwrap(), line);
        }
        log.put(b"again\n");
        let missing = String::from_utf8(lines.recv().unwrap()).unwrap();
        assert_eq!(missing, "nexusd: 7 log lines dropped because stderr was not read\n");
        assert_eq!(lines.recv().unwrap(), b"again\n");
        log.flush(Duration::from_secs(60));
        assert!(log.lock().lines.is_empty());
    }
}
