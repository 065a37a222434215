//! External programs: the only place that starts them, except VMMs (`vmm/process.rs`).
//!
//! Never through a shell. A program gets a clean environment, its own process group, an empty stdin and a deadline; what
//! it says is kept only as a bounded tail. When it is cancelled, late, or nobody waits for it any more, its whole group
//! is asked to end and, after a grace period, killed.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio_util::sync::CancellationToken;

use super::leftover;
use super::own_mounts;
use super::paths::PROGRAM_DIRECTORIES as PROGRAMS;

/// How much of a program's error output is kept, in bytes.
const TAIL_BYTES: usize = 4 << 10;
/// The longest line of a program's output that is looked at, in bytes; the rest of it is dropped.
const LINE_BYTES: usize = 32 << 10;
/// How long a program may take to clean up after it was asked to end.
const GRACE: Duration = Duration::from_secs(5);

/// Why an external program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It is not installed.
    #[error("{name} is not installed")]
    Missing {
        /// The program.
        name: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// It could not be started.
    #[error("start {name}")]
    Start {
        /// The program.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its output or its end could not be read.
    #[error("watch {name}")]
    Watch {
        /// The program.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("{name} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        name: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The end of its error output.
        stderr: String,
    },
    /// It took too long and was killed.
    #[error("{name} did not end within {} s", .after.as_secs())]
    Late {
        /// The program.
        name: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// It said more than it may, and was killed.
    #[error("{name} said more than {limit} bytes")]
    TooMuch {
        /// The program.
        name: &'static str,
        /// How much it may say, in bytes.
        limit: usize,
    },
    /// It was no longer wanted and was ended.
    #[error("{name} was cancelled")]
    Cancelled {
        /// The program.
        name: &'static str,
    },
}

impl ProgramError {
    /// The next thing to do, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { package, .. } => Some(format!("install the package {package}")),
            Self::Failed { name: "mmdebstrap", stderr, .. } if stderr.contains("subuid") => Some(
                "the daemon's user has no ids of its own for containers; give it some as root (`usermod --add-subuids \
                 100000-165535 --add-subgids 100000-165535 USER`), or start from `busybox`, rootfs:alpine or oci:IMAGE, \
                 which need none"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// The package that a program is in, on Debian and its relatives.
fn package_of(name: &str) -> &'static str {
    match name {
        "mke2fs" | "debugfs" | "e2fsck" | "resize2fs" | "tune2fs" | "dumpe2fs" => "e2fsprogs",
        "mmdebstrap" => "mmdebstrap",
        "apt-get" => "apt",
        "newuidmap" | "newgidmap" => "uidmap",
        "mkfs.btrfs" => "btrfs-progs",
        "mkfs.xfs" => "xfsprogs",
        "losetup" | "mount" | "umount" => "util-linux",
        _ => "that provides it",
    }
}

/// An external program that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    name: &'static str,
    path: PathBuf,
}

impl Tool {
    /// The program `name` in the usual directories ([`PROGRAMS`]).
    pub fn find(name: &'static str) -> Result<Self, ProgramError> {
        Self::find_in(PROGRAMS.iter().map(Path::new), name)
    }

    /// The program `name` in the first of `directories` that has it.
    pub fn find_in<'a>(
        directories: impl IntoIterator<Item = &'a Path>,
        name: &'static str,
    ) -> Result<Self, ProgramError> {
        Self::find_file(directories, name, name)
    }

    /// The program `name` at a path.
    pub fn at(name: &'static str, path: &Path) -> Result<Self, ProgramError> {
        let file = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        Self::find_file(path.parent(), file, name)
    }

    /// The program in the first of `directories` that has a file of the name `file`; messages call it `name`.
    pub fn find_file<'a>(
        directories: impl IntoIterator<Item = &'a Path>,
        file: &str,
        name: &'static str,
    ) -> Result<Self, ProgramError> {
        directories
            .into_iter()
            .map(|directory| directory.join(file))
            .find(|path| is_program(path))
            .map(|path| Self { name, path })
            .ok_or(ProgramError::Missing { name, package: package_of(name) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A call of it, to be given arguments.
    pub fn call(&self) -> Call {
        Call {
            tool: self.clone(),
            args: Vec::new(),
            env: Vec::new(),
            directory: None,
            input: None,
            timeout: Duration::from_secs(600),
            success: vec![0],
            has_own_mounts: false,
        }
    }
}

/// A call of a program.
#[derive(Debug, Clone)]
#[must_use]
pub struct Call {
    tool: Tool,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    input: Option<Vec<u8>>,
    timeout: Duration,
    success: Vec<i32>,
    has_own_mounts: bool,
}

impl Call {
    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable beside `PATH` and `LC_ALL`.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory (else `/`).
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Sets what it reads from its standard input (else nothing): as much as a pipe holds, 64 KiB.
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = Some(bytes.to_owned());
        self
    }

    /// Sets how long it may take (else ten minutes).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the exit codes that are no failure (else 0 only).
    pub fn success(mut self, codes: &[i32]) -> Self {
        self.success = codes.to_vec();
        self
    }

    /// Keeps what it mounts to it, so that it is gone with it, however it ends.
    pub fn own_mounts(mut self) -> Self {
        self.has_own_mounts = true;
        self
    }

    /// Runs it to its end; its output is shown to `line`, line by line.
    pub async fn run_lines(
        self,
        cancel: &CancellationToken,
        mut line: impl FnMut(&[u8]) + Send,
    ) -> Result<Finished, ProgramError> {
        let mut running = self.start()?;
        let stdout = running.stdout();
        running.finish(cancel, stdout, &mut line).await
    }

    /// Runs it to its end and keeps the tail of what it says.
    pub async fn run(self, cancel: &CancellationToken) -> Result<Finished, ProgramError> {
        self.run_lines(cancel, |_| {}).await
    }

    /// Runs it to its end and keeps what it writes to its standard output, which is no more than `limit` bytes.
    pub async fn output(
        self,
        limit: usize,
        cancel: &CancellationToken,
    ) -> Result<(Finished, Vec<u8>), ProgramError> {
        let (name, after) = (self.tool.name, self.timeout);
        let mut running = self.start()?;
        let stdout = running.stdout();
        let mut bytes = Vec::new();
        let read = async {
            if let Some(stdout) = stdout {
                let read = stdout.take(limit as u64 + 1).read_to_end(&mut bytes).await;
                read.map_err(|source| ProgramError::Watch { name, source })?;
            }
            if bytes.len() > limit { Err(ProgramError::TooMuch { name, limit }) } else { Ok(()) }
        };
        // Who is left behind may hold the output open; what is given up here is killed.
        let both = async { tokio::try_join!(running.wait(cancel, |_| {}), read) };
        let ended = tokio::time::timeout(after + GRACE, both).await;
        let (finished, ()) = ended.unwrap_or(Err(ProgramError::Late { name, after }))?;
        Ok((finished, bytes))
    }

    /// Starts it; for programs whose output is taken as it comes.
    pub fn start(self) -> Result<Running, ProgramError> {
        let name = self.tool.name;
        let stdin = match &self.input {
            None => Stdio::null(),
            Some(input) => piped(input).map_err(|source| ProgramError::Start { name, source })?,
        };
        let mut command = Command::new(&self.tool.path);
        command
            .args(&self.args)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", PROGRAMS.join(":"))
            .env(leftover::STARTED_BY, leftover::mark())
            .envs(self.env)
            .current_dir(self.directory.as_deref().unwrap_or(Path::new("/")))
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if self.has_own_mounts {
            // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
            unsafe {
                command.pre_exec(|| match own_mounts::begin() {
                    // Who may not do this can mount nothing either: that is for the program to say.
                    Ok(()) | Err(nix::Error::EPERM) => Ok(()),
                    Err(error) => Err(error.into()),
                });
            }
        }
        let child = command.spawn().map_err(|source| ProgramError::Start { name, source })?;
        tracing::debug!(program = name, pid = child.id(), args = ?self.args, "started");
        Ok(Running { name, child, timeout: self.timeout, success: self.success })
    }
}

/// A standard input that holds these bytes, and ends.
fn piped(input: &[u8]) -> io::Result<Stdio> {
    if input.len() > 64 << 10 {
        return Err(io::Error::other("its input is too long"));
    }
    let (reader, mut writer) = io::pipe()?;
    io::Write::write_all(&mut writer, input)?;
    Ok(Stdio::from(reader))
}

/// Whether a file can be run.
pub(crate) fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// How a program ended well.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Its exit code, one of those that are no failure.
    pub code: i32,
    /// The end of its error output.
    pub stderr: String,
}

/// A program that runs. Its process group is killed when this is dropped before its end.
#[derive(Debug)]
pub struct Running {
    name: &'static str,
    child: Child,
    timeout: Duration,
    success: Vec<i32>,
}

impl Running {
    /// Its standard output; to be taken once, and read or closed, before [`Running::wait`].
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for its end, while the lines of its error output are shown to `line`.
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

    /// Waits for its end; `stdout` is shown to `line`, line by line.
    async fn finish(
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
            let work = async {
                tokio::try_join!(read_lines(stdout, line), read_lines(stderr, &mut keep))?;
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
        let status = match ended {
            Ok(status) => status,
            Err(error) => {
                self.end().await;
                return Err(error);
            }
        };
        match status.code() {
            Some(code) if self.success.contains(&code) => Ok(Finished { code, stderr: tail.text() }),
            _ => {
                tracing::debug!(program = name, code = status.code(), signal = status.signal(), "failed");
                Err(ProgramError::Failed { name, status, stderr: tail.text() })
            }
        }
    }

    /// Asks the process group to end, then kills what is left of it.
    async fn end(&mut self) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(GRACE, self.child.wait()).await.is_err() {
            self.signal(Signal::KILL);
            if let Err(error) = self.child.wait().await {
                tracing::warn!(program = self.name, %error, "could not be waited for");
            }
        }
    }

    /// Sends a signal to the process group, as long as its leader was not waited for (its number may be another's then).
    fn signal(&self, signal: Signal) {
        let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
        if let Err(error) = kill_process_group(pid, signal) {
            tracing::debug!(program = self.name, %error, "signal not sent");
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

/// Shows each line of `stream` to `line`, shortened to [`LINE_BYTES`]; a last line without an end counts too.
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn never() -> CancellationToken {
        CancellationToken::new()
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let error = Tool::find_in([Path::new("/nonexistent")], "mke2fs").unwrap_err();
        assert_eq!(error.to_string(), "mke2fs is not installed");
        assert_eq!(error.hint().as_deref(), Some("install the package e2fsprogs"));
    }

    #[test]
    fn a_user_without_ids_of_its_own_is_told_how_to_get_some() {
        let failed = |name, stderr: &str| ProgramError::Failed {
            name,
            status: ExitStatus::from_raw(25 << 8),
            stderr: stderr.to_owned(),
        };
        let said = "E: failed to parse /etc/subuid and /etc/subgid";
        assert!(failed("mmdebstrap", said).hint().unwrap().contains("usermod --add-subuids"));
        assert_eq!(failed("mmdebstrap", "E: no such suite").hint(), None);
        assert_eq!(failed("mke2fs", said).hint(), None);
    }

    #[tokio::test]
    async fn the_environment_is_clean_and_output_comes_by_line() {
        let mut seen = Vec::new();
        let finished = Tool::find("env")
            .unwrap()
            .call()
            .env("EXTRA", "1")
            .run_lines(&never(), |l| seen.push(String::from_utf8(l.to_vec()).unwrap()))
            .await
            .unwrap();
        seen.sort();
        assert_eq!(finished.code, 0);
        let mark = format!("NEXUS_STARTED_BY={}", leftover::mark());
        assert_eq!(seen, ["EXTRA=1", "LC_ALL=C", &mark, &format!("PATH={}", PROGRAMS.join(":"))]);
    }

    #[tokio::test]
    async fn a_failure_keeps_a_bounded_tail() {
        let script = "i=0; while [ $i -lt 5000 ]; do echo line $i >&2; i=$((i+1)); done; exit 3";
        let error = Tool::find("sh").unwrap().call().args(["-c", script]).run(&never()).await.unwrap_err();
        let ProgramError::Failed { status, stderr, .. } = error else { panic!("{error}") };
        assert_eq!(status.code(), Some(3));
        assert!(stderr.ends_with("line 4999") && stderr.len() <= TAIL_BYTES, "{}", stderr.len());
    }

    #[tokio::test]
    async fn lateness_and_cancellation_end_the_whole_group() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("alive");
        for cancelled in [false, true] {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &fifo,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::from_raw_mode(0o600),
                0,
            )
            .unwrap();
            // Both the shell and its grandchild hold the FIFO open for writing; its reader sees the end when all are gone.
            let reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&fifo).unwrap();
            let cancel = never();
            let call = Tool::find("sh")
                .unwrap()
                .call()
                .args(["-c", "exec 9>\"$1\"; echo up >&9; sleep 1000 & sleep 1000", "sh"])
                .arg(&fifo)
                .timeout(Duration::from_secs(if cancelled { 100 } else { 5 }));
            let started = Instant::now();
            let run = tokio::spawn({
                let cancel = cancel.clone();
                async move { call.run(&cancel).await }
            });
            let mut lines = BufReader::new(reader).lines();
            assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("up"));
            if cancelled {
                cancel.cancel();
            }
            let error = run.await.unwrap().unwrap_err();
            assert!(
                matches!(error, ProgramError::Cancelled { .. }) == cancelled
                    && matches!(error, ProgramError::Late { .. }) != cancelled
            );
            assert_eq!(lines.next_line().await.unwrap(), None);
            assert!(started.elapsed() < Duration::from_secs(30));
            std::fs::remove_file(&fifo).unwrap();
        }
    }
}
