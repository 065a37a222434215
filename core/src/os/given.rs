//! Paths of the host from callers. Anything may be there, such as a pipe without a writer, or a mount whose server is down.
//!
//! Nothing here waits for the other end of a pipe or for a device, and a stuck filesystem does not block the runtime's threads.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fs_err::os::unix::fs::OpenOptionsExt as _;
use rustix::fs::OFlags;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Timeout for reading the kind of a path.
const LOOK: Duration = Duration::from_secs(10);
/// Maximum number of concurrent reads; stuck ones keep their threads.
const LOOKS_MAX: usize = 32;

/// The kind of file at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File {
        /// Its length, in bytes.
        bytes: u64,
    },
    /// A directory.
    Directory,
}

/// Opens a regular file for reading. Anything else is refused with [`io::ErrorKind::InvalidInput`]; opening does not wait for a
/// pipe and does not activate a device.
pub(crate) fn open_file(path: &Path) -> io::Result<fs_err::File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let file = fs_err::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(neither(path, "regular file")) }
}

/// Returns the kind of a path; [`io::ErrorKind::InvalidInput`] if it is neither a regular file nor a directory. Blocks.
pub(crate) fn kind(path: &Path) -> io::Result<Kind> {
    let meta = fs_err::metadata(path)?;
    match meta.file_type() {
        kind if kind.is_file() => Ok(Kind::File { bytes: meta.len() }),
        kind if kind.is_dir() => Ok(Kind::Directory),
        _ => Err(neither(path, "regular file or directory")),
    }
}

/// Reads the kinds of paths outside the runtime's threads. One per daemon; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Looks {
    free: Arc<Semaphore>,
    limit: Duration,
}

impl Default for Looks {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(LOOKS_MAX)), limit: LOOK }
    }
}

impl Looks {
    /// Returns the kind of a path, as [`kind`] does. [`io::ErrorKind::TimedOut`] means that its filesystem does not respond.
    pub(crate) async fn kind(&self, path: PathBuf) -> io::Result<Kind> {
        self.look(path, kind).await
    }

    /// Runs `look` on a separate thread, and gives up after a timeout.
    async fn look<T: Send + 'static>(
        &self,
        path: PathBuf,
        look: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let silent = || {
            let text = format!(
                "{} did not respond within {} s: check whether it is on a network mount whose server is down",
                path.display(),
                self.limit.as_secs()
            );
            io::Error::new(io::ErrorKind::TimedOut, text)
        };
        let looking = async {
            let permit = self.free.clone().acquire_owned().await.map_err(io::Error::other)?;
            let (of, (tell, told)) = (path.clone(), tokio::sync::oneshot::channel());
            // A separate thread, because the store and everything else need the runtime's threads.
            std::thread::Builder::new().name("look".to_owned()).spawn(move || {
                tell.send(look(&of)).ok();
                drop(permit);
            })?;
            told.await.map_err(io::Error::other)?
        };
        timeout(self.limit, looking).await.unwrap_or_else(|_| Err(silent()))
    }
}

fn neither(path: &Path, wanted: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a {wanted}", path.display()))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[tokio::test]
    async fn pipes_and_devices_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        let looks = Looks::default();
        for path in [&pipe, &link, &PathBuf::from("/dev/null"), &PathBuf::from("/dev/tty")] {
            assert!(open_file(path).is_err(), "{}", path.display());
            let refused = looks.kind(path.clone()).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
        }
        let file = directory.path().join("file");
        fs_err::write(&file, "12345").unwrap();
        assert_eq!(open_file(&file).unwrap().metadata().unwrap().len(), 5);
        assert_eq!(looks.kind(file).await.unwrap(), Kind::File { bytes: 5 });
        assert_eq!(looks.kind(directory.path().to_owned()).await.unwrap(), Kind::Directory);
        assert_eq!(open_file(directory.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let missing = looks.kind(directory.path().join("missing")).await.unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_filesystem_that_does_not_answer_is_given_up() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let looks = Looks { free: Arc::new(Semaphore::new(1)), limit: Duration::from_millis(100) };
        let stuck = looks.look("/mnt/gone".into(), move |_| {
            ended.recv().ok();
            Ok(())
        });
        let error = stuck.await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Its thread is still stuck: the next caller gets the same error, and everything else continues.
        assert_eq!(looks.kind("/".into()).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(end);
        let looks = Looks { limit: LOOK, ..looks };
        assert_eq!(looks.kind("/".into()).await.unwrap(), Kind::Directory);
    }
}
