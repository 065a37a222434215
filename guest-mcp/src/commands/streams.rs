//! The streams of a command: pipes, or one terminal for all of them; the child's ends and our ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::os::{reason, with_errno};
use crate::sys::watch;

/// The capacity of a pipe for output, in bytes. A larger pipe needs fewer context switches.
const PIPE: usize = 256 << 10;
/// Flags for a path that may lead to anything: a FIFO or a device does not block the call, and a terminal does not become the holder's own, with which it
/// would be hung up.
const HARMLESS: i32 = OFlags::NONBLOCK.union(OFlags::NOCTTY).bits().cast_signed();

/// The standard input of a command.
pub(super) enum Stdin {
    Nothing,
    Pipe,
    File(File),
}

/// Our ends.
pub(super) struct Ends {
    pub(super) stdin: Option<End>,
    pub(super) stdout: End,
    /// `None` if stderr is merged into stdout.
    pub(super) stderr: Option<End>,
}

/// The child's ends.
pub(super) struct Theirs {
    pub(super) stdin: Stdio,
    pub(super) stdout: Stdio,
    pub(super) stderr: Stdio,
}

/// Our end of a pipe or a terminal. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct End {
    file: Arc<AsyncFd<OwnedFd>>,
    is_terminal: bool,
}

impl End {
    fn new(file: OwnedFd, interest: Interest, is_terminal: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&file, true)?;
        Ok(Self { file: Arc::new(watch(file, interest)?), is_terminal })
    }

    /// Returns whether it is a terminal.
    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Passes a read function to `work` once there is something to read; returns 0 at the end.
    pub(super) async fn read_with(
        &self,
        mut work: impl FnMut(&dyn Fn(&mut [u8]) -> io::Result<usize>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.file.async_io(Interest::READABLE, |file| work(&|buffer| read(file, buffer))).await
    }

    /// The same. With `is_rest` it first tries without waiting for news: after [`Self::gather`] in vain, something may be there without any.
    pub(super) async fn read_rest_with(
        &self,
        is_rest: bool,
        mut work: impl FnMut(&dyn Fn(&mut [u8]) -> io::Result<usize>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if is_rest {
            match work(&|buffer| read(self.file.get_ref(), buffer)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
        self.read_with(work).await
    }

    /// Waits until `enough` bytes are there to read, or until the other end is closed, but not longer than `within`. Returns whether that was in
    /// vain: then [`Self::read_rest_with`] must be called, because [`Self::read_with`] would wait for more.
    pub(super) async fn gather(&self, enough: usize, within: Duration) -> bool {
        let gathering = async {
            loop {
                let Ok(mut ready) = self.file.readable().await else { return };
                if self.unread() >= enough as u64 || ready.ready().is_read_closed() {
                    return;
                }
                ready.clear_ready();
            }
        };
        tokio::time::timeout(within, gathering).await.is_err()
    }

    /// Returns how much there is to read, in bytes.
    pub(super) fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(self.file.get_ref()).unwrap_or(0)
    }

    /// Writes some of `bytes`.
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.file.async_io(Interest::WRITABLE, |file| Ok(rustix::io::write(file, bytes)?)).await
    }

    /// Sets the terminal's size.
    pub(super) fn resize(&self, (cols, rows): (u16, u16)) -> io::Result<()> {
        Ok(rustix::termios::tcsetwinsize(self.file.get_ref(), size(cols, rows))?)
    }

    /// Returns the terminal's size, as columns and rows.
    pub(super) fn size(&self) -> io::Result<(u16, u16)> {
        let size = rustix::termios::tcgetwinsize(self.file.get_ref())?;
        Ok((size.ws_col, size.ws_row))
    }
}

fn read(file: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    match rustix::io::read(file, buffer) {
        // No process has the terminal open any more.
        Err(Errno::IO) => Ok(0),
        other => Ok(other?),
    }
}

fn size(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Creates the streams of one command.
pub(super) fn make(stdin: Stdin, terminal: Option<(u16, u16)>, merge: bool) -> io::Result<(Ends, Theirs)> {
    if let Some((cols, rows)) = terminal {
        return make_terminal(cols, rows);
    }
    let (reads, writes) = output_pipe()?;
    let stdout = End::new(reads, Interest::READABLE, false)?;
    let (stderr, their_stderr) = if merge {
        (None, writes.try_clone()?)
    } else {
        let (reads, writes) = output_pipe()?;
        (Some(End::new(reads, Interest::READABLE, false)?), writes)
    };
    let (stdin, their_stdin) = match stdin {
        Stdin::Nothing => (None, Stdio::null()),
        Stdin::File(file) => (None, file.into()),
        Stdin::Pipe => {
            let (reads, writes) = pipe_with(PipeFlags::CLOEXEC)?;
            (Some(End::new(writes, Interest::WRITABLE, false)?), reads.into())
        }
    };
    let theirs = Theirs { stdin: their_stdin, stdout: writes.into(), stderr: their_stderr.into() };
    Ok((Ends { stdin, stdout, stderr }, theirs))
}

fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = pipe_with(PipeFlags::CLOEXEC)?;
    // An ordinary user may have too many of them already; the default size is good enough then.
    let _ = rustix::pipe::fcntl_setpipe_size(&ends.0, PIPE);
    Ok(ends)
}

fn make_terminal(cols: u16, rows: u16) -> io::Result<(Ends, Theirs)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    rustix::termios::tcsetwinsize(&ours, size(cols, rows))?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    let end = End::new(ours, Interest::READABLE | Interest::WRITABLE, true)?;
    let ends = Ends { stdin: Some(end.clone()), stdout: end, stderr: None };
    let theirs = Theirs {
        stdin: theirs.try_clone()?.into(),
        stdout: theirs.try_clone()?.into(),
        stderr: theirs.into(),
    };
    Ok((ends, theirs))
}

/// Opens a file as standard input of a command.
pub(super) fn input_file(path: &str) -> Result<File, ToolError> {
    check_path("stdin_path", path)?;
    let file = File::options().read(true).custom_flags(HARMLESS).open(path);
    let file = file.map_err(|error| refused("stdin_path", path, &error))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        _ => Err(ToolError::new(ErrorCode::FileRefused, format!("stdin_path {path} is not a regular file"))),
    }
}

/// Creates the file that gets all of a command's output.
pub(super) fn log_file(path: &str) -> Result<File, ToolError> {
    check_path("log", path)?;
    let file = File::options().append(true).create(true).mode(0o644).custom_flags(HARMLESS).open(path);
    let file = file.map_err(|error| refused("log", path, &error))?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(ToolError::new(ErrorCode::FileRefused, format!("log {path} is not a regular file")));
    }
    file.set_len(0).map_err(|error| refused("log", path, &error))?;
    Ok(file)
}

fn check_path(what: &str, path: &str) -> Result<(), ToolError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(ToolError::invalid(format!("{what} must be an absolute path")))
}

fn refused(what: &str, path: &str, error: &io::Error) -> ToolError {
    let code = match error.kind() {
        io::ErrorKind::NotFound => ErrorCode::FileNotFound,
        io::ErrorKind::StorageFull => ErrorCode::DiskFull,
        _ => ErrorCode::FileRefused,
    };
    with_errno(ToolError::new(code, format!("{what} {path}: {}", reason(error))), error)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_little_output_is_waited_for_but_not_long() {
        let long = Duration::from_secs(60);
        let (reads, writes) = output_pipe().unwrap();
        let end = End::new(reads, Interest::READABLE, false).unwrap();
        let mut writes = File::from(writes);
        let mut buffer = [0; 64];
        writes.write_all(b"abcd").unwrap();
        assert!(end.gather(10, Duration::from_millis(1)).await, "nothing more comes");
        assert_eq!(end.read_rest_with(true, |read| read(&mut buffer)).await.unwrap(), 4);

        writes.write_all(b"abcd").unwrap();
        let more = tokio::spawn(async move {
            writes.write_all(&[7; 20]).unwrap();
            writes
        });
        assert!(!end.gather(10, long).await);
        assert_eq!(end.read_with(|read| read(&mut buffer)).await.unwrap(), 24);

        let mut writes = more.await.unwrap();
        writes.write_all(b"end").unwrap();
        drop(writes);
        assert!(!end.gather(10, long).await, "nothing more can come");
        assert_eq!(end.read_with(|read| read(&mut buffer)).await.unwrap(), 3);
        assert_eq!(end.read_with(|read| read(&mut buffer)).await.unwrap(), 0);
    }
}
