//! `file_delete`. Works from directory to directory by file descriptors, so that nobody can slip a symbolic link under it.

use std::os::fd::{AsFd, OwnedFd};

use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileDelete, FileDeleteOutput, FileDeleteParams};
use rustix::fs::{AtFlags, CWD, Dir, FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::{check_path, failed, refused};
use crate::os::read_small;
use crate::tools::{Call, Reply, Run, cancelled};

/// The deepest tree that is deleted; each level holds a descriptor.
const DEPTH_MAX: usize = 512;

impl Run for FileDelete {
    async fn run(call: Call, params: FileDeleteParams) -> Result<Reply<FileDeleteOutput>, ToolError> {
        check_path(&params.path)?;
        let recursive = params.recursive.unwrap_or(false);
        let output = call.blocking(move |cancel| delete(params.path, recursive, cancel)).await?;
        let header = match output.deleted {
            1 => format!("{} · deleted", output.path),
            many => format!("{} · {many} files and directories deleted", output.path),
        };
        Ok(Reply::new(header, output))
    }
}

fn delete(path: String, recursive: bool, cancel: &CancellationToken) -> Result<FileDeleteOutput, ToolError> {
    let fail = |error: Errno| failed("delete", &path, error);
    let trimmed = path.trim_end_matches('/');
    let (parent, name) = trimmed.rsplit_once('/').unwrap_or(("", ""));
    if matches!(name, "" | "." | "..") {
        return Err(refused("delete", &path, "it has no name of its own"));
    }
    let parent = if parent.is_empty() { "/" } else { parent };
    let directory = open_directory(CWD, parent.as_bytes(), OFlags::empty()).map_err(fail)?;
    let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    let deleted = if Kind::from_raw_mode(stat.st_mode) == Kind::Directory {
        refuse_mount_points(&directory, name, &path)?;
        if recursive {
            let mut work = Work { path: &path, device: stat.st_dev, deleted: 0, cancel };
            work.empty(&directory, name.as_bytes(), 0)?;
            work.deleted
        } else {
            rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR).map_err(|error| match error {
                Errno::NOTEMPTY | Errno::EXIST => refused("delete", &path, "the directory is not empty")
                    .hint("give recursive: true to delete it whole"),
                other => fail(other),
            })?;
            1
        }
    } else {
        rustix::fs::unlinkat(&directory, name, AtFlags::empty()).map_err(fail)?;
        1
    };
    Ok(FileDeleteOutput { path, deleted })
}

fn open_directory(at: impl AsFd, name: &[u8], more: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more, Mode::empty())
}

/// Refuses a directory that is a mount point or has one below it, before anything is deleted.
fn refuse_mount_points(directory: &OwnedFd, name: &str, path: &str) -> Result<(), ToolError> {
    use std::os::fd::AsRawFd;

    let real = std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let real = real.map_err(|error| failed("delete", path, error))?.join(name);
    let table = read_small("/proc/self/mountinfo", 4 << 20).unwrap_or_default();
    let mounted = table.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    for point in mounted {
        if std::path::Path::new(&point).starts_with(&real) {
            let why = format!("{point} is a mount point");
            return Err(refused("delete", path, &why));
        }
    }
    Ok(())
}

/// A path of the mount table, where blanks are written as `\040`.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, more @ ..] = rest {
        let code = match (first, more) {
            (b'\\', [a, b, c, ..]) => {
                std::str::from_utf8(&[*a, *b, *c]).ok().and_then(|d| u8::from_str_radix(d, 8).ok())
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &more[3..] } else { more };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

struct Work<'a> {
    path: &'a str,
    device: u64,
    deleted: u64,
    cancel: &'a CancellationToken,
}

impl Work<'_> {
    /// Deletes the directory `name` of `parent` with all that is in it.
    fn empty(&mut self, parent: &OwnedFd, name: &[u8], depth: usize) -> Result<(), ToolError> {
        let fail = |error: Errno| {
            let inside = String::from_utf8_lossy(name);
            failed("delete", self.path, error)
                .hint(format!("stopped at `{inside}`; what came before is deleted"))
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
                // Someone else was faster.
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
    fn blanks_in_mount_points_are_read() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/plain\0"), r"/plain\0");
    }
}
