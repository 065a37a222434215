//! Runs external programs. Nothing else starts any, except for VMMs (`vmm/process.rs`).
//!
//! Programs never run through a shell. Each gets a clean environment, its own process group, an empty stdin and a deadline;
//! only a bounded tail of its output is kept. When it is cancelled, times out, or is dropped, its whole group gets SIGTERM and,
//! after a grace period, SIGKILL.
//!
//! Programs that work on a disk ([`Call::disk`]) may do nothing else, because a guest wrote the disk.

mod disk;
mod running;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use self::disk::Disk;
use self::running::GRACE;
pub use self::running::{Finished, Running};
use super::confine::Access;
use super::leftover;
use super::own_mounts;
use super::paths::PROGRAM_DIRECTORIES as PROGRAMS;

/// Why an external program failed.
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
    /// Its restrictions could not be built.
    #[error("confine {name} to {}", .disk.display())]
    Confine {
        /// The program.
        name: &'static str,
        /// The disk for it to work on.
        disk: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its output or its exit could not be read.
    #[error("watch {name}")]
    Watch {
        /// The program.
        name: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It exited with a failure.
    #[error("{name} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        name: &'static str,
        /// Its exit status.
        status: ExitStatus,
        /// The end of its error output.
        stderr: String,
    },
    /// It timed out and was killed.
    #[error("{name} did not end within {} s", .after.as_secs())]
    Late {
        /// The program.
        name: &'static str,
        /// The timeout.
        after: Duration,
    },
    /// Its output exceeded the limit, and it was killed.
    #[error("{name} produced more than {limit} bytes of output")]
    TooMuch {
        /// The program.
        name: &'static str,
        /// The limit, in bytes.
        limit: usize,
    },
    /// It was cancelled.
    #[error("{name} was cancelled")]
    Cancelled {
        /// The program.
        name: &'static str,
    },
}

impl ProgramError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { package, .. } => Some(format!("install the package {package}")),
            Self::Failed { name: "mmdebstrap", stderr, .. } if stderr.contains("subuid") => Some(
                "the daemon's user has no subordinate ids; add some as root (`usermod --add-subuids \
                 100000-165535 --add-subgids 100000-165535 USER`), or start from `busybox`, rootfs:alpine or oci:IMAGE, \
                 which need none"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// The package of a program, on Debian and its relatives.
fn package_of(name: &str) -> &'static str {
    match name {
        "mke2fs" | "debugfs" | "e2fsck" | "resize2fs" | "tune2fs" | "dumpe2fs" => "e2fsprogs",
        "mmdebstrap" => "mmdebstrap",
        "make" => "make",
        "strip" => "binutils",
        "tar" => "tar",
        "apt-get" => "apt",
        "newuidmap" | "newgidmap" => "uidmap",
        "mkfs.btrfs" => "btrfs-progs",
        "mkfs.xfs" => "xfsprogs",
        "losetup" | "mount" | "umount" => "util-linux",
        _ => "that provides it",
    }
}

/// An installed external program.
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

    /// The program in the first of `directories` that has a file named `file`; messages call it `name`.
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

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A call of it, to which arguments can be added.
    pub fn call(&self) -> Call {
        Call {
            tool: self.clone(),
            args: Vec::new(),
            env: Vec::new(),
            directory: None,
            disk: None,
            input: None,
            timeout: Duration::from_secs(600),
            success: vec![0],
            has_own_mounts: false,
        }
    }
}

/// The argument that names a disk.
#[derive(Debug, Clone)]
struct DiskArgument {
    /// The index of the argument.
    at: usize,
    path: PathBuf,
    is_written: bool,
}

/// A call of a program.
#[derive(Debug, Clone)]
#[must_use]
pub struct Call {
    tool: Tool,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    disk: Option<DiskArgument>,
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

    /// Adds the disk that it reads (a regular file) as an argument, and confines it to that file: see [`Call::disk`].
    pub(crate) fn disk_to_read(self, path: &Path) -> Self {
        self.one_disk(path, false)
    }

    /// Adds the disk that it reads and writes (a regular file) as an argument, and confines it to that file.
    ///
    /// The program gets it as an open file, and may otherwise open only libraries and its working directory, if one is set. It
    /// has no network and cannot start other programs; its memory and time are limited, and the disk cannot grow. If this
    /// process is root, the program runs as `nobody`, who owns the disk meanwhile.
    pub(crate) fn disk(self, path: &Path) -> Self {
        self.one_disk(path, true)
    }

    fn one_disk(mut self, path: &Path, is_written: bool) -> Self {
        self.disk = Some(DiskArgument { at: self.args.len(), path: path.to_owned(), is_written });
        self.arg(path)
    }

    /// Sets a variable in addition to `PATH` and `LC_ALL`.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory; the default is `/`.
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Sets its standard input, which is empty by default: up to 64 KiB, the capacity of a pipe.
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = Some(bytes.to_owned());
        self
    }

    /// Sets the timeout; the default is ten minutes.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the exit codes that mean success; the default is only 0.
    pub fn success(mut self, codes: &[i32]) -> Self {
        self.success = codes.to_vec();
        self
    }

    /// Makes its mounts private, so that they disappear with it, however it ends.
    pub fn own_mounts(mut self) -> Self {
        self.has_own_mounts = true;
        self
    }

    /// Runs it to its end; passes its output to `line`, line by line.
    pub async fn run_lines(
        self,
        cancel: &CancellationToken,
        mut line: impl FnMut(&[u8]) + Send,
    ) -> Result<Finished, ProgramError> {
        let mut running = self.start()?;
        let stdout = running.stdout();
        running.finish(cancel, stdout, &mut line).await
    }

    /// Runs it to its end and keeps the tail of its output.
    pub async fn run(self, cancel: &CancellationToken) -> Result<Finished, ProgramError> {
        self.run_lines(cancel, |_| {}).await
    }

    /// Runs it to its end and returns its standard output, up to `limit` bytes.
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
        // A process left behind may hold the output open; after the timeout it is killed.
        let both = async { tokio::try_join!(running.wait(cancel, |_| {}), read) };
        let ended = tokio::time::timeout(after + GRACE, both).await;
        let (finished, ()) = ended.unwrap_or(Err(ProgramError::Late { name, after }))?;
        Ok((finished, bytes))
    }

    /// Starts it; for programs whose output is read while they run.
    pub fn start(mut self) -> Result<Running, ProgramError> {
        let name = self.tool.name;
        let disk = self.open_disk()?;
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
                    // Without the right to do this, it cannot mount anything either, and will report that itself.
                    Ok(()) | Err(nix::Error::EPERM) => Ok(()),
                    Err(error) => Err(error.into()),
                });
            }
        }
        let confined = |disk: &Disk| {
            let confinement = disk.confinement(&self.tool.path, self.directory.as_deref(), self.timeout);
            confinement.prepare().map(|walls| (walls, disk.number()))
        };
        let walls = disk.as_ref().map(confined).transpose();
        let walls = walls.map_err(|error| {
            let disk = disk.as_ref().map(|disk| disk.path().to_owned()).unwrap_or_default();
            ProgramError::Confine { name, disk, source: error.into() }
        })?;
        if let Some((walls, number)) = walls {
            // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
            unsafe {
                command.pre_exec(move || {
                    disk::pass(number)?;
                    walls.apply()
                });
            }
        }
        let child = command.spawn().map_err(|source| ProgramError::Start { name, source })?;
        tracing::debug!(program = name, pid = child.id(), args = ?self.args, "started");
        Ok(Running { name, child, timeout: self.timeout, success: self.success, disk })
    }

    /// Opens the disk, and puts its name for the program into the arguments.
    fn open_disk(&mut self) -> Result<Option<Disk>, ProgramError> {
        let Some(DiskArgument { at, path, is_written }) = self.disk.clone() else { return Ok(None) };
        let name = self.tool.name;
        let access = if is_written { Access::Write } else { Access::Read };
        let disk =
            Disk::open(&path, access).map_err(|source| ProgramError::Confine { name, disk: path, source })?;
        self.args[at] = disk.argument().into();
        // Otherwise threads of the C library would reserve more memory than the limit allows on hosts with many processors.
        self.env.push(("MALLOC_ARENA_MAX".into(), "1".into()));
        Ok(Some(disk))
    }
}

/// A standard input with these bytes.
fn piped(input: &[u8]) -> io::Result<Stdio> {
    if input.len() > 64 << 10 {
        return Err(io::Error::other("the input is too long"));
    }
    let (reader, mut writer) = io::pipe()?;
    io::Write::write_all(&mut writer, input)?;
    Ok(Stdio::from(reader))
}

/// Whether a file can be executed.
pub(crate) fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
