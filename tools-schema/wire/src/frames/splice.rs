//! Frames whose payload is not copied to this process: the kernel moves it from a file through a pipe.

use std::io;
use std::os::fd::BorrowedFd;

use super::{HEADER, Kind};
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
            if pipe.fill(file, offset + there as u64, length - there)? == 0 {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use bytes::BytesMut;
    use tokio::net::UnixStream;

    use super::super::{Incoming, over};
    use super::*;
    use crate::duplex::split;

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
}
