//! Finds the mount points for the kernel's filesystems inside the image's own root, even if they are links.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2, readlinkat};
use rustix::io::Errno;

/// The maximum number of links on a path, as in the kernel.
const LINKS_MAX: usize = 40;

/// The root directory of a mounted image.
pub(super) struct Root(OwnedFd);

/// An open directory.
pub(super) struct Place(pub(super) OwnedFd);

impl Place {
    /// Returns a path to it that stays valid even if it is renamed.
    pub(super) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

impl Root {
    pub(super) fn open(path: &str) -> Result<Self, Errno> {
        Ok(Self(rustix::fs::open(path, flags(), Mode::empty())?))
    }

    /// Returns the directory at a path in the image; `None` if it does not exist.
    pub(super) fn find(&self, path: &str) -> Result<Option<Place>, Errno> {
        match self.look(Path::new(path)) {
            Ok(directory) => Ok(Some(Place(directory))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the directory at a path in the image. Creates it, or the target of a link, if it is missing.
    pub(super) fn place(&self, path: &str) -> Result<Place, Errno> {
        let mut links = 0;
        Ok(Place(self.make(Path::new(path), &mut links)?))
    }

    fn look(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.0, path, flags(), Mode::empty(), inside)
    }

    fn make(&self, path: &Path, links: &mut usize) -> Result<OwnedFd, Errno> {
        match self.look(path) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("/"));
        let parent = self.make(above, links)?;
        let Some(name) = path.file_name() else { return self.look(path) };
        match readlinkat(&parent, name, Vec::new()) {
            Ok(target) => {
                *links += 1;
                if *links > LINKS_MAX {
                    return Err(Errno::LOOP);
                }
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                self.make(&above.join(target), links)
            }
            Err(_) => {
                match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
                self.look(path)
            }
        }
    }
}

fn flags() -> OFlags {
    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn placed(links: &[(&str, &str)], path: &str) -> Result<PathBuf, Errno> {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().canonicalize().unwrap();
        for (link, target) in links {
            std::fs::create_dir_all(top.join(link).parent().unwrap()).unwrap();
            symlink(target, top.join(link)).unwrap();
        }
        let place = Root::open(top.to_str().unwrap()).unwrap().place(path)?;
        let real = std::fs::read_link(place.path()).unwrap();
        assert!(real.is_dir(), "{real:?}");
        Ok(real.strip_prefix(&top).expect("nothing is found or made outside").to_owned())
    }

    #[test]
    fn links_are_followed_in_the_root_of_the_image() {
        for (links, path, is) in [
            (&[][..], "run", "run"),
            (&[("run", "var/run")], "run", "var/run"),
            (&[("run", "/var/run")], "run", "var/run"),
            (&[("run", "../../../var/run")], "run", "var/run"),
            (&[("run", "/var/run"), ("var/run", "../deep/er")], "run", "deep/er"),
            (&[("run", "/a"), ("a", "/b/c"), ("b", "/d")], "run", "d/c"),
            (&[("dev", "/proc/self/root/dev")], "dev", "proc/self/root/dev"),
        ] {
            assert_eq!(placed(links, path), Ok(PathBuf::from(is)), "{links:?}");
        }
        for links in [&[("run", "run")][..], &[("run", "/var/run"), ("var/run", "/run")]] {
            assert_eq!(placed(links, "run"), Err(Errno::LOOP), "{links:?}");
        }
    }

    #[test]
    fn a_file_is_no_place() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("run"), "").unwrap();
        symlink("run", root.path().join("tmp")).unwrap();
        let image = Root::open(root.path().to_str().unwrap()).unwrap();
        for path in ["run", "tmp", "run/x"] {
            assert_eq!(image.place(path).err(), Some(Errno::NOTDIR), "{path}");
        }
        assert!(image.find("dev").unwrap().is_none());
    }
}
