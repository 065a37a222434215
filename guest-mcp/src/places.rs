//! Directories and mount points, identified by what they are instead of by their names.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Stat, StatxAttributes, StatxFlags, Uid};
use rustix::io::Errno;

/// Flags for a directory that is only passed through, and is no link.
const STEP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

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

/// Returns the part of a path that exists, below `root` and without links, and the names after it; `None` if the path leads out of `root`. The path of
/// `root` has no links.
pub(crate) fn beneath<'a>(root: &Path, path: &'a Path) -> Option<(PathBuf, &'a Path)> {
    let (last, found) = path.ancestors().find_map(|place| Some((place, place.canonicalize().ok()?)))?;
    let missing = path.strip_prefix(last).ok()?;
    // Below what does not exist yet, `..` could lead anywhere.
    let is_plain = missing.components().all(|part| matches!(part, Component::Normal(_)));
    let inside = found.strip_prefix(root).ok().filter(|_| is_plain)?;
    Some((inside.to_owned(), missing))
}

/// Creates a directory and its missing parents, as [`make_directories_for`] does, but none outside of `root`, whatever becomes a link meanwhile. Fails
/// with `EXDEV` if the path leads out of it. The path of `root` has no links.
pub(crate) fn make_directories_beneath(root: &Path, path: &Path, owner: Owner) -> Result<Made, Errno> {
    let (inside, missing) = beneath(root, path).ok_or(Errno::XDEV)?;
    let mut made = Made { root: root.to_owned(), inside, names: Vec::new() };
    match made.make(missing, owner) {
        Ok(()) => Ok(made),
        Err(error) => {
            made.remove();
            Err(error)
        }
    }
}

/// New directories, each in the one before it.
#[derive(Debug)]
pub(crate) struct Made {
    root: PathBuf,
    /// The directory that the first of them is in, below the root.
    inside: PathBuf,
    /// None if all directories were there already.
    names: Vec<OsString>,
}

impl Made {
    fn make(&mut self, missing: &Path, owner: Owner) -> Result<(), Errno> {
        let mut parent = self.open()?;
        for name in missing {
            let is_new = match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => true,
                // Another process has created it, and owns it.
                Err(Errno::EXIST) => false,
                Err(error) => return Err(error),
            };
            if is_new || !self.names.is_empty() {
                self.names.push(name.to_owned());
            } else {
                self.inside.push(name);
            }
            let directory = step(&parent, name)?;
            if is_new && owner == Owner::OfDirectory {
                inherit_owner(&directory, &rustix::fs::fstat(&parent)?)?;
            }
            parent = directory;
        }
        Ok(())
    }

    /// Opens the directory that the first of them is in.
    fn open(&self) -> Result<OwnedFd, Errno> {
        let root = rustix::fs::open(&self.root, STEP, Mode::empty())?;
        self.inside.iter().try_fold(root, |directory, name| step(&directory, name))
    }

    /// Removes those that are empty, and follows no link on the way.
    pub(crate) fn remove(&self) {
        let Ok(first) = self.open() else { return };
        let mut parents = vec![first];
        for name in &self.names {
            let Some(Ok(directory)) = parents.last().map(|parent| step(parent, name)) else { break };
            parents.push(directory);
        }
        for (parent, name) in parents.iter().zip(&self.names).rev() {
            // It stays if another process has put something there.
            let _ = rustix::fs::unlinkat(parent, name.as_os_str(), AtFlags::REMOVEDIR);
        }
    }
}

fn step(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, name, STEP, Mode::empty())
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
    fn nothing_is_made_outside_of_the_root() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        let (root, outside) = (place.join("root"), place.join("outside"));
        std::fs::create_dir_all(root.join("there")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, root.join("out")).unwrap();
        symlink("../outside/none", root.join("dangling")).unwrap();
        symlink(root.join("there"), root.join("in")).unwrap();
        let make = |path: &str| make_directories_beneath(&root, &root.join(path), Owner::Maker);
        for path in ["out", "out/new", "none/../../outside/new", "../outside/new", "../root-too"] {
            assert_eq!(make(path).unwrap_err(), Errno::XDEV, "{path}");
        }
        assert_eq!(make("dangling/new").unwrap_err(), Errno::NOTDIR);
        assert!(make("there").unwrap().names.is_empty());
        let made = make("in/a/b").unwrap();
        assert!(root.join("there/a/b").is_dir());
        // One of them becomes a link before they are removed.
        std::fs::create_dir_all(outside.join("b")).unwrap();
        std::fs::rename(root.join("there/a"), root.join("moved")).unwrap();
        symlink(&outside, root.join("there/a")).unwrap();
        made.remove();
        assert!(outside.join("b").is_dir() && root.join("moved/b").is_dir());
        let made = make("x/y/z").unwrap();
        std::fs::create_dir(root.join("x/y/kept")).unwrap();
        made.remove();
        assert!(root.join("x/y/kept").is_dir() && !root.join("x/y/z").exists());
        let left: Vec<_> =
            std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["b"]);
        assert!(!place.join("root-too").exists());
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
