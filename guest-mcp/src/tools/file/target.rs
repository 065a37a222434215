//! The file that a call writes: it is first found, then prepared, and finally replaced in one step. A file that cannot be replaced (one of the
//! kernel, a mount point, one in another owner's directory) is written in place.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use rustix::fs::{Access, AtFlags, CWD, FileType as Kind};

use super::draft::{Draft, last_name, sync};
use super::{failed, not_regular, open_parent, refused};
use crate::places::{Owner, make_directories_for};

/// The maximum number of symbolic links that are followed, as in the kernel.
const LINKS_MAX: usize = 40;
/// Filesystems whose files are kernel interfaces (linux/magic.h): proc, sysfs, cgroup2, cgroup, debugfs, tracefs.
const KERNEL_FILESYSTEMS: [u64; 6] =
    [0x9fa0, 0x6265_6572, 0x6367_7270, 0x0027_e0eb, 0x6462_6720, 0x7472_6163];

/// A file to be written, which may not exist yet.
#[derive(Debug)]
pub(super) struct Target {
    /// The path as the caller gave it.
    given: PathBuf,
    /// The path after following links at its end, so that a link stays a link.
    path: PathBuf,
    /// The existing file, if any.
    pub(super) existing: Option<Existing>,
}

/// A regular file as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Existing {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// What changes with its content: device, inode, size and times.
    state: [i128; 4],
}

/// New content that is ready to be put in place.
pub(super) enum Ready {
    /// A complete file, synced.
    Draft(Draft),
    /// Bytes that will overwrite the old ones.
    InPlace(Vec<u8>),
}

impl Target {
    /// Finds the file that a path refers to.
    pub(super) fn find(path: &Path) -> Result<Self, ToolError> {
        let given = path.to_owned();
        let path = resolve(path)?;
        if path.parent().is_none() || path.file_name().is_none() {
            return Err(not_regular("write", &given, Kind::Directory));
        }
        if is_directory_name(&given) {
            return Err(refused("write", &given, "it names a directory").errno("EISDIR"));
        }
        let existing = look(&given, &path)?;
        Ok(Self { given, path, existing })
    }

    /// Returns its path, with links followed.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its directory.
    pub(super) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Returns its name there.
    pub(super) fn name(&self) -> &[u8] {
        last_name(&self.path)
    }

    /// Returns the error of writing it.
    pub(super) fn fail(&self, error: impl Into<io::Error>) -> ToolError {
        failed("write", &self.given, error)
    }

    /// Creates its missing parent directories.
    pub(super) fn make_parents(&self, owner: Owner) -> Result<(), ToolError> {
        let directory = self.directory();
        make_directories_for(directory, owner)
            .map_err(|error| failed("create the directory", directory, error))
    }

    /// Checks whether its mode lets this thread's user write it. Replacing a file needs no such right, so without this check read-only files could be
    /// changed.
    pub(super) fn check_writable(&self) -> Result<(), ToolError> {
        if self.existing.is_none() {
            return Ok(());
        }
        match rustix::fs::accessat(CWD, &self.path, Access::WRITE_OK, AtFlags::EACCESS) {
            // A running program can be replaced.
            Ok(()) | Err(rustix::io::Errno::TXTBSY) => Ok(()),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Returns whether new content must overwrite the old.
    fn is_in_place(&self) -> bool {
        is_of_kernel(self.directory())
    }

    /// Prepares new content. The file does not change yet.
    fn prepare(&self, content: Vec<u8>, mode: Option<u32>, owner: Owner) -> Result<Ready, ToolError> {
        let directory = open_parent(self.directory()).map_err(|error| self.fail(error))?;
        self.prepare_in(directory, content, mode, owner)
    }

    /// The same in its open directory, whatever paths lead to now.
    pub(super) fn prepare_in(
        &self,
        directory: OwnedFd,
        content: Vec<u8>,
        mode: Option<u32>,
        owner: Owner,
    ) -> Result<Ready, ToolError> {
        if owner == Owner::Maker {
            self.check_writable()?;
        }
        if self.is_in_place() {
            return Ok(Ready::InPlace(content));
        }
        let old = self.existing.as_ref().map(|old| (self.path.as_path(), old));
        let made = Draft::create_in(directory).and_then(|draft| {
            draft.dress(old, mode, owner)?;
            Ok(draft)
        });
        match made {
            Ok(mut draft) => {
                let written = draft.file.write_all(&content).and_then(|()| sync(&draft.file));
                written.map_err(|error| self.fail(error))?;
                Ok(Ready::Draft(draft))
            }
            // A user who may write the file may lack the right to create another beside it, or to change its owner.
            Err(error) if old.is_some() && error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(Ready::InPlace(content))
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Puts new content in place.
    pub(super) fn commit(&self, ready: Ready, mode: Option<u32>) -> Result<(), ToolError> {
        match ready {
            Ready::InPlace(content) => self.overwrite(&content, mode).map_err(|error| self.fail(error)),
            Ready::Draft(draft) => {
                let replaced = draft.replace(self.name());
                replaced.map_err(|error| self.fail(error))
            }
        }
    }

    /// Prepares new content and puts it in place. A mount point cannot be replaced, so it is overwritten.
    pub(super) fn put(&self, content: Vec<u8>, mode: Option<u32>, owner: Owner) -> Result<(), ToolError> {
        let kept = self.existing.is_some().then(|| content.clone());
        match (self.prepare(content, mode, owner)?, kept) {
            (Ready::Draft(draft), Some(content)) => match draft.replace(self.name()) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    self.overwrite(&content, mode).map_err(|error| self.fail(error))
                }
                done => done.map_err(|error| self.fail(error)),
            },
            (ready, _) => self.commit(ready, mode),
        }
    }

    /// Overwrites the existing file.
    pub(super) fn overwrite(&self, content: &[u8], mode: Option<u32>) -> io::Result<()> {
        fill(open_again(&self.path)?, content, mode)
    }

    /// Overwrites the existing file in its open directory, whatever paths lead to now.
    pub(super) fn overwrite_in(
        &self,
        directory: &OwnedFd,
        content: &[u8],
        mode: Option<u32>,
    ) -> io::Result<()> {
        let directory = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let path = Path::new(&directory).join(OsStr::from_bytes(self.name()));
        fill(open_again(&path)?, content, mode)
    }

    /// Returns whether another target is the same file.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (&self.existing, &other.existing) {
            (Some(one), Some(other)) => one.state[0] == other.state[0],
            (None, None) => self.path == other.path,
            _ => false,
        }
    }

    /// Refuses a file that has changed since it was found.
    pub(super) fn check_unchanged(&self) -> Result<(), ToolError> {
        if look(&self.given, &self.path)? == self.existing {
            return Ok(());
        }
        let text = format!("write {}: it was changed meanwhile", self.given.display());
        Err(ToolError::new(ErrorCode::Changed, text).hint("read it again"))
    }
}

/// Writes a file that was opened to overwrite it.
fn fill(mut file: File, content: &[u8], mode: Option<u32>) -> io::Result<()> {
    // Kernel interfaces expect a value in one write.
    file.write_all(content)?;
    if let Some(mode) = mode {
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
    sync(&file)
}

/// Opens an existing file to overwrite it. Never waits, whatever it was replaced by meanwhile.
pub(super) fn open_again(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().write(true).truncate(true).custom_flags(flags).open(path)?;
    check_regular(&file)?;
    Ok(file)
}

/// Refuses an open file that is not a regular one: it was replaced after it was found.
pub(super) fn check_regular(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no longer a regular file"))
}

/// Follows the links at the end of a path.
fn resolve(given: &Path) -> Result<PathBuf, ToolError> {
    let mut path = given.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(refused("write", given, "too many symbolic links").errno("ELOOP"))
}

/// Returns whether the files in a directory are kernel interfaces.
pub(super) fn is_of_kernel(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|found| KERNEL_FILESYSTEMS.contains(&(found.f_type as u64)))
}

/// Returns whether a path has the form of a directory's, such as a slash at the end.
pub(super) fn is_directory_name(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

fn look(given: &Path, path: &Path) -> Result<Option<Existing>, ToolError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("write", given, error)),
    };
    match Kind::from_raw_mode(metadata.mode()) {
        Kind::RegularFile => {
            let changed = |seconds: i64, nanoseconds: i64| {
                i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
            };
            Ok(Some(Existing {
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
                state: [
                    i128::from(metadata.dev()) << 64 | i128::from(metadata.ino()),
                    i128::from(metadata.size()),
                    changed(metadata.mtime(), metadata.mtime_nsec()),
                    changed(metadata.ctime(), metadata.ctime_nsec()),
                ],
            }))
        }
        other => Err(not_regular("write", given, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_a_pipe_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        std::fs::write(&path, "old").unwrap();
        let target = Target::find(&path).unwrap();
        // As a program does that wants to stop the agent.
        std::fs::remove_file(&path).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(CWD, &path, Kind::Fifo, mode, 0).unwrap();
        assert_eq!(target.overwrite(b"new", None).unwrap_err().raw_os_error(), Some(libc::ENXIO));
        // With a reader it would take what is written.
        let _reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        assert_eq!(target.overwrite(b"new", None).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
