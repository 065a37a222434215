//! A new file that is not in place yet. If the filesystem supports it, it has no name: then nothing is left of it when the agent dies.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use super::open_parent;
use super::target::Existing;
use crate::places::{Owner, inherit_owner};

/// The maximum total size of the extended attributes that are copied, in bytes.
const XATTR_MAX: usize = 64 << 10;
/// How many times a temporary name is tried that may be taken.
const NAMES_MAX: usize = 8;

/// The file, and the directory that it will be in.
#[derive(Debug)]
pub(super) struct Draft {
    /// Its content, open for reading and writing.
    pub(super) file: File,
    directory: OwnedFd,
    /// Its temporary name, if it has one.
    name: Option<String>,
}

impl Draft {
    /// Creates an empty draft for a directory.
    pub(super) fn create(directory: &Path) -> io::Result<Self> {
        Self::create_in(open_parent(directory)?)
    }

    /// Creates an empty draft for an open directory.
    pub(super) fn create_in(directory: OwnedFd) -> io::Result<Self> {
        let (mode, flags) = (Mode::from_raw_mode(0o600), OFlags::RDWR | OFlags::CLOEXEC);
        match rustix::fs::openat(&directory, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => Ok(Self { file: file.into(), directory, name: None }),
            // The filesystem does not support files without names.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let open = |name: &str| {
                    rustix::fs::openat(&directory, name, flags | OFlags::CREATE | OFlags::EXCL, mode)
                };
                let (name, file) = under_free_name(open)?;
                Ok(Self { file: file.into(), directory, name: Some(name) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives it the owner, the attributes and the mode of the file at `path` that it replaces, or those of a new file. `mode` overrides all others.
    pub(super) fn dress(
        &self,
        old: Option<(&Path, &Existing)>,
        mode: Option<u32>,
        owner: Owner,
    ) -> io::Result<()> {
        match old {
            Some((path, old)) => {
                let own = self.file.metadata()?;
                if (own.uid(), own.gid()) != (old.uid, old.gid) {
                    std::os::unix::fs::fchown(&self.file, Some(old.uid), Some(old.gid))?;
                }
                copy_attributes(path, &self.file);
            }
            None if owner == Owner::OfDirectory => {
                inherit_owner(&self.file, &rustix::fs::fstat(&self.directory)?)?;
            }
            None => {}
        }
        // After the owner, because changing the owner clears setuid bits.
        let mode = mode.or(old.map(|(_, old)| old.mode)).unwrap_or(0o644);
        self.file.set_permissions(std::fs::Permissions::from_mode(mode))
    }

    /// Moves it into place, over the existing file.
    pub(super) fn replace(mut self, name: &[u8]) -> io::Result<()> {
        let own = self.named()?.to_owned();
        rustix::fs::renameat(&self.directory, own.as_str(), &self.directory, name)?;
        self.name = None;
        sync_directory(&self.directory)
    }

    /// Moves it into place, if nothing is there yet.
    pub(super) fn place(mut self, name: &[u8]) -> io::Result<()> {
        match self.name.take() {
            None => self.link(name)?,
            Some(own) => {
                let at = &self.directory;
                let moved = rustix::fs::renameat_with(at, own.as_str(), at, name, RenameFlags::NOREPLACE);
                if let Err(error) = moved {
                    self.name = Some(own);
                    return Err(error.into());
                }
            }
        }
        sync_directory(&self.directory)
    }

    /// Exchanges it with the file of this name. Dropping the draft then deletes that file; another exchange restores it.
    pub(super) fn exchange(&mut self, name: &[u8]) -> io::Result<()> {
        let own = self.named()?.to_owned();
        let at = &self.directory;
        Ok(rustix::fs::renameat_with(at, own.as_str(), at, name, RenameFlags::EXCHANGE)?)
    }

    /// Deletes it, or the file that it was exchanged with.
    pub(super) fn discard(self) {
        let directory = self.directory.try_clone();
        drop(self);
        // The deletion need not be synced, but the file that took its place must be.
        if let Ok(directory) = directory {
            let _ = sync_directory(&directory);
        }
    }

    /// Returns its temporary name; gives it one if it has none.
    fn named(&mut self) -> io::Result<&str> {
        if self.name.is_none() {
            let (name, ()) = under_free_name(|name| self.link(name.as_bytes()))?;
            self.name = Some(name);
        }
        Ok(self.name.as_deref().unwrap_or_default())
    }

    fn link(&self, name: &[u8]) -> Result<(), Errno> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(rustix::fs::CWD, own, &self.directory, name, AtFlags::SYMLINK_FOLLOW)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // This is a temporary name of ours. If it cannot be removed, the first error matters more.
            let _ = rustix::fs::unlinkat(&self.directory, name.as_str(), AtFlags::empty());
        }
    }
}

/// Returns whether an open directory is `root` or below it, whatever paths lead to now.
pub(super) fn is_beneath(directory: &OwnedFd, root: &Path) -> bool {
    let own = format!("/proc/self/fd/{}", directory.as_raw_fd());
    std::fs::read_link(own).is_ok_and(|path| path.starts_with(root))
}

/// Calls `make` with random names until one is not taken.
pub(super) fn under_free_name<T>(mut make: impl FnMut(&str) -> Result<T, Errno>) -> io::Result<(String, T)> {
    let mut tries = 0;
    loop {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = format!(".nexus-{:016x}", u64::from_ne_bytes(random));
        match make(&name) {
            Ok(made) => return Ok((name, made)),
            Err(Errno::EXIST) if tries < NAMES_MAX => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Syncs a file to disk. Files that are not on a disk, such as those of the kernel, cannot be synced; that is not an error.
pub(super) fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Syncs the names in a directory to disk, if this thread may read it.
fn sync_directory(directory: impl AsFd) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, ".", flags, Mode::empty()) {
        Ok(directory) => sync(&File::from(directory)),
        Err(Errno::ACCESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies capabilities, ACLs and the like, as far as the filesystem supports them.
fn copy_attributes(from: &Path, to: &File) {
    carry(
        |names| rustix::fs::llistxattr(from, names),
        |name, value| rustix::fs::lgetxattr(from, name, value),
        to,
    );
}

/// Copies the extended attributes of an open file.
pub(super) fn copy_open_attributes(from: &File, to: &File) {
    carry(
        |names| rustix::fs::flistxattr(from, names),
        |name, value| rustix::fs::fgetxattr(from, name, value),
        to,
    );
}

fn carry(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
    to: &File,
) {
    let mut names = vec![0; XATTR_MAX];
    let Ok(length) = list(&mut names) else { return };
    let mut value = vec![0; if length > 0 { XATTR_MAX } else { 0 }];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if let Ok(length) = get(name, &mut value) {
            let _ = rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty());
        }
    }
}

/// Returns the last name of a path, as bytes.
pub(super) fn last_name(path: &Path) -> &[u8] {
    path.file_name().unwrap_or_default().as_bytes()
}
