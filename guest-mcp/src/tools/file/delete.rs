//! `file_delete`. Works with file descriptors from directory to directory, so that nobody can replace a directory by a symbolic link meanwhile.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileDelete, FileDeleteOutput, FileDeleteParams};
use rustix::fs::{AtFlags, CWD, Dir, FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::{failed, parse_path, refused};
use crate::os::{mount_points, read_small};
use crate::tools::text::shown;
use crate::tools::{Call, Reply, Run, cancelled};

/// The deepest tree that can be deleted; each level uses a descriptor.
const DEPTH_MAX: usize = 512;

impl Run for FileDelete {
    async fn run(call: Call, params: FileDeleteParams) -> Result<Reply<FileDeleteOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let recursive = params.recursive.unwrap_or(false);
        let deleted =
            call.blocking_as(params.user, move |_, cancel| delete(&path, recursive, cancel)).await?;
        let output = FileDeleteOutput { path: params.path, deleted };
        let header = match output.deleted {
            1 => format!("{} · deleted", shown(&output.path)),
            many => format!("{} · {many} files and directories deleted", shown(&output.path)),
        };
        Ok(Reply::new(header, output))
    }
}

/// Deletes a file, or with `recursive` a tree; returns the number of deleted entries.
pub(super) fn delete(path: &Path, recursive: bool, cancel: &CancellationToken) -> Result<u64, ToolError> {
    let fail = |error: Errno| failed("delete", path, error);
    let (parent, name) = split(path).ok_or_else(|| refused("delete", path, "it has no name of its own"))?;
    let directory = open_directory(CWD, parent, OFlags::empty()).map_err(fail)?;
    let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    let deleted = if Kind::from_raw_mode(stat.st_mode) == Kind::Directory {
        refuse_mount_points(&directory, name, path)?;
        if recursive {
            let mut work = Work { path, device: stat.st_dev, deleted: 0, cancel };
            work.empty(&directory, name, 0)?;
            work.deleted
        } else {
            rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR).map_err(|error| match error {
                Errno::NOTEMPTY | Errno::EXIST => refused("delete", path, "the directory is not empty")
                    .errno("ENOTEMPTY")
                    .hint("give recursive: true to delete the whole tree"),
                other => fail(other),
            })?;
            1
        }
    } else {
        rustix::fs::unlinkat(&directory, name, AtFlags::empty()).map_err(fail)?;
        1
    };
    Ok(deleted)
}

/// Splits a path into its directory and its name there; `None` if it has no name of its own.
pub(super) fn split(path: &Path) -> Option<(&[u8], &[u8])> {
    let bytes = path.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|byte| *byte != b'/')? + 1;
    let start = bytes[..end].iter().rposition(|byte| *byte == b'/')? + 1;
    let (parent, name) = (&bytes[..start], &bytes[start..end]);
    (!matches!(name, b"." | b"..")).then_some((parent, name))
}

fn open_directory(at: impl AsFd, name: &[u8], more: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more, Mode::empty())
}

/// Refuses a directory that is a mount point or has one below it, before anything is deleted.
pub(super) fn refuse_mount_points(directory: &OwnedFd, name: &[u8], path: &Path) -> Result<(), ToolError> {
    use std::os::fd::AsRawFd;

    let real = std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let real = real.map_err(|error| failed("delete", path, error))?.join(OsStr::from_bytes(name));
    let table = read_small("/proc/self/mountinfo", 4 << 20).unwrap_or_default();
    for point in mount_points(&table) {
        if point.starts_with(&real) {
            let why = format!("{} is a mount point", point.display());
            return Err(refused("delete", path, &why).errno("EBUSY"));
        }
    }
    Ok(())
}

struct Work<'a> {
    path: &'a Path,
    device: u64,
    deleted: u64,
    cancel: &'a CancellationToken,
}

impl Work<'_> {
    /// Deletes the directory `name` of `parent` and everything in it.
    fn empty(&mut self, parent: &OwnedFd, name: &[u8], depth: usize) -> Result<(), ToolError> {
        let path = self.path;
        let fail = |error: Errno| {
            let inside = String::from_utf8_lossy(name);
            failed("delete", path, error).hint(format!("stopped at `{inside}`; earlier entries were deleted"))
        };
        if depth > DEPTH_MAX {
            let why = format!("it is more than {DEPTH_MAX} levels deep");
            return Err(refused("delete", self.path, &why).hint("run rm -rf with guest_run_command"));
        }
        let directory = open_directory(parent, name, OFlags::NOFOLLOW).map_err(fail)?;
        if rustix::fs::fstat(&directory).map_err(fail)?.st_dev != self.device {
            return Err(refused("delete", self.path, "a filesystem was mounted in it meanwhile"));
        }
        for entry in Dir::read_from(&directory).map_err(fail)? {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                Kind::Unknown => match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => Kind::from_raw_mode(stat.st_mode),
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(fail(error)),
                },
                known => known,
            };
            if kind == Kind::Directory {
                self.empty(&directory, name, depth + 1)?;
                continue;
            }
            match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
                Ok(()) => self.deleted += 1,
                // Another process was faster.
                Err(Errno::NOENT) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
            .map_err(|error| failed("delete", self.path, error))?;
        self.deleted += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_their_last_name() {
        fn parts(path: &str) -> Option<(&[u8], &[u8])> {
            split(Path::new(path))
        }
        assert_eq!(parts("/a/b"), Some((&b"/a/"[..], &b"b"[..])));
        assert_eq!(parts("/a//b//"), Some((&b"/a//"[..], &b"b"[..])));
        assert_eq!(parts("/a"), Some((&b"/"[..], &b"a"[..])));
        for none in ["/", "//", "/a/.", "/.."] {
            assert_eq!(parts(none), None, "{none}");
        }
    }
}
