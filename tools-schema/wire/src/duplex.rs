//! The two halves of a stream socket in tokio, woken only for events that they wait for.
//!
//! tokio's own sockets always watch for room to write, and the kernel reports that each time the peer has read something. That costs each side one
//! extra wakeup per short answer. Here the writing half watches only while the socket is full.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::pipe::Pipe;

/// Splits a connected socket, in a tokio runtime. Dropping the [`Writer`] shuts its direction down, as in tokio.
pub fn split(socket: OwnedFd) -> io::Result<(Reader, Writer)> {
    let socket = Arc::new(socket);
    let reader = watch(Arc::clone(&socket), Interest::READABLE)?;
    Ok((
        Reader { socket: reader, is_unsure: false },
        Writer { socket: Peer(socket), room: None, is_shared: false, is_for_pipes: false },
    ))
}

/// Puts the halves of a socket together again, without shutting it down. What was not read stays in it.
pub fn join((reader, mut writer): (Reader, Writer)) -> io::Result<OwnedFd> {
    writer.is_shared = true;
    drop(writer);
    Arc::into_inner(reader.socket.into_inner()).ok_or_else(|| io::ErrorKind::Other.into())
}

fn watch(socket: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the descriptor stays open, and refers to the same socket, as long as any owner of it lives.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}

/// Waits until a socket is connected whose `connect` was started without blocking, in a tokio runtime.
pub async fn connected(socket: OwnedFd) -> io::Result<OwnedFd> {
    let socket = Arc::new(socket);
    let watched = watch(Arc::clone(&socket), Interest::WRITABLE)?;
    drop(watched.writable().await?);
    drop(watched);
    rustix::net::sockopt::socket_error(&*socket)??;
    Arc::into_inner(socket).ok_or_else(|| io::ErrorKind::Other.into())
}

/// Returns whether the other end of a pipe or socket is closed, so that nothing written to it will be read.
pub fn is_unread(end: impl AsFd) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(end.as_fd(), PollFlags::empty())];
    match rustix::event::poll(&mut poll, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => poll[0].revents().intersects(PollFlags::HUP | PollFlags::ERR),
        Err(_) => true,
    }
}

/// The reading half.
#[derive(Debug)]
pub struct Reader {
    socket: AsyncFd<Arc<OwnedFd>>,
    /// Whether there may be bytes that the kernel has reported already.
    is_unsure: bool,
}

impl Reader {
    /// Reads from a socket that other processes may share: its flags are not changed.
    pub fn of_shared(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: watch(Arc::new(socket), Interest::READABLE)?, is_unsure: false })
    }

    /// Waits until the peer has ended its direction, or is gone. What arrives before stays in the socket. Cancel-safe.
    pub async fn closed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            if ready.ready().is_read_closed() {
                return Ok(());
            }
            self.is_unsure = true;
            ready.clear_ready();
        }
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Reads what is there into a buffer; returns how many bytes that were.
fn receive(socket: impl AsFd, buf: &mut ReadBuf<'_>) -> io::Result<usize> {
    // SAFETY: only `recv` writes there, and it only initialises memory.
    let room = unsafe { buf.unfilled_mut() };
    let ((received, _), _) = rustix::net::recv(socket, room, RecvFlags::DONTWAIT)?;
    let length = received.len();
    // SAFETY: `recv` has initialised this many bytes.
    unsafe { buf.assume_init(length) };
    buf.advance(length);
    Ok(length)
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let room = buf.remaining();
        if std::mem::take(&mut this.is_unsure) {
            match receive(&this.socket, buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => {
                    this.is_unsure = matches!(received, Ok(length) if length == room);
                    return Poll::Ready(received.map(drop));
                }
            }
        }
        loop {
            let mut ready = ready!(this.socket.poll_read_ready(cx))?;
            let Ok(received) = ready.try_io(|socket| receive(socket, buf)) else { continue };
            let length = received?;
            if length > 0 && length < room {
                // Everything was read; the kernel reports what arrives later.
                ready.clear_ready();
            }
            return Poll::Ready(Ok(()));
        }
    }
}

/// The socket, for writes that do not wait. Cheap to clone; it keeps the socket open.
#[derive(Debug, Clone)]
pub struct Peer(Arc<OwnedFd>);

impl Peer {
    /// Writes as much as there is room for; if there is none, fails with [`io::ErrorKind::WouldBlock`].
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::io::retry_on_intr(|| rustix::net::send(&self.0, bytes, flags))?)
    }

    /// Writes several pieces in a row, as much as there is room for.
    fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let send = || rustix::net::sendmsg(&self.0, pieces, &mut SendAncillaryBuffer::default(), flags);
        Ok(rustix::io::retry_on_intr(send)?)
    }
}

/// The writing half.
#[derive(Debug)]
pub struct Writer {
    socket: Peer,
    /// Waits for room, since the socket was last full. This is a duplicate descriptor, because tokio already watches the other one.
    room: Option<AsyncFd<Arc<OwnedFd>>>,
    is_shared: bool,
    /// Whether the socket itself was told not to block: what comes out of a pipe has no flags of its own.
    is_for_pipes: bool,
}

impl Writer {
    /// Writes to a socket that other processes may share: its flags are not changed, and dropping this does not shut it down.
    pub fn of_shared(socket: OwnedFd) -> Self {
        Self { socket: Peer(Arc::new(socket)), room: None, is_shared: true, is_for_pipes: false }
    }

    /// Returns the same socket, for writes that do not wait.
    pub fn peer(&self) -> Peer {
        self.socket.clone()
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.0.as_fd()
    }
}

impl Writer {
    /// Moves everything from a pipe to the socket, which no other process may share. Bytes are lost if the future is dropped before.
    pub(crate) async fn drain(&mut self, pipe: &mut Pipe) -> io::Result<()> {
        if !self.is_for_pipes {
            rustix::io::ioctl_fionbio(&self.socket.0, true)?;
            self.is_for_pipes = true;
        }
        while pipe.filled() > 0 {
            let from = &*pipe;
            let moved =
                poll_fn(|cx| self.poll_with(cx, from.filled(), |peer| from.drain_into(&*peer.0))).await?;
            if moved == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            pipe.took(moved);
        }
        Ok(())
    }

    /// Calls `write` for `length` bytes, and waits while there is no room.
    fn poll_with(
        &mut self,
        cx: &mut Context<'_>,
        length: usize,
        write: impl Fn(&Peer) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match write(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    // After a part of them it is full again, and soon waited for again.
                    if !matches!(&result, Ok(written) if *written < length) {
                        self.room = None;
                    }
                    return Poll::Ready(result);
                }
            }
            let room = match &mut self.room {
                Some(room) => room,
                none => {
                    let socket = self.socket.0.try_clone()?;
                    none.insert(watch(Arc::new(socket), Interest::WRITABLE)?)
                }
            };
            ready!(room.poll_write_ready(cx))?.clear_ready();
        }
    }
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_with(cx, bytes.len(), |peer| peer.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        self.get_mut().poll_with(cx, length, |peer| peer.try_write_vectored(pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(&self.socket.0, Shutdown::Write) {
            Ok(()) | Err(Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.is_shared {
            return;
        }
        // It may be shut down already, or the peer may be gone.
        let _ = rustix::net::shutdown(&self.socket.0, Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn everything_comes_over_in_both_directions_whatever_the_size() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut near_read, mut near_write) = split(near.into()).unwrap();
        let (mut far_read, mut far_write) = split(far.into()).unwrap();
        let sent: Vec<u8> = (0..4_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            near_write.write_all(&sent).await.unwrap();
            near_write.shutdown().await.unwrap();
            near_write
        });
        let mut received = Vec::new();
        far_read.read_to_end(&mut received).await.unwrap();
        assert!(received == expected);
        far_write.write_all(b"thanks").await.unwrap();
        drop(far_write);
        let mut answer = String::new();
        near_read.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "thanks");
        drop(writing.await.unwrap());
    }

    #[tokio::test]
    async fn halves_are_put_together_without_an_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (mut reader, writer) = split(near.into()).unwrap();
        std::io::Write::write_all(&mut far, b"onetwo").unwrap();
        let mut three = [0; 3];
        reader.read_exact(&mut three).await.unwrap();
        assert_eq!(&three, b"one");
        let mut near = UnixStream::from(join((reader, writer)).unwrap());
        assert!(!is_unread(&far), "nothing was shut down");
        std::io::Read::read_exact(&mut near, &mut three).unwrap();
        assert_eq!(&three, b"two");
        std::io::Write::write_all(&mut near, b"six").unwrap();
        std::io::Read::read_exact(&mut far, &mut three).unwrap();
        assert_eq!(&three, b"six");
    }

    #[tokio::test]
    async fn an_end_is_noticed_before_what_came_before_it_is_read() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (mut reader, _writer) = split(near.into()).unwrap();
        std::io::Write::write_all(&mut far, b"before").unwrap();
        let soon = std::time::Duration::from_millis(20);
        tokio::time::timeout(soon, reader.closed()).await.unwrap_err();
        // What was reported meanwhile is read all the same, in parts too.
        let mut three = [0; 3];
        for part in [b"bef", b"ore"] {
            reader.read_exact(&mut three).await.unwrap();
            assert_eq!(&three, part);
        }
        tokio::time::timeout(soon, reader.read_u8()).await.unwrap_err();
        std::io::Write::write_all(&mut far, b"last").unwrap();
        drop(far);
        reader.closed().await.unwrap();
        let mut last = String::new();
        reader.read_to_string(&mut last).await.unwrap();
        assert_eq!(last, "last");
    }

    #[test]
    fn an_end_whose_other_end_is_closed_is_unread() {
        let (near, far) = UnixStream::pair().unwrap();
        far.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!is_unread(&near), "it may read on");
        drop(far);
        assert!(is_unread(&near));
        let (read, write) = std::io::pipe().unwrap();
        assert!(!is_unread(&write));
        drop(read);
        assert!(is_unread(&write));
    }

    #[tokio::test]
    async fn a_full_socket_is_waited_for_and_a_closed_one_is_an_error() {
        let (near, far) = UnixStream::pair().unwrap();
        let (_near_read, mut near_write) = split(near.into()).unwrap();
        let peer = near_write.peer();
        let mut filled = 0;
        let full = loop {
            match peer.try_write(&[7; 1000]) {
                Ok(length) => filled += length,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let writing = tokio::spawn(async move { near_write.write_all(b"last").await.map(|()| near_write) });
        tokio::task::yield_now().await;
        assert!(!writing.is_finished());
        let (mut far_read, far_write) = split(far.into()).unwrap();
        let mut all = vec![0; filled + 4];
        far_read.read_exact(&mut all).await.unwrap();
        assert_eq!(all[filled..], *b"last");

        let mut near_write = writing.await.unwrap().unwrap();
        assert!(near_write.room.is_none(), "all was written, so room is of no interest");
        // What is written in parts waits for room all the time.
        let large = vec![8; 32 * filled];
        let writing = tokio::spawn(async move {
            let first = near_write.write(&large).await.unwrap();
            let second = near_write.write(&large[first..]).await.unwrap();
            assert!(first + second < large.len() && near_write.room.is_some());
            near_write.write_all(&large[first + second..]).await.unwrap();
            near_write
        });
        let mut all = vec![0; 32 * filled];
        far_read.read_exact(&mut all).await.unwrap();
        assert!(all.iter().all(|byte| *byte == 8));
        let mut near_write = writing.await.unwrap();
        drop((far_read, far_write));
        assert_eq!(near_write.write_all(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(peer.try_write(b"more").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
