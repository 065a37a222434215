//! Frames whose payload is not copied to this process: the kernel moves it through a pipe from the socket in which it waits.

use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, Chain, ReadBuf};

use super::{CopyError, FrameError, Kind};
use crate::duplex::Writer;
use crate::pipe::Pipe;

/// A plain connection whose bytes go into frames.
pub trait Source: AsyncRead + Unpin {
    /// Returns how many bytes wait in a socket, and the socket, if they are so many that they need not be read: at least [`super::FULL`].
    fn much(&mut self) -> Option<(usize, BorrowedFd<'_>)> {
        None
    }
}

/// A plain connection that is always read.
#[derive(Debug)]
pub struct Copied<R>(pub R);

impl<R: AsyncRead + Unpin> AsyncRead for Copied<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<R: AsyncRead + Unpin> Source for Copied<R> {}

impl<S: Source> Source for Chain<&[u8], S> {
    fn much(&mut self) -> Option<(usize, BorrowedFd<'_>)> {
        let (first, second) = self.get_mut();
        if first.is_empty() { second.much() } else { None }
    }
}

/// Sends a frame of `length` bytes that wait in a socket, through an empty pipe.
pub(super) async fn frame(
    writer: &mut Writer,
    pipe: &mut Pipe,
    socket: BorrowedFd<'_>,
    length: usize,
) -> Result<(), CopyError> {
    pipe.put(&Kind::Data.header(length)).map_err(FrameError::from)?;
    let mut left = length;
    while left > 0 {
        match pipe.fill(socket, None, left) {
            Ok(0) => return Err(CopyError::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(moved) => left -= moved,
            // It is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && pipe.filled() > 0 => {}
            Err(error) => return Err(CopyError::Read(error)),
        }
        writer.drain(pipe).await.map_err(FrameError::from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use bytes::BytesMut;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;
    use tokio::net::unix::OwnedReadHalf;

    use super::super::{FULL, copy, copy_spliced, copy_uncredited, copy_uncredited_spliced, over};
    use super::*;
    use crate::duplex::split;

    /// A connection that is not read where much waits in it.
    struct Moved {
        read: OwnedReadHalf,
        /// How often much did.
        times: usize,
    }

    impl AsyncRead for Moved {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.read).poll_read(cx, buf)
        }
    }

    impl Source for Moved {
        fn much(&mut self) -> Option<(usize, BorrowedFd<'_>)> {
            let socket: &UnixStream = self.read.as_ref();
            let there = rustix::io::ioctl_fionread(socket).unwrap() as usize;
            if there < FULL {
                return None;
            }
            self.times += 1;
            Some((there, socket.as_fd()))
        }
    }

    /// Copies what a program sends to the peer; returns how often much was there.
    async fn moving(plain: UnixStream, peer: UnixStream, has_credit: bool) -> usize {
        let (mut reader, mut writer) = split(peer.into_std().unwrap().into()).unwrap();
        let (read, mut write) = plain.into_split();
        let mut read = Moved { read, times: 0 };
        if has_credit {
            let (mut receiver, sender) = over(reader, writer, BytesMut::new());
            copy_spliced(&mut receiver, &sender, &mut read, &mut write).await.unwrap();
        } else {
            let halves = (&mut reader, &mut writer);
            copy_uncredited_spliced(halves, &[], &mut read, &mut write, None).await.unwrap();
        }
        read.times
    }

    #[tokio::test]
    async fn what_is_moved_and_what_is_read_comes_in_order() {
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        for has_credit in [true, false] {
            let ((mut program, plain), (near, far)) =
                (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
            let content = sent.clone();
            let writing = tokio::spawn(async move {
                program.write_all(&content).await.unwrap();
                program.write_all(b"the last bytes").await.unwrap();
                program.shutdown().await.unwrap();
                program
            });
            let moving = tokio::spawn(moving(plain, near, has_credit));
            let (mut reader, mut writer) = split(far.into_std().unwrap().into()).unwrap();
            let (mut nothing, mut received) = (tokio::io::empty(), Vec::new());
            if has_credit {
                let (mut receiver, sender) = over(reader, writer, BytesMut::new());
                copy(&mut receiver, &sender, &mut nothing, &mut received).await.unwrap();
            } else {
                let halves = (&mut reader, &mut writer);
                copy_uncredited(halves, &[], &mut nothing, &mut received, None).await.unwrap();
            }
            assert!(received.strip_suffix(b"the last bytes") == Some(&sent[..]));
            assert!(moving.await.unwrap() > 0);
            drop(writing.await.unwrap());
        }
    }

    #[tokio::test]
    async fn what_was_sent_before_goes_first() {
        let (mut program, plain) = UnixStream::pair().unwrap();
        program.write_all(&[7; FULL]).await.unwrap();
        let (read, _write) = plain.into_split();
        let mut chain = tokio::io::AsyncReadExt::chain(&b"x"[..], Moved { read, times: 0 });
        assert!(chain.much().is_none());
        let mut first = [0; 1];
        tokio::io::AsyncReadExt::read_exact(&mut chain, &mut first).await.unwrap();
        assert_eq!(chain.much().map(|(there, _)| there), Some(FULL));
    }
}
