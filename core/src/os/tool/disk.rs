//! The disk that a confined program works on: opened before the program starts, and lent to its user while it runs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::super::confine::{self, Access, Confinement, NOBODY};

/// A disk that is lent to a program.
#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    /// Also held by the restrictions that are being applied.
    file: Arc<OwnedFd>,
    access: Access,
    length: u64,
    /// The owner to restore.
    owner: Option<(u32, u32)>,
}

impl Disk {
    /// Opens it, and gives it to the program's future user. Refuses symbolic links and anything but regular files.
    pub(super) fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Write);
        let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let everybody_reads = metadata.permissions().mode() & 0o004 != 0;
        let is_lent = confine::is_root() && !(access == Access::Read && everybody_reads);
        let owner = if is_lent { Some(lend(&file, &metadata)?) } else { None };
        let length = metadata.len();
        Ok(Self { path: path.to_owned(), file: Arc::new(file.into()), access, length, owner })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of its descriptor, the same here and in the program.
    pub(super) fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The argument that names it for the program.
    pub(super) fn argument(&self) -> String {
        format!("/proc/self/fd/{}", self.number())
    }

    /// The program's output, with the disk's real path.
    pub(super) fn named(&self, said: &str) -> String {
        said.replace(&self.argument(), &self.path.to_string_lossy())
    }

    /// The same for a line of its output.
    pub(super) fn named_line(&self, line: &[u8]) -> Vec<u8> {
        let argument = self.argument();
        let mut named = Vec::with_capacity(line.len());
        let mut rest = line;
        while let Some(at) = memchr::memmem::find(rest, argument.as_bytes()) {
            named.extend_from_slice(&rest[..at]);
            named.extend_from_slice(self.path.as_os_str().as_bytes());
            rest = &rest[at + argument.len()..];
        }
        named.extend_from_slice(rest);
        named
    }

    /// The restrictions of the program; it may read its working directory if it has one.
    pub(super) fn confinement(
        &self,
        program: &Path,
        directory: Option<&Path>,
        timeout: Duration,
    ) -> Confinement {
        let disk = Arc::clone(&self.file);
        let mut confinement = confine::tools(program, disk, self.access, self.length, timeout);
        if let Some(directory) = directory {
            confinement.files = confinement.files.map(|files| files.allow(directory, Access::Read));
        }
        confinement
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let Some((uid, gid)) = self.owner else { return };
        if let Err(error) = fchown(self.file.as_fd(), Some(uid), Some(gid)) {
            tracing::warn!(disk = %self.path.display(), %error, "cannot give a disk back from the user nobody");
        }
    }
}

/// Gives a file to `nobody`, and returns its owner. Other users cannot reach it, because the parent directories are closed to
/// all but their owner.
fn lend(file: &File, metadata: &std::fs::Metadata) -> io::Result<(u32, u32)> {
    let (uid, gid) = (metadata.uid(), metadata.gid());
    fchown(file, Some(NOBODY.uid), Some(NOBODY.gid))?;
    // A file that a killed daemon left lent goes back to root.
    Ok(if uid == NOBODY.uid { (0, 0) } else { (uid, gid) })
}

/// Passes this descriptor to the program, and none besides stdin, stdout and stderr. Runs in the child, before exec.
pub(super) fn pass(number: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls on descriptor numbers; nothing is closed before exec. Where the kernel does not know the first,
    // what this process opened itself is closed on exec all the same.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::fcntl(number, libc::F_SETFD, 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
