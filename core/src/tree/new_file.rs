//! A file in a place that a client may use. It gets its name once it is whole, so an interrupted one leaves nothing behind.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nexus_schema::{ErrorCode, ToolError};
use rustix::fs::{AtFlags, CWD, FlockOperation, Gid, Mode, OFlags, RenameFlags, Uid, flock};
use rustix::io::Errno;

use super::HostPath;

/// A new file that is being written.
#[derive(Debug)]
pub(crate) struct NewFile {
    directory: OwnedFd,
    name: OsString,
    /// The whole path.
    pub(crate) path: PathBuf,
    file: File,
    /// Its name until it is whole, where the filesystem has no files without a name.
    draft: Option<OsString>,
}

impl NewFile {
    /// Begins a file at a path where nothing is yet; missing directories are made. It belongs to the owner of its directory. Blocks.
    pub(crate) fn begin(at: &HostPath) -> Result<Self, ToolError> {
        let path = at.path.clone();
        let Some(name) = at.name().filter(|_| !at.is_directory && !at.is_root()) else {
            let message = format!("{} is a directory: give the path of a file in it", path.display());
            return Err(ToolError::invalid(message));
        };
        if at.is_there()? {
            return Err(there_already(&path));
        }
        let parent = at.parent().map_err(|e| ToolError::internal(format!("open {}: {e}", path.display())))?;
        let directory = parent.directory()?;
        let failed = |error: Errno| file_error(&path, &error.into());
        let (file, draft) = open(&directory, name).map_err(failed)?;
        // From here on, a failure removes the draft.
        let begun = Self { directory, name: name.to_owned(), path: path.clone(), file: file.into(), draft };
        if rustix::process::geteuid().is_root() {
            let owner = rustix::fs::fstat(&begun.directory).map_err(failed)?;
            let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
            rustix::fs::fchown(&begun.file, Some(uid), Some(gid)).map_err(failed)?;
        }
        Ok(begun)
    }

    /// The file, to write to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the whole file its name. What has got that name meanwhile is not replaced. Blocks.
    pub(crate) fn finish(mut self) -> Result<(), ToolError> {
        let named = self.file.sync_all().and_then(|()| self.put_in_place());
        match named {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(there_already(&self.path)),
            Err(error) => Err(file_error(&self.path, &error)),
        }
    }

    /// Whether the draft of this name is this file.
    fn has(&self, draft: &OsStr) -> bool {
        let named = rustix::fs::statat(&self.directory, draft, AtFlags::SYMLINK_NOFOLLOW);
        let place = |file: rustix::fs::Stat| (file.st_dev, file.st_ino);
        rustix::fs::fstat(&self.file).is_ok_and(|own| named.is_ok_and(|named| place(own) == place(named)))
    }

    fn put_in_place(&mut self) -> io::Result<()> {
        match &self.draft {
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, own, &self.directory, &self.name, AtFlags::SYMLINK_FOLLOW)?;
            }
            Some(draft) if !self.has(draft) => {
                return Err(io::Error::other("another process took its draft away"));
            }
            Some(draft) => {
                let (at, flags) = (&self.directory, RenameFlags::NOREPLACE);
                rustix::fs::renameat_with(at, draft, at, &self.name, flags)?;
                self.draft = None;
            }
        }
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(draft) = self.draft.as_ref().filter(|draft| self.has(draft)) {
            rustix::fs::unlinkat(&self.directory, draft, AtFlags::empty()).ok();
        }
    }
}

/// The mode of new files: what is in them may be secret.
const MODE: u32 = 0o600;

/// Opens a file without a name, or with one that shows that it is not whole.
fn open(directory: &OwnedFd, name: &OsStr) -> Result<(OwnedFd, Option<OsString>), Errno> {
    let mode = Mode::from_raw_mode(MODE);
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
        opened => return opened.map(|file| (file, None)),
    }
    let (file, draft) = open_draft(directory, name)?;
    Ok((file, Some(draft)))
}

/// Makes a file with a name that shows that it is not whole, and locks it. One that a process left there that has ended is removed.
fn open_draft(directory: &OwnedFd, name: &OsStr) -> Result<(OwnedFd, OsString), Errno> {
    let mut draft = OsString::from(".");
    draft.push(name);
    draft.push(".nexus-part");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let make = || {
        let made = flags | OFlags::CREATE | OFlags::EXCL;
        rustix::fs::openat(directory, &draft, made, Mode::from_raw_mode(MODE))
    };
    let file = match make() {
        Err(Errno::EXIST) => {
            // Without waiting for what may be a FIFO. It belongs to nobody who writes if nobody has it locked.
            let left = rustix::fs::openat(directory, &draft, flags | OFlags::NONBLOCK, Mode::empty());
            let left = left.map_err(|_| Errno::EXIST)?;
            flock(&left, FlockOperation::NonBlockingLockExclusive).map_err(|_| Errno::EXIST)?;
            rustix::fs::unlinkat(directory, &draft, AtFlags::empty())?;
            make()?
        }
        made => made?,
    };
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok((file, draft))
}

fn there_already(path: &std::path::Path) -> ToolError {
    ToolError::new(ErrorCode::FileRefused, format!("{} already exists", path.display()))
        .hint("give another path, or remove that file first")
}

fn file_error(path: &std::path::Path, error: &io::Error) -> ToolError {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::Forbidden,
        _ => ErrorCode::Internal,
    };
    ToolError::new(code, format!("write {}: {error}", path.display()))
        .hint("give a path to which the user of nexusd may write")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::tree::Places;

    #[test]
    fn a_file_has_its_name_once_it_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::new(&[root.path().to_owned()], root.path().join("own"));
        let path = root.path().join("new/web.tar");
        let at = places.find(path.to_str().unwrap()).unwrap();
        let begun = NewFile::begin(&at).unwrap();
        begun.file().write_all(b"half").unwrap();
        drop(begun);
        assert_eq!(std::fs::read_dir(root.path().join("new")).unwrap().count(), 0);

        let begun = NewFile::begin(&at).unwrap();
        let late = NewFile::begin(&at);
        begun.file().write_all(b"whole").unwrap();
        begun.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        let owner = |path: &std::path::Path| std::fs::metadata(path).map(|meta| meta.uid()).unwrap();
        assert_eq!(owner(&path), owner(root.path()));
        assert_eq!(std::fs::metadata(&path).map(|meta| meta.mode() & 0o777).unwrap(), 0o600);
        // Nothing is replaced, neither what is there nor what came meanwhile.
        assert_eq!(NewFile::begin(&at).unwrap_err().code, ErrorCode::FileRefused);
        if let Ok(late) = late {
            late.file().write_all(b"late").unwrap();
            assert_eq!(late.finish().unwrap_err().code, ErrorCode::FileRefused);
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(root.path().join("new")).unwrap().count(), 1);
        let directory = places.find(&format!("{}/", root.path().display())).unwrap();
        assert_eq!(NewFile::begin(&directory).unwrap_err().code, ErrorCode::InvalidArgument);
    }

    #[test]
    fn a_draft_that_a_process_left_behind_is_removed_and_one_that_is_written_is_not() {
        let root = tempfile::tempdir().unwrap();
        let directory = OwnedFd::from(File::open(root.path()).unwrap());
        let draft = root.path().join(".web.tar.nexus-part");
        std::fs::write(&draft, "left").unwrap();
        let (file, name) = open_draft(&directory, OsStr::new("web.tar")).unwrap();
        assert_eq!(name, ".web.tar.nexus-part");
        assert_eq!(
            std::fs::metadata(&draft).map(|meta| (meta.len(), meta.mode() & 0o777)).unwrap(),
            (0, 0o600)
        );
        assert_eq!(open_draft(&directory, OsStr::new("web.tar")).unwrap_err(), Errno::EXIST);
        drop(file);
        let (file, draft) = open_draft(&directory, OsStr::new("web.tar")).unwrap();
        let (name, path) = (OsString::from("web.tar"), root.path().join("web.tar"));
        let begun = NewFile {
            directory: directory.try_clone().unwrap(),
            name,
            path,
            file: file.into(),
            draft: Some(draft),
        };
        // One that somebody put there instead is neither taken for it nor removed.
        let other = root.path().join(".web.tar.nexus-part");
        std::fs::remove_file(&other).unwrap();
        std::fs::write(&other, "other").unwrap();
        assert!(begun.finish().is_err());
        assert!(other.exists() && !root.path().join("web.tar").exists());
        // What is no file of its own is left alone.
        std::os::unix::fs::symlink("/dev/null", root.path().join(".link.nexus-part")).unwrap();
        assert_eq!(open_draft(&directory, OsStr::new("link")).unwrap_err(), Errno::EXIST);
    }
}
