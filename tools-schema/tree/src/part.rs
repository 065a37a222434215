//! The part of a file whose copy was interrupted: a file beside its destination, which a later copy resumes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use data_encoding::HEXLOWER;
use nexus_schema::stream::TreePart;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::attributes::{Attribute, settle_with};
use crate::destination::Facts;
use crate::error::TreeError;
use crate::report::Watch;

/// How much is read at once, in bytes.
const CHUNK: usize = 256 << 10;
/// The name of a part is the file's name between these.
const NAME: (&[u8], &[u8]) = (b".", b".nexus-part");

/// A part, locked by this copy.
#[derive(Debug)]
pub struct Part {
    directory: OwnedFd,
    name: OsString,
    /// The name of the whole file.
    of: Vec<u8>,
    file: File,
    /// How much of it is kept, in bytes.
    kept: u64,
}

impl Part {
    /// Opens the part of the file `name` in a directory; `None` if there is none.
    pub fn find(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Self>, TreeError> {
        match Self::open(directory, name, OFlags::empty()) {
            Err(TreeError::File { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    /// The same, but makes an empty one if there is none.
    pub fn find_or_make(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Self, TreeError> {
        Self::open(directory, name, OFlags::CREATE)
    }

    fn open(directory: BorrowedFd<'_>, of: &[u8], more: OFlags) -> Result<Self, TreeError> {
        let name = OsString::from_vec([NAME.0, of, NAME.1].concat());
        let fail = |error: Errno| TreeError::file("open the part", name.as_bytes(), error);
        let refuse = |why| Err(TreeError::refused(name.as_bytes(), why));
        let flags =
            OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | more;
        let file = rustix::fs::openat(directory, &name, flags, Mode::from_raw_mode(0o600)).map_err(fail)?;
        let stat = rustix::fs::fstat(&file).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
            return refuse("it is no part of an interrupted copy");
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return refuse("another copy to the same file is under way"),
            Err(error) => return Err(fail(error)),
        }
        let directory = directory
            .try_clone_to_owned()
            .map_err(|error| TreeError::file("open", name.as_bytes(), error))?;
        Ok(Self { directory, file: file.into(), name, of: of.to_vec(), kept: 0 })
    }

    /// Returns its length and its hash.
    pub fn describe(&self, watch: &mut dyn Watch) -> Result<TreePart, TreeError> {
        let bytes = self.len()?;
        Ok(TreePart { bytes, sha256: hash(&self.file, bytes, self.name.as_bytes(), watch)? })
    }

    fn len(&self) -> Result<u64, TreeError> {
        let metadata = self.file.metadata();
        Ok(metadata.map_err(|error| TreeError::file("look at", self.name.as_bytes(), error))?.len())
    }

    /// Keeps its first `bytes` bytes when the rest comes.
    pub fn keep(&mut self, bytes: u64) -> Result<(), TreeError> {
        if bytes > self.len()? {
            return Err(TreeError::refused(
                self.name.as_bytes(),
                "it has become shorter: start the copy again",
            ));
        }
        self.kept = bytes;
        Ok(())
    }

    /// Prepares it for the rest of its file from an offset on, or for all of it. `path` is what came.
    pub(crate) fn begin(self, path: &[u8], from: u64) -> Result<Begun, TreeError> {
        if path != self.of {
            return Err(TreeError::refused(path, "it is not the file that was asked for"));
        }
        if from != 0 && from != self.kept {
            return Err(TreeError::refused(self.name.as_bytes(), "the rest of another part came"));
        }
        let cut = self.file.set_len(from);
        cut.map_err(|error| TreeError::file("write", self.name.as_bytes(), error))?;
        Ok(Begun(self))
    }
}

/// A part that is being written. It stays if the copy is interrupted, unless it is empty.
#[derive(Debug)]
pub(crate) struct Begun(Part);

impl Begun {
    pub(crate) fn file(&self) -> &File {
        &self.0.file
    }

    /// Moves it into place, replacing an existing file.
    pub(crate) fn place(self, name: &OsStr, facts: &Facts, attributes: &[&Attribute]) -> Result<(), Errno> {
        let Part { directory, name: own, file, .. } = &self.0;
        settle_with(file, facts, attributes)?;
        rustix::fs::renameat(directory, own, directory, name)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // The lock is still held, so no other copy uses it. If it was moved into place, its name no longer exists.
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// The SHA-256 of a file's first bytes, in hexadecimal digits. Of a shorter file, that of all.
pub(crate) fn hash(
    mut file: &File,
    bytes: u64,
    path: &[u8],
    watch: &mut dyn Watch,
) -> Result<String, TreeError> {
    use std::io::Seek;
    let fail = |error: std::io::Error| TreeError::file("read", path, error);
    file.rewind().map_err(fail)?;
    let (mut hash, mut buffer, mut left) = (Sha256::new(), vec![0; CHUNK], bytes);
    while left > 0 {
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        match file.read(&mut buffer[..want]) {
            Ok(0) => break,
            Ok(read) => {
                hash.update(&buffer[..read]);
                left -= read as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(fail(error)),
        }
        watch.at(0, 0)?;
    }
    file.rewind().map_err(fail)?;
    Ok(HEXLOWER.encode(&hash.finalize()))
}
