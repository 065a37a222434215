//! Directories and mount points, identified by what they are instead of by their names.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, StatxAttributes, StatxFlags, Uid};
use rustix::io::Errno;

/// The owner of new directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The owner of the parent directory.
    OfDirectory,
    /// The user who creates it.
    Maker,
}

/// Creates a directory and its missing parents with the mode 0755. Each gets the owner of its parent directory.
pub(crate) fn make_directories(path: &Path) -> io::Result<()> {
    Ok(make(path, Owner::OfDirectory).map(drop)?)
}

/// Creates a directory and its missing parents with the mode 0755 and the given owner.
pub(crate) fn make_directories_for(path: &Path, owner: Owner) -> io::Result<()> {
    Ok(make(path, owner).map(drop)?)
}

fn make(path: &Path, owner: Owner) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let parent = path.parent().ok_or(Errno::NOENT)?;
    let parent = make(if parent.as_os_str().is_empty() { Path::new(".") } else { parent }, owner)?;
    // The path ends in `..`: it exists now that its parent does.
    let Some(name) = path.file_name() else { return rustix::fs::open(path, flags, Mode::empty()) };
    let is_new = match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => true,
        // Another process has created it, and owns it.
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let directory = rustix::fs::openat(&parent, name, flags | OFlags::NOFOLLOW, Mode::empty())?;
    if is_new && owner == Owner::OfDirectory {
        inherit_owner(&directory, &rustix::fs::fstat(&parent)?)?;
    }
    Ok(directory)
}

/// Gives a new file the owner of its directory.
pub(crate) fn give_to_owner_of(directory: &Path, file: &File) -> io::Result<()> {
    Ok(inherit_owner(file, &rustix::fs::stat(directory)?)?)
}

/// Gives a new file or directory the owner of its parent directory.
pub(crate) fn inherit_owner(new: impl AsFd, parent: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(parent.st_uid), Gid::from_raw(parent.st_gid));
    if uid == rustix::process::geteuid() && gid == rustix::process::getegid() {
        return Ok(());
    }
    match rustix::fs::chownat(new, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH) {
        // Only root can change owners, and not every filesystem has them.
        Err(Errno::PERM) => Ok(()),
        other => other,
    }
}

/// Returns the device of the filesystem that is mounted on a directory, as `(major, minor)`; `None` if nothing is mounted there.
///
/// It does not compare names: links are followed, and the kernel says whether the directory is the root of a mount.
pub(crate) fn mounted_on(directory: &Path) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(CWD, directory, AtFlags::empty(), StatxFlags::BASIC_STATS).ok()?;
    let device = (stat.stx_dev_major, stat.stx_dev_minor);
    let is_root = if stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
    } else {
        // For kernels before Linux 5.8.
        let above = directory.join("..");
        let above = rustix::fs::statx(CWD, &above, AtFlags::empty(), StatxFlags::BASIC_STATS).ok()?;
        device != (above.stx_dev_major, above.stx_dev_minor)
    };
    is_root.then_some(device)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn directories_belong_to_the_owner_of_the_nearest_parent() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join("home");
        std::fs::create_dir(&home).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&home, Some(54321), Some(54322)).unwrap();
        }
        let owner = |path: &Path| std::fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
        make_directories(&home.join("a/b/../c")).unwrap();
        for path in ["a", "a/b", "a/c"] {
            assert_eq!(owner(&home.join(path)), owner(&home), "{path}");
        }
        make_directories(&home.join("a/c")).unwrap();
        std::fs::write(home.join("file"), "").unwrap();
        symlink("nowhere", home.join("dangling")).unwrap();
        assert!(make_directories(&home.join("file/x")).is_err());
        assert!(make_directories(&home.join("dangling/x")).is_err());
        assert!(!home.join("nowhere").exists(), "nothing is made through a link");
    }

    #[test]
    fn mounts_are_known_whatever_they_are_called() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(mounted_on(root.path()), None);
        assert_eq!(mounted_on(Path::new("/no/such/place")), None);
        let proc = mounted_on(Path::new("/proc"));
        assert!(proc.is_some(), "/proc is mounted");
        symlink("/proc", root.path().join("link")).unwrap();
        assert_eq!(mounted_on(&root.path().join("link")), proc);
        assert_eq!(mounted_on(Path::new("/proc/../proc/")), proc);
        assert_eq!(mounted_on(Path::new("/proc/self")), None);
    }
}
