//! Pipes through which the kernel moves bytes from a file to a socket, without copying them to this process. They are reused, because each takes two
//! descriptors and three calls of the kernel to make.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// How much a pipe holds, in bytes, if it has whole pages.
pub(crate) const SIZE: usize = 256 << 10;
/// How many unused pipes are kept.
const UNUSED_MAX: usize = 8;
/// How many pipes there are at most, with the unused ones.
const OPEN_MAX: usize = 32;
/// The first version of Linux that passes all pages of a pipe to a socket at once. Earlier ones send each page separately, which is slower than a copy.
const SINCE: (u32, u32) = (6, 5);

/// The end to read from, and the end to write to.
type Ends = (OwnedFd, OwnedFd);

static UNUSED: Mutex<Vec<Ends>> = Mutex::new(Vec::new());
static OPEN: AtomicUsize = AtomicUsize::new(0);
static IS_QUICK: LazyLock<bool> =
    LazyLock::new(|| version(rustix::system::uname().release().to_bytes()).is_some_and(|is| is >= SINCE));

fn unused() -> MutexGuard<'static, Vec<Ends>> {
    UNUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the first two numbers of a kernel's release.
fn version(release: &[u8]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(release).ok()?;
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn open() -> io::Result<Ends> {
    let ends = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    fcntl_setpipe_size(&ends.1, SIZE)?;
    Ok(ends)
}

/// A pipe. Dropping it allows its reuse if it is empty.
#[derive(Debug)]
pub(crate) struct Pipe {
    ends: Option<Ends>,
    /// How many bytes are in it.
    filled: usize,
}

impl Pipe {
    /// Returns an empty pipe; `None` if there are too many, or if this kernel is faster without.
    pub(crate) fn take() -> Option<Self> {
        if let Some(ends) = unused().pop() {
            return Some(Self { ends: Some(ends), filled: 0 });
        }
        if !*IS_QUICK {
            return None;
        }
        if OPEN.fetch_add(1, Ordering::Relaxed) < OPEN_MAX
            && let Ok(ends) = open()
        {
            return Some(Self { ends: Some(ends), filled: 0 });
        }
        OPEN.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Returns how many bytes are in it.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    fn ends(&self) -> Result<&Ends, Errno> {
        self.ends.as_ref().ok_or(Errno::BADF)
    }

    /// Copies a few bytes into it; fails if there is no room for all of them.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = retry_on_intr(|| rustix::io::write(&self.ends()?.1, bytes))?;
        self.filled += written;
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Moves up to `length` bytes into it from an offset of a file; returns how many: 0 at the end of the file. Fails with
    /// [`io::ErrorKind::WouldBlock`] if the pipe is full.
    pub(crate) fn fill(&mut self, file: impl AsFd, mut offset: u64, length: usize) -> io::Result<usize> {
        let moved = retry_on_intr(|| {
            splice(&file, Some(&mut offset), &self.ends()?.1, None, length, SpliceFlags::NONBLOCK)
        })?;
        self.filled += moved;
        Ok(moved)
    }

    /// Moves what is in it to a socket that does not block, as much as there is room for; returns how many bytes. Tell [`Self::took`].
    pub(crate) fn drain_into(&self, to: impl AsFd) -> io::Result<usize> {
        let moved =
            retry_on_intr(|| splice(&self.ends()?.0, None, &to, None, self.filled, SpliceFlags::NONBLOCK));
        Ok(moved?)
    }

    /// So many bytes were moved out of it.
    pub(crate) fn took(&mut self, bytes: usize) {
        self.filled = self.filled.saturating_sub(bytes);
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else { return };
        let mut unused = unused();
        if self.filled == 0 && unused.len() < UNUSED_MAX {
            unused.push(ends);
        } else {
            OPEN.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(version(b"6.12.48+deb13-amd64"), Some((6, 12)));
        assert_eq!(version(b"5.10.0"), Some((5, 10)));
        assert_eq!(version(b"10.0-rc1"), Some((10, 0)));
        assert_eq!(version(b"six"), None);
        assert!(version(b"6.12") > Some(SINCE) && version(b"6.1.0") < Some(SINCE));
    }

    #[test]
    fn bytes_of_files_pass_in_order() {
        // Kernels that are faster without have none.
        let Some(mut pipe) = Pipe::take() else { return };
        let content: Vec<u8> = (0..100_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        let mut file = File::from(memfd_create("content", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&content).unwrap();
        let (to, mut seen) = UnixStream::pair().unwrap();
        to.set_nonblocking(true).unwrap();

        pipe.put(b"head").unwrap();
        assert_eq!(pipe.fill(&file, 50_000, 40_000).unwrap(), 40_000);
        assert_eq!(pipe.fill(&file, 10, 4).unwrap(), 4);
        assert_eq!(pipe.filled(), 40_008);
        let mut received = Vec::new();
        while pipe.filled() > 0 {
            let moved = pipe.drain_into(&to).unwrap();
            pipe.took(moved);
            let start = received.len();
            received.resize(start + moved, 0);
            seen.read_exact(&mut received[start..]).unwrap();
        }
        assert!(received == [b"head", &content[50_000..90_000], &content[10..14]].concat());
        assert_eq!(pipe.fill(&file, 100_000, 10).unwrap(), 0, "nothing is behind the end of a file");
        pipe.put(b"left").unwrap();
        drop(pipe);
        assert!(unused().len() <= UNUSED_MAX);
    }
}
