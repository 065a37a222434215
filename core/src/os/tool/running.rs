//! A running program: its output, and how it ends.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio_util::sync::CancellationToken;

use super::ProgramError;
use super::disk::Disk;

/// How much of a program's stderr is kept, in bytes.
pub(super) const TAIL_BYTES: usize = 4 << 10;
/// The longest line of output, in bytes; the rest of the line is dropped.
const LINE_BYTES: usize = 32 << 10;
/// How long a program may take to clean up after SIGTERM.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// How a program ended successfully.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Its exit code, one of those that mean success.
    pub code: i32,
    /// The end of its stderr.
    pub stderr: String,
}

/// A running program. Its process group is killed if this is dropped before its end.
#[derive(Debug)]
pub struct Running {
    pub(super) name: &'static str,
    pub(super) child: Child,
    pub(super) timeout: Duration,
    pub(super) success: Vec<i32>,
    /// The disk that it works on; given back to its owner when this is dropped.
    pub(super) disk: Option<Disk>,
}

impl Running {
    /// Its standard output; take it once, and read or close it before [`Running::wait`].
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for its end, and passes the lines of its stderr to `line`.
    pub async fn wait(
        self,
        cancel: &CancellationToken,
        mut line: impl FnMut(&[u8]) + Send,
    ) -> Result<Finished, ProgramError> {
        let mut running = self;
        let name = running.name;
        let stderr = running.child.stderr.take();
        let mut tail = Tail::default();
        let ended = {
            let mut both = |text: &[u8]| {
                tail.push(text);
                line(text);
            };
            let work = async {
                read_lines(stderr, &mut both).await?;
                running.child.wait().await
            };
            race(name, running.timeout, cancel, work).await
        };
        running.conclude(ended, tail).await
    }

    /// Waits for its end, and passes the lines of `stdout` to `line`.
    pub(super) async fn finish(
        mut self,
        cancel: &CancellationToken,
        stdout: Option<ChildStdout>,
        line: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Finished, ProgramError> {
        let name = self.name;
        let stderr = self.child.stderr.take();
        let mut tail = Tail::default();
        let ended = {
            let mut keep = |text: &[u8]| tail.push(text);
            let disk = self.disk.as_ref();
            let mut show = |text: &[u8]| match disk {
                Some(disk) => line(&disk.named_line(text)),
                None => line(text),
            };
            let work = async {
                tokio::try_join!(read_lines(stdout, &mut show), read_lines(stderr, &mut keep))?;
                self.child.wait().await
            };
            race(name, self.timeout, cancel, work).await
        };
        self.conclude(ended, tail).await
    }

    async fn conclude(
        mut self,
        ended: Result<ExitStatus, ProgramError>,
        tail: Tail,
    ) -> Result<Finished, ProgramError> {
        let name = self.name;
        let stderr = match &self.disk {
            Some(disk) => disk.named(&tail.text()),
            None => tail.text(),
        };
        let status = match ended {
            Ok(status) => status,
            Err(error) => {
                self.end().await;
                return Err(error);
            }
        };
        match status.code() {
            Some(code) if self.success.contains(&code) => Ok(Finished { code, stderr }),
            _ => {
                tracing::debug!(program = name, code = status.code(), signal = status.signal(), "failed");
                Err(ProgramError::Failed { name, status, stderr })
            }
        }
    }

    /// Sends SIGTERM to the process group, and SIGKILL to what is left of it.
    async fn end(&mut self) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(GRACE, self.child.wait()).await.is_err() {
            self.signal(Signal::KILL);
            if let Err(error) = self.child.wait().await {
                tracing::warn!(program = self.name, %error, "cannot wait for a program");
            }
        }
    }

    /// Sends a signal to the process group, until its leader was reaped (after that, another process may have its number).
    fn signal(&self, signal: Signal) {
        let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
        if let Err(error) = kill_process_group(pid, signal) {
            tracing::debug!(program = self.name, %error, "cannot send a signal");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

async fn race(
    name: &'static str,
    timeout: Duration,
    cancel: &CancellationToken,
    work: impl Future<Output = io::Result<ExitStatus>>,
) -> Result<ExitStatus, ProgramError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(ProgramError::Cancelled { name }),
        ended = tokio::time::timeout(timeout, work) => match ended {
            Ok(ended) => ended.map_err(|source| ProgramError::Watch { name, source }),
            Err(_) => Err(ProgramError::Late { name, after: timeout }),
        },
    }
}

/// Passes each line of `stream` to `line`, cut to [`LINE_BYTES`]; an unterminated last line counts too.
async fn read_lines<R: AsyncRead + Unpin>(
    stream: Option<R>,
    line: &mut (dyn FnMut(&[u8]) + Send),
) -> io::Result<()> {
    let Some(stream) = stream else { return Ok(()) };
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    let mut current = Vec::new();
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            if !current.is_empty() {
                line(&current);
            }
            return Ok(());
        }
        let (part, used, ends) = match chunk.iter().position(|b| *b == b'\n') {
            Some(at) => (&chunk[..at], at + 1, true),
            None => (chunk, chunk.len(), false),
        };
        let room = LINE_BYTES.saturating_sub(current.len());
        current.extend_from_slice(&part[..part.len().min(room)]);
        reader.consume(used);
        if ends {
            line(&current);
            current.clear();
        }
    }
}

/// The last lines of an output.
#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Tail {
    fn push(&mut self, line: &[u8]) {
        let line = &line[..line.len().min(TAIL_BYTES / 4)];
        self.bytes += line.len() + 1;
        self.lines.push_back(line.to_vec());
        while self.bytes > TAIL_BYTES {
            let Some(first) = self.lines.pop_front() else { break };
            self.bytes -= first.len() + 1;
        }
    }

    fn text(&self) -> String {
        let lines: Vec<_> = self.lines.iter().map(|l| String::from_utf8_lossy(l)).collect();
        lines.join("\n").trim().to_owned()
    }
}
