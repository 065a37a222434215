//! Finds the target of a copy, by the rules of `cp` and `docker cp`.
//!
//! | target | copying a file | copying a directory | copying `DIRECTORY/.` |
//! |---|---|---|---|
//! | a directory | into it, under its own name | into it, under its own name | its contents, into it |
//! | a file | replaces it | refused | refused |
//! | nothing | under this name, unless it ends with a slash | under this name | under this name |
//!
//! If nothing is there, the parent directory must exist. Links on the way and at the end are followed.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nexus_schema::stream::TreeArrival;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{TreeError, shown};
use crate::unpacking::Top;

/// The maximum number of links in a row.
const LINKS_MAX: usize = 40;

/// The target of a copy.
#[derive(Debug)]
pub struct Target {
    /// The directory to unpack in.
    pub directory: OwnedFd,
    /// The name there.
    pub under: Under,
}

/// The name of a copy in its target directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Under {
    /// Its own name.
    Own,
    /// This name.
    Name(Vec<u8>),
    /// No name: its contents go into the directory.
    Contents,
}

impl Under {
    /// Converts it for an archive with a single name at its top; `own` is the name of what is copied.
    pub fn top(self, own: &[u8]) -> Top {
        match self {
            Self::Own => Top::Named(own.to_vec()),
            Self::Name(name) => Top::Named(name),
            Self::Contents => Top::Stripped,
        }
    }
}

/// Finds the target of a copy to `path`. Creates nothing.
pub fn target(path: &Path, what: TreeArrival) -> Result<Target, TreeError> {
    let bytes = path.as_os_str().as_bytes();
    let refuse = |why| Err(TreeError::Place { path: shown(bytes), why });
    let is_directory = what != TreeArrival::File;
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {
            let under = if what == TreeArrival::Contents { Under::Contents } else { Under::Own };
            Ok(Target { directory: open(path)?, under })
        }
        Ok(_) if is_directory => refuse("a directory cannot be copied over a file"),
        Ok(meta) if !meta.is_file() => refuse("it is a device, a pipe or a socket"),
        Ok(_) => {
            let real = fs::canonicalize(path);
            beside(&real.map_err(|error| TreeError::file("look at", bytes, error))?, bytes)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if !is_directory && (bytes.ends_with(b"/") || bytes.ends_with(b"/.")) {
                return Err(TreeError::file("find the directory", bytes, error));
            }
            beside(&end_of_links(path)?, bytes)
        }
        Err(error) => Err(TreeError::file("look at", bytes, error)),
    }
}

/// Returns a name in its parent directory as target.
fn beside(path: &Path, shown: &[u8]) -> Result<Target, TreeError> {
    let name = path.file_name().ok_or_else(|| TreeError::file("find", shown, Errno::NOENT))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(Target { directory: open(parent)?, under: Under::Name(name.as_bytes().to_vec()) })
}

fn open(directory: &Path) -> Result<OwnedFd, TreeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty());
    opened.map_err(|error| TreeError::file("open the directory", directory.as_os_str().as_bytes(), error))
}

/// Returns the path to create: the target of a dangling link, or else the path itself.
fn end_of_links(path: &Path) -> Result<PathBuf, TreeError> {
    // Removes a trailing slash.
    let mut place: PathBuf = path.components().collect();
    for _ in 0..LINKS_MAX {
        let Ok(target) = fs::read_link(&place) else { return Ok(place) };
        place = place.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(TreeError::file("look at", path.as_os_str().as_bytes(), Errno::LOOP))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nexus_schema::ErrorCode;

    use super::*;

    #[test]
    fn a_copy_goes_where_docker_cp_puts_it() {
        use TreeArrival::{Contents, Directory, File};
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("dir/file"), "").unwrap();
        for (link, to) in [
            ("to-dir", "dir"),
            ("to-file", "dir/file"),
            ("to-new", "dir/new"),
            ("to-nowhere", "no/new"),
            ("loop", "loop"),
        ] {
            symlink(to, at(link)).unwrap();
        }
        let name = |name: &str| Ok(Under::Name(name.into()));
        let (missing, refused) = (Err(ErrorCode::FileNotFound), Err(ErrorCode::FileRefused));
        for (path, what, expected, directory) in [
            ("dir", File, Ok(Under::Own), "dir"),
            ("dir/", File, Ok(Under::Own), "dir"),
            ("dir/.", Directory, Ok(Under::Own), "dir"),
            ("to-dir", Directory, Ok(Under::Own), "dir"),
            ("dir", Contents, Ok(Under::Contents), "dir"),
            ("to-dir/", Contents, Ok(Under::Contents), "dir"),
            ("dir/file", File, name("file"), "dir"),
            ("to-file", File, name("file"), "dir"),
            ("to-new", File, name("new"), "dir"),
            ("to-new", Directory, name("new"), "dir"),
            ("to-nowhere", File, missing.clone(), ""),
            ("loop", File, refused.clone(), ""),
            ("dir/file", Directory, refused.clone(), ""),
            ("to-file", Contents, refused.clone(), ""),
            ("dir/file/", File, missing.clone(), ""),
            ("new", File, name("new"), ""),
            ("new/", File, missing.clone(), ""),
            ("new/.", File, missing.clone(), ""),
            ("new", Directory, name("new"), ""),
            ("new/", Directory, name("new"), ""),
            ("new/.", Contents, name("new"), ""),
            ("no/new", File, missing.clone(), ""),
            ("no/new", Directory, missing.clone(), ""),
            ("dir/new/", Contents, name("new"), "dir"),
        ] {
            let found = target(&at(path), what);
            if let Ok(Target { directory: found, .. }) = &found {
                let (found, wanted) =
                    (rustix::fs::fstat(found).unwrap(), rustix::fs::stat(at(directory)).unwrap());
                assert_eq!(found.st_ino, wanted.st_ino, "{path} {what:?}");
            }
            let found = found.map(|found| found.under).map_err(|error| error.code());
            assert_eq!(found, expected, "{path} {what:?}");
        }
        let pipe = at("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert_eq!(target(&pipe, File).unwrap_err().code(), ErrorCode::FileRefused);
    }
}
