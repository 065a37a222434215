//! Frames whose payload is not copied to this process: the kernel moves it through a pipe from the socket in which it waits.

use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, Chain, ReadBuf};

use super::{CopyError, FrameError, HEADER, Kind};
use crate::duplex::Writer;
use crate::pipe::{self, Pipe};

/// The size of a page of memory on most machines, in bytes.
const PAGE: usize = 4 << 10;

/// A frame of data of a file, in a pipe: [`super::Sender::moved`] sends it.
#[derive(Debug)]
pub struct Moved {
    pub(super) pipe: Pipe,
    /// The length of its payload.
    pub(super) length: usize,
}

impl Moved {
    /// Makes a frame of up to `most` bytes of a file from an offset, which blocks until they were read from its disk. `None` if there is no pipe; an error
    /// if the file has fewer bytes, or cannot be moved.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, most: usize) -> io::Result<Option<Self>> {
        let Some(mut pipe) = Pipe::take() else { return Ok(None) };
        // Next to the header there is room for so many pages; the first may be a part of one.
        let room = pipe::SIZE - PAGE - (offset % PAGE as u64) as usize;
        let length = most.min(room);
        pipe.put(&Kind::Data.header(length))?;
        while pipe.filled() < HEADER + length {
            let there = pipe.filled() - HEADER;
            if pipe.fill(file, Some(offset + there as u64), length - there)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Some(Self { pipe, length }))
    }

    /// Returns how many bytes of the file it has.
    pub fn length(&self) -> usize {
        self.length
    }
}

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

    use super::super::{FULL, Incoming, copy, copy_spliced, copy_uncredited, copy_uncredited_spliced, over};
    use super::*;
    use crate::duplex::split;

    /// A connection that is not read where much waits in it.
    struct Moving {
        read: OwnedReadHalf,
        /// How often much did.
        times: usize,
    }

    impl AsyncRead for Moving {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.read).poll_read(cx, buf)
        }
    }

    impl Source for Moving {
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
        let mut read = Moving { read, times: 0 };
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
    async fn frames_of_files_have_all_that_they_promise() {
        let content: Vec<u8> = (0..600_000_u32).map(|n| (n * 31 / 7) as u8).collect();
        let file = rustix::fs::memfd_create("content", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(file);
        std::io::Write::write_all(&mut file, &content).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let (reader, writer) = split(near.into_std().unwrap().into()).unwrap();
        let (_receiver, sender) = over(reader, writer, BytesMut::new());
        let own = file.try_clone().unwrap();
        let sending = tokio::spawn(async move {
            let mut at = 100;
            while at < 600_000 {
                let made = Moved::of_file(own.as_fd(), at as u64, 600_000 - at).unwrap();
                // Kernels that are faster without have none.
                let Some(moved) = made else { return false };
                at += moved.length();
                sender.moved(moved).await.unwrap();
            }
            sender.end().await.unwrap();
            true
        });
        let (reader, writer) = split(far.into_std().unwrap().into()).unwrap();
        let (mut receiver, own_sender) = over(reader, writer, BytesMut::new());
        let mut received = Vec::new();
        while let Ok(Some(Incoming::Data(bytes))) = receiver.next().await {
            received.extend_from_slice(&bytes);
            own_sender.took(bytes.len()).await.unwrap();
        }
        if sending.await.unwrap() {
            assert!(received == content[100..]);
            // It became shorter.
            Moved::of_file(file.as_fd(), 590_000, 20_000).unwrap_err();
        }
    }

    #[tokio::test]
    async fn what_was_sent_before_goes_first() {
        let (mut program, plain) = UnixStream::pair().unwrap();
        program.write_all(&[7; FULL]).await.unwrap();
        let (read, _write) = plain.into_split();
        let mut chain = tokio::io::AsyncReadExt::chain(&b"x"[..], Moving { read, times: 0 });
        assert!(chain.much().is_none());
        let mut first = [0; 1];
        tokio::io::AsyncReadExt::read_exact(&mut chain, &mut first).await.unwrap();
        assert_eq!(chain.much().map(|(there, _)| there), Some(FULL));
    }
}
