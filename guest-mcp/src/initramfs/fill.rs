//! Fills an in-memory filesystem with what the image has at that path, so that mounting it hides nothing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Dir, FileType as Kind, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fgetxattr, flistxattr, fsetxattr, mkdirat, mknodat, openat, readlinkat, statat, symlinkat,
    utimensat,
};
use rustix::io::Errno;

use crate::os::reason;

/// The deepest tree that is copied.
const DEPTH_MAX: usize = 64;
/// How many bytes are read of the names of all extended attributes, and of each value.
const XATTR_MAX: usize = 64 << 10;

/// Copies the contents of `from` to `to`, except for the names in `but` at the top level, with owners, modes, times and
/// attributes. Skips what cannot be copied, and returns the first such problem.
pub(super) fn fill(from: &OwnedFd, to: &OwnedFd, but: &[&str]) -> Option<String> {
    let mut copy = Copy { problem: None, left_out: 0 };
    let opened = openat(from, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    match opened {
        Ok(from) => copy.directory(&from, to, but, 0),
        Err(error) => copy.failed(".", error.into()),
    }
    let more = copy.left_out.saturating_sub(1);
    copy.problem.map(|problem| if more == 0 { problem } else { format!("{problem}, and {more} more") })
}

struct Copy {
    problem: Option<String>,
    left_out: usize,
}

impl Copy {
    fn failed(&mut self, name: &str, error: io::Error) {
        self.left_out += 1;
        self.problem.get_or_insert_with(|| format!("{name}: {}", reason(&error)));
    }

    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, but: &[&str], depth: usize) {
        let entries = match Dir::read_from(from) {
            Ok(entries) => entries,
            Err(error) => return self.failed(".", error.into()),
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_owned();
            let shown = name.to_string_lossy();
            if shown == "." || shown == ".." || but.contains(&shown.as_ref()) {
                continue;
            }
            if let Err(error) = self.entry(from, to, &name, depth) {
                self.failed(&shown, error);
            }
        }
    }

    fn entry(&mut self, from: &OwnedFd, to: &OwnedFd, name: &std::ffi::CStr, depth: usize) -> io::Result<()> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = Kind::from_raw_mode(stat.st_mode);
        let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match kind {
            Kind::Directory => {
                if depth >= DEPTH_MAX {
                    return Err(io::Error::other("it is too deep in directories"));
                }
                mkdirat(to, name, Mode::from_raw_mode(0o700))?;
                let old = openat(from, name, read | OFlags::DIRECTORY, Mode::empty())?;
                let new = openat(to, name, read | OFlags::DIRECTORY, Mode::empty())?;
                self.directory(&old, &new, &[], depth + 1);
                own(to, name, &stat)?;
                copy_attributes(&old, &new);
            }
            Kind::RegularFile => {
                let mut old: File = openat(from, name, read, Mode::empty())?.into();
                let made = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut new: File = openat(to, name, made, Mode::from_raw_mode(0o600))?.into();
                io::copy(&mut old, &mut new)?;
                own(to, name, &stat)?;
                copy_attributes(&old.into(), &new.into());
            }
            Kind::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
                chown(to, name, &stat)?;
            }
            Kind::Fifo | Kind::Socket | Kind::CharacterDevice | Kind::BlockDevice => {
                mknodat(to, name, kind, Mode::from_raw_mode(0o600), stat.st_rdev)?;
                own(to, name, &stat)?;
            }
            Kind::Unknown => return Ok(()),
        }
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time(stat.st_atime as i64, stat.st_atime_nsec as i64),
            last_modification: time(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        };
        Ok(utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Gives a directory the owner and the mode of another.
pub(super) fn own_as(directory: &OwnedFd, like: &OwnedFd) -> Result<(), Errno> {
    own(directory, c".", &statat(like, c"", AtFlags::EMPTY_PATH)?)
}

fn own(at: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> Result<(), Errno> {
    chown(at, name, stat)?;
    // After the owner, because changing the owner clears setuid bits.
    chmodat(at, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())
}

fn chown(at: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Copies capabilities, ACLs and the like, if both filesystems support them.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd) {
    let mut names = vec![0; XATTR_MAX];
    let Ok(length) = flistxattr(from, &mut names) else { return };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; XATTR_MAX];
        if let Ok(length) = fgetxattr(from, name, &mut value) {
            let _ = fsetxattr(to, name, &value[..length], XattrFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
    use std::path::Path;

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    }

    #[test]
    fn what_the_image_holds_is_there_as_it_was() {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let old = |path: &str| from.path().join(path);
        let new = |path: &str| to.path().join(path);
        std::fs::create_dir_all(old("postgresql/deep")).unwrap();
        std::fs::create_dir_all(old("nexus/theirs")).unwrap();
        std::fs::create_dir_all(old("postgresql/nexus")).unwrap();
        std::fs::write(old("postgresql/deep/file"), "content").unwrap();
        symlink("/lost", old("link")).unwrap();
        mknodat(open(from.path()), "pipe", Kind::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        chown(old("postgresql"), Some(999), Some(998)).unwrap();
        std::fs::set_permissions(old("postgresql"), std::fs::Permissions::from_mode(0o2775)).unwrap();
        chown(old("postgresql/deep/file"), Some(1), Some(2)).unwrap();
        std::fs::set_permissions(old("postgresql/deep/file"), std::fs::Permissions::from_mode(0o4711))
            .unwrap();
        let past = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::open(old("postgresql")).unwrap().set_modified(past).unwrap();

        assert_eq!(fill(&open(from.path()), &open(to.path()), &["nexus"]), None);
        for path in ["postgresql", "postgresql/deep", "postgresql/deep/file", "link", "pipe"] {
            let facts = |path: &Path| {
                let meta = std::fs::symlink_metadata(path).unwrap();
                (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec())
            };
            assert_eq!(facts(&new(path)), facts(&old(path)), "{path}");
        }
        assert_eq!(std::fs::metadata(new("postgresql")).unwrap().mode() & 0o7777, 0o2775);
        assert_eq!(std::fs::read_to_string(new("postgresql/deep/file")).unwrap(), "content");
        assert_eq!(std::fs::read_link(new("link")).unwrap(), Path::new("/lost"));
        assert!(!new("nexus").exists() && new("postgresql/nexus").exists());

        // Existing files are not replaced; everything else is copied.
        let problem = fill(&open(from.path()), &open(to.path()), &[]).unwrap();
        assert!(problem.contains("file exists") && problem.contains("more"), "{problem}");
        assert!(new("nexus/theirs").exists());
    }
}
