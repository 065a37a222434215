//! Files in a directory that another user may change. A VM's directory belongs to its shim, which a guest may have taken over.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, lchown};
use std::path::Path;

/// Opens a regular file for reading; links are not followed, devices and pipes are not opened.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    open_with(path, OpenOptions::new().read(true))
}

/// The same with the caller's options.
pub(crate) fn open_with(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "not an ordinary file"))
    }
}

/// Takes ownership of a directory again, and removes everything in it but regular files and sockets. Nobody may be using it.
pub(crate) fn take_back(directory: &Path) -> io::Result<()> {
    let own = rustix::process::geteuid();
    if std::fs::symlink_metadata(directory)?.uid() == own.as_raw() {
        return Ok(());
    }
    lchown(directory, Some(own.as_raw()), Some(rustix::process::getegid().as_raw()))?;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let found = std::fs::symlink_metadata(&path)?;
        if found.is_dir() {
            std::fs::remove_dir_all(&path)?;
        } else if !found.file_type().is_socket() && (!found.is_file() || found.nlink() != 1) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_pipes_of_others_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("secret"), "root's").unwrap();
        std::os::unix::fs::symlink(path("secret"), path("exit.json")).unwrap();
        assert!(open(&path("exit.json")).is_err());
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(open(&path("pipe")).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(open(&path("secret")).is_ok());
    }

    #[test]
    fn a_directory_that_was_given_away_is_cleaned() {
        assert!(rustix::process::geteuid().is_root(), "this test has to run as root");
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("console.log"), "kept").unwrap();
        std::fs::write(path("linked"), "").unwrap();
        std::fs::hard_link(path("linked"), path("linked too")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", path("shim.log")).unwrap();
        std::fs::create_dir(path("plan.json.new")).unwrap();
        take_back(directory.path()).unwrap();
        assert!(path("plan.json.new").exists(), "it was this user's already");
        lchown(directory.path(), Some(54_321), Some(54_321)).unwrap();
        take_back(directory.path()).unwrap();
        let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        // Of two hard links, one is removed first, so the other is then an ordinary file.
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names.contains(&"console.log".into()), "{names:?}");
        assert_eq!(std::fs::metadata(directory.path()).unwrap().uid(), 0);
    }
}
