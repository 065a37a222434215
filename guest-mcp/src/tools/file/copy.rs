//! `file_copy`. A copy is made under a temporary name beside its destination, and renamed when it is complete. Works with file descriptors, so that
//! nobody can replace a directory by a symbolic link meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::tools::file::{FileCopy, FileCopyOutput, FileCopyParams};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType as Kind, Gid, Mode, OFlags, RenameFlags, SeekFrom, Stat, Timespec,
    Timestamps, Uid,
};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::delete::delete;
use super::draft::{Draft, copy_open_attributes, sync, under_free_name};
use super::rename::{in_the_way, place};
use super::{failed, not_regular, parse_path, refused};
use crate::places::Owner;
use crate::tools::text::shown;
use crate::tools::{Call, Reply, Run, cancelled, human_bytes};

const WHAT: &str = "copy";
/// How much is copied between two checks for cancellation, in bytes.
const PIECE: u64 = 8 << 20;
/// The deepest tree that can be copied; each level uses two descriptors.
const DEPTH_MAX: usize = 256;

impl Run for FileCopy {
    async fn run(call: Call, params: FileCopyParams) -> Result<Reply<FileCopyOutput>, ToolError> {
        let (from, to) = (parse_path(&params.from)?, parse_path(&params.to)?);
        let (recursive, overwrite) = (params.recursive.unwrap_or(false), params.overwrite.unwrap_or(false));
        let work = move |owner, cancel: &_| {
            copy(&Order { from: &from, to: &to, recursive, overwrite, owner }, cancel)
        };
        let counts = call.blocking_as(params.user, work).await?;
        let Counts { files, directories, links, skipped, bytes } = counts;
        let mut header = format!(
            "{} · copied to {} · {} in {files} files",
            shown(&params.from),
            shown(&params.to),
            human_bytes(bytes)
        );
        for (count, what) in [
            (directories, "directories"),
            (links, "symbolic links, as links"),
            (skipped, "left out (devices, pipes, sockets, mounted filesystems)"),
        ] {
            if count > 0 {
                header.push_str(&format!(" · {count} {what}"));
            }
        }
        let (from, to) = (params.from, params.to);
        Ok(Reply::new(header, FileCopyOutput { from, to, files, directories, links, skipped, bytes }))
    }
}

/// Source and destination of a copy.
pub(super) struct Order<'a> {
    pub(super) from: &'a Path,
    pub(super) to: &'a Path,
    pub(super) recursive: bool,
    pub(super) overwrite: bool,
    /// The owner of the copy: its maker, or the same as the source's.
    pub(super) owner: Owner,
}

/// What has been copied so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    files: u64,
    directories: u64,
    links: u64,
    skipped: u64,
    bytes: u64,
}

/// Copies a file or a tree.
pub(super) fn copy(order: &Order<'_>, cancel: &CancellationToken) -> Result<Counts, ToolError> {
    let Order { from, to, recursive, overwrite, owner } = *order;
    let fail = |error: Errno| failed(WHAT, from, error);
    let stat = rustix::fs::statat(CWD, from, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    let kind = Kind::from_raw_mode(stat.st_mode);
    match kind {
        Kind::Directory if !recursive => {
            return Err(not_regular(WHAT, from, kind).hint("give recursive: true to copy the whole tree"));
        }
        Kind::Directory if is_within(to, from) => {
            return Err(refused(WHAT, from, "a directory cannot be copied into itself").errno("EINVAL"));
        }
        Kind::Directory | Kind::RegularFile | Kind::Symlink => {}
        other => return Err(not_regular(WHAT, from, other)),
    }
    let (parent, name) = place("copy to", to, owner)?;
    match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) if Kind::from_raw_mode(there.st_mode) == Kind::Directory => {
            let error = not_regular("copy to", to, Kind::Directory);
            return Err(error.hint("give the full path of the copy, with an unused name"));
        }
        Ok(_) if !overwrite || kind == Kind::Directory => return Err(in_the_way("copy to", to)),
        Ok(_) | Err(Errno::NOENT) => {}
        Err(error) => return Err(failed("copy to", to, error)),
    }
    let mut work = Work { from, owner, device: stat.st_dev, counts: Counts::default(), cancel };
    match kind {
        Kind::RegularFile => {
            let directory = to.parent().unwrap_or(Path::new("/"));
            let draft = Draft::create(directory).map_err(|error| failed("copy to", to, error))?;
            work.content(CWD.as_fd(), from.as_os_str().as_encoded_bytes(), &draft.file)?;
            sync(&draft.file).map_err(|error| failed("copy to", to, error))?;
            let done = if overwrite { draft.replace(name) } else { draft.place(name) };
            done.map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => in_the_way("copy to", to),
                _ => failed("copy to", to, error),
            })?;
        }
        _ => {
            // Under a temporary name until it is complete.
            let (own, ()) = under_free_name(|own| work.node(CWD.as_fd(), from, &stat, &parent, own))
                .map_err(|error| failed("copy to", to, error))?;
            let flags = if overwrite { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
            let whole = match kind {
                Kind::Directory => {
                    work.tree(CWD.as_fd(), from.as_os_str().as_encoded_bytes(), &parent, own.as_bytes(), 0)
                }
                _ => Ok(()),
            };
            let whole = whole.and_then(|()| {
                rustix::fs::renameat_with(&parent, own.as_str(), &parent, name, flags)
                    .map_err(|error| failed("copy to", to, error))
            });
            if let Err(error) = whole {
                let left = to.parent().unwrap_or(Path::new("/")).join(&own);
                // What remains has a temporary name of ours; the first error matters more.
                let _ = delete(&left, true, &CancellationToken::new());
                return Err(error);
            }
        }
    }
    Ok(work.counts)
}

/// Returns whether `path`, which may not exist yet, is `directory` or inside it.
fn is_within(path: &Path, directory: &Path) -> bool {
    let Ok(directory) = directory.canonicalize() else { return false };
    let there = path.ancestors().find_map(|place| place.canonicalize().ok());
    there.is_some_and(|there| there.starts_with(directory))
}

struct Work<'a> {
    from: &'a Path,
    owner: Owner,
    device: u64,
    counts: Counts,
    cancel: &'a CancellationToken,
}

impl Work<'_> {
    fn fail(&self, name: &[u8], error: impl Into<io::Error>) -> ToolError {
        failed(WHAT, self.from, error)
            .hint(format!("stopped at `{}`; the incomplete copy was removed", String::from_utf8_lossy(name)))
    }

    /// Creates an empty directory, or a link like the one at `from`.
    fn node(
        &mut self,
        at: impl AsFd,
        from: impl rustix::path::Arg + Copy,
        stat: &Stat,
        parent: &OwnedFd,
        name: impl rustix::path::Arg + Copy,
    ) -> Result<(), Errno> {
        if Kind::from_raw_mode(stat.st_mode) == Kind::Directory {
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
            self.counts.directories += 1;
            return Ok(());
        }
        let target = rustix::fs::readlinkat(at, from, Vec::new())?;
        rustix::fs::symlinkat(&*target, parent, name)?;
        if self.owner == Owner::OfDirectory {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        self.counts.links += 1;
        Ok(())
    }

    /// Copies the contents of the directory `name` of `at` to the empty directory `new` of `parent`.
    fn tree(
        &mut self,
        at: impl AsFd,
        name: &[u8],
        parent: &OwnedFd,
        new: &[u8],
        depth: usize,
    ) -> Result<(), ToolError> {
        if depth > DEPTH_MAX {
            let why = format!("it is more than {DEPTH_MAX} levels deep");
            return Err(refused(WHAT, self.from, &why).hint("run cp -a with guest_run_command"));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |at, name| rustix::fs::openat(at, name, flags, Mode::empty());
        let source = open(at.as_fd(), name).map_err(|error| self.fail(name, error))?;
        let made = open(parent.as_fd(), new).map_err(|error| self.fail(name, error))?;
        let stat = rustix::fs::fstat(&source).map_err(|error| self.fail(name, error))?;
        for entry in Dir::read_from(&source).map_err(|error| self.fail(name, error))? {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            let entry = entry.map_err(|error| self.fail(name, error))?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let stat = match rustix::fs::statat(&source, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // Deleted meanwhile.
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(self.fail(name, error)),
            };
            match Kind::from_raw_mode(stat.st_mode) {
                Kind::Directory if stat.st_dev != self.device => self.counts.skipped += 1,
                Kind::Directory => {
                    self.node(&source, name, &stat, &made, name).map_err(|error| self.fail(name, error))?;
                    self.tree(&source, name, &made, name, depth + 1)?;
                }
                Kind::Symlink => {
                    self.node(&source, name, &stat, &made, name).map_err(|error| self.fail(name, error))?;
                }
                Kind::RegularFile => {
                    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                    let file = rustix::fs::openat(&made, name, flags, Mode::from_raw_mode(0o600));
                    let file = file.map_err(|error| self.fail(name, error))?;
                    self.content(source.as_fd(), name, &file.into())?;
                }
                _ => self.counts.skipped += 1,
            }
        }
        self.dress(&File::from(source), &stat, &File::from(made)).map_err(|error| self.fail(name, error))
    }

    /// Copies a regular file's content and attributes to a new one.
    fn content(&mut self, at: impl AsFd, name: &[u8], to: &File) -> Result<(), ToolError> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let source = rustix::fs::openat(at, name, flags, Mode::empty());
        let source: File = source.map_err(|error| self.fail(name, error))?.into();
        let stat = rustix::fs::fstat(&source).map_err(|error| self.fail(name, error))?;
        let kind = Kind::from_raw_mode(stat.st_mode);
        if kind != Kind::RegularFile {
            return Err(not_regular(WHAT, self.from, kind));
        }
        let bytes = data(&source, to, self.cancel).map_err(|error| match self.cancel.is_cancelled() {
            true => cancelled(),
            false => self.fail(name, error),
        })?;
        self.dress(&source, &stat, to).map_err(|error| self.fail(name, error))?;
        self.counts.files += 1;
        self.counts.bytes += bytes;
        Ok(())
    }

    /// Gives a copy the owner, attributes, mode and times of its source.
    fn dress(&self, source: &File, stat: &Stat, to: &File) -> io::Result<()> {
        if self.owner == Owner::OfDirectory {
            std::os::unix::fs::fchown(to, Some(stat.st_uid), Some(stat.st_gid))?;
        }
        copy_open_attributes(source, to);
        // After the owner, because changing the owner clears setuid bits. A copy that is made as a user keeps no setuid bits.
        let bits = if self.owner == Owner::OfDirectory { 0o7777 } else { 0o777 };
        rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & bits))?;
        let time = |sec: i64, nsec: u64| Timespec { tv_sec: sec, tv_nsec: nsec as i64 };
        let times = Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
        };
        Ok(rustix::fs::futimens(to, &times)?)
    }
}

/// Copies content, and keeps the holes of the source; returns the number of bytes.
fn data(from: &File, to: &File, cancel: &CancellationToken) -> io::Result<u64> {
    let size = from.metadata()?.len();
    if size == 0 {
        // Files of the kernel have content but no size.
        return io::copy(&mut &*from, &mut &*to);
    }
    let mut at = 0;
    while at < size {
        let (start, end) = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => (start, rustix::fs::seek(from, SeekFrom::Hole(start)).unwrap_or(size)),
            Err(Errno::NXIO) => break,
            Err(_) => (at, size),
        };
        at = start;
        while at < end {
            if cancel.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let copied = piece(from, to, at, (end - at).min(PIECE))?;
            if copied == 0 {
                // The source has become shorter.
                to.set_len(at)?;
                return Ok(at);
            }
            at += copied;
        }
    }
    to.set_len(size)?;
    Ok(size)
}

/// Copies some bytes at an offset; returns 0 at the end.
fn piece(from: &File, to: &File, at: u64, length: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;

    let (mut source, mut target) = (at, at);
    match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), length as usize) {
        Ok(copied) if copied > 0 => return Ok(copied as u64),
        // Some filesystems do not support this, others not with each other.
        Ok(_) | Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::IO) => {}
        Err(error) => return Err(error.into()),
    }
    let mut buffer = vec![0; length.min(256 << 10) as usize];
    let count = from.read_at(&mut buffer, at)?;
    to.write_all_at(&buffer[..count], at)?;
    Ok(count as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes() {
        use std::os::unix::fs::{FileExt, MetadataExt};

        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(b"start", 0).unwrap();
        from.write_all_at(b"end", 64 << 20).unwrap();
        from.set_len(128 << 20).unwrap();
        assert_eq!(data(&from, &to, &CancellationToken::new()).unwrap(), 128 << 20);
        let mut piece = [0; 8];
        to.read_exact_at(&mut piece, (64 << 20) - 1).unwrap();
        assert_eq!(&piece, b"\0end\0\0\0\0");
        let (from, to) = (from.metadata().unwrap(), to.metadata().unwrap());
        assert_eq!((from.len(), to.len()), (128 << 20, 128 << 20));
        assert!(to.blocks() <= from.blocks() + 64, "{} of {} blocks", to.blocks(), from.blocks());
    }
}
