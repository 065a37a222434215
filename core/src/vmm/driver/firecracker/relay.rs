//! Forwards the guest's connections to the host's ports out of a jail.
//!
//! Firecracker connects to `<uds>_PORT` inside its jail. The daemon listens in the VM's directory, and makes its socket again after each
//! restart. So this relay connects to the daemon from outside the jail for each connection: for hello and bye, and for connections to
//! other machines.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

/// Maximum number of connections at once to the hello port. A guest that says hello needs one; the first of the next boot may overlap with
/// the bye of the last boot.
pub(super) const HELLO_CONNECTIONS_MAX: usize = 8;
const STACK: usize = 64 << 10;

/// Serves in a thread for as long as this process runs. Closes new connections while `most` connections are open.
pub(super) fn start(listener: UnixListener, target: PathBuf, most: usize) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("relay".to_owned()).stack_size(STACK);
    let open = Arc::new(AtomicUsize::new(0));
    thread.spawn(move || {
        for stream in listener.incoming() {
            let Ok(inside) = stream else { continue };
            if open.load(Ordering::Relaxed) >= most {
                continue;
            }
            // No daemon is listening: the guest sees the connection end and retries.
            let Ok(outside) = UnixStream::connect(&target) else { continue };
            let held = Held::new(&open);
            if let Err(error) = carry_both(inside, outside, held) {
                tracing::warn!(%error, "cannot forward a connection of the guest to the host");
            }
        }
    })?;
    Ok(())
}

/// Counts one connection as open until it is dropped.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(open: &Arc<AtomicUsize>) -> Arc<Self> {
        open.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self(Arc::clone(open)))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn carry_both(inside: UnixStream, outside: UnixStream, held: Arc<Held>) -> io::Result<()> {
    let (inside_too, outside_too) = (inside.try_clone()?, outside.try_clone()?);
    let held_too = Arc::clone(&held);
    let spawn = |from, to, pass: Pass, held: Arc<Held>| {
        std::thread::Builder::new().name("relay".to_owned()).stack_size(STACK).spawn(move || {
            carry(from, to, pass);
            drop(held);
        })
    };
    spawn(inside, outside, to_host, held)?;
    spawn(outside_too, inside_too, to_guest, held_too)?;
    Ok(())
}

/// Writes all of what was read of the first connection to the second one.
type Pass = fn(&UnixStream, &UnixStream, &[u8]) -> io::Result<()>;

/// Copies one direction. Closes both connections when one side ends; half-close is not needed here.
fn carry(mut from: UnixStream, to: UnixStream, pass: Pass) {
    let mut chunk = [0; 8192];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        if pass(&from, &to, &chunk[..read]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        // The other direction may have closed it already.
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Writes to the host. Fails if the guest disconnects while there is no room: a host that reads nothing for long must notice that.
fn to_host(guest: &UnixStream, host: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(host, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut ends = [PollFd::new(host, PollFlags::OUT), PollFd::new(guest, PollFlags::empty())];
                rustix::io::retry_on_intr(|| rustix::event::poll(&mut ends, None))?;
                if ends[1].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes to the guest, also if the host disconnects meanwhile: it may have sent all there is.
fn to_guest(_: &UnixStream, mut guest: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    guest.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{Timespec, poll};

    use super::*;

    /// Writes until nothing more fits; returns how many bytes were written.
    fn fill(stream: &mut UnixStream) -> usize {
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut sent = 0;
        while let Ok(written) = stream.write(&[7; 8192]) {
            sent += written;
        }
        sent
    }

    /// A guest and a host that are connected by a relay.
    fn connected() -> (tempfile::TempDir, UnixStream, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let (inside, outside) = (directory.path().join("in"), directory.path().join("out"));
        start(UnixListener::bind(&inside).unwrap(), outside.clone(), 1).unwrap();
        let listener = UnixListener::bind(&outside).unwrap();
        let guest = UnixStream::connect(&inside).unwrap();
        let (host, _) = listener.accept().unwrap();
        (directory, guest, host)
    }

    #[test]
    fn carries_both_ways_and_dials_anew_for_each_connection() {
        let directory = tempfile::tempdir().unwrap();
        let (inside, outside) = (directory.path().join("in"), directory.path().join("out"));
        start(UnixListener::bind(&inside).unwrap(), outside.clone(), HELLO_CONNECTIONS_MAX).unwrap();
        let mut nobody = UnixStream::connect(&inside).unwrap();
        assert_eq!(nobody.read(&mut [0; 1]).unwrap(), 0);
        for _ in 0..20 {
            let listener = UnixListener::bind(&outside).unwrap();
            let mut guest = UnixStream::connect(&inside).unwrap();
            let (mut host, _) = listener.accept().unwrap();
            let mut got = [0; 5];
            guest.write_all(b"hello").unwrap();
            host.read_exact(&mut got).unwrap();
            host.write_all(b"world").unwrap();
            guest.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"world");
            drop(host);
            assert_eq!(guest.read(&mut got).unwrap(), 0);
            std::fs::remove_file(&outside).unwrap();
        }
    }

    #[test]
    fn a_guest_that_disconnects_is_noticed_while_the_host_reads_nothing() {
        let (_directory, mut guest, mut host) = connected();
        fill(&mut guest);
        let is_over = |seconds| {
            let within = Timespec { tv_sec: seconds, tv_nsec: 0 };
            poll(&mut [PollFd::new(&host, PollFlags::RDHUP)], Some(&within)).unwrap() > 0
        };
        assert!(!is_over(0));
        drop(guest);
        assert!(is_over(20));
        // What it has is there to be read.
        let mut chunk = [0; 8192];
        assert!(host.read(&mut chunk).unwrap() > 0 && chunk[0] == 7);
    }

    #[test]
    fn what_the_host_sent_before_it_left_goes_to_a_guest_that_reads_late() {
        let (_directory, mut guest, mut host) = connected();
        let sent = fill(&mut host);
        drop(host);
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), sent);
    }
}
