//! Passes chunks of a stream between the thread that packs or unpacks and the task that has the connection; few at a time.

use std::io::{self, BufRead, Read, Write};
use std::os::fd::BorrowedFd;

use bytes::{Buf, Bytes};
use nexus_wire::block::Block;
use nexus_wire::frames::{Moved, PACKET, PIECE};
use tokio::sync::mpsc;

/// The size of a chunk, in bytes: one frame.
pub const CHUNK: usize = PIECE;
/// The maximum number of waiting chunks.
const WAITING: usize = 4;

/// A part of a stream, or the error that ended it.
pub type Chunk = io::Result<Bytes>;

/// A part of a stream that is sent.
#[derive(Debug)]
pub enum Piece {
    /// What was read.
    Read(Bytes),
    /// What the kernel moves from a file.
    Moved(Moved),
}

/// Creates a channel for pieces.
pub fn pieces() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(WAITING)
}

/// Creates a channel for chunks.
pub fn chunks() -> (mpsc::Sender<Chunk>, mpsc::Receiver<Chunk>) {
    mpsc::channel(WAITING)
}

/// Where a packed stream goes.
pub trait Sink: Write {
    /// Has `read` put up to `most` bytes where they go, without a copy where that can be; returns what it returns. The outer error is that of
    /// the sink.
    fn write_from(
        &mut self,
        most: usize,
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>>;

    /// Has the kernel move up to `most` bytes of a file from an offset to where they go; returns how many. 0: they have to be read. The error is that of
    /// the sink.
    fn move_from(&mut self, _file: BorrowedFd<'_>, _offset: u64, _most: u64) -> io::Result<usize> {
        Ok(0)
    }
}

impl Sink for Vec<u8> {
    fn write_from(
        &mut self,
        most: usize,
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>> {
        let start = self.len();
        self.resize(start + most, 0);
        let done = read(&mut self[start..]);
        self.truncate(start + done.as_ref().map_or(0, |read| (*read).min(most)));
        Ok(done)
    }
}

/// Writes a stream as chunks; blocks while the channel is full.
#[derive(Debug)]
pub struct ChunkWriter<T = Chunk> {
    channel: mpsc::Sender<T>,
    wrap: fn(Bytes) -> T,
    waiting: Block,
    /// Whether the kernel may move bytes of files.
    is_moving: bool,
}

impl ChunkWriter {
    /// Creates a writer to a channel.
    pub fn new(channel: mpsc::Sender<Chunk>) -> Self {
        Self { channel, wrap: Ok, waiting: Block::new(), is_moving: false }
    }
}

impl ChunkWriter<Piece> {
    /// Creates a writer to a channel for pieces.
    pub fn of_pieces(channel: mpsc::Sender<Piece>) -> Self {
        Self { channel, wrap: Piece::Read, waiting: Block::new(), is_moving: true }
    }
}

impl<T> ChunkWriter<T> {
    fn flush_full(&mut self) -> io::Result<()> {
        if self.waiting.len() == CHUNK { self.flush() } else { Ok(()) }
    }

    fn send(&self, part: T) -> io::Result<()> {
        self.channel.blocking_send(part).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn fill_from(
        &mut self,
        most: usize,
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>> {
        let most = most.min(CHUNK - self.waiting.len());
        let done = read(&mut self.waiting.room()[..most]);
        self.waiting.fill(done.as_ref().map_or(0, |read| (*read).min(most)));
        self.flush_full().map(|()| done)
    }
}

impl<T> Write for ChunkWriter<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.waiting.len();
        let taken = self.waiting.push(&bytes[..bytes.len().min(room)]);
        self.flush_full().map(|()| taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let full = std::mem::take(&mut self.waiting);
        self.send((self.wrap)(full.freeze()))
    }
}

impl Sink for ChunkWriter {
    fn write_from(
        &mut self,
        most: usize,
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>> {
        self.fill_from(most, read)
    }
}

impl Sink for ChunkWriter<Piece> {
    fn write_from(
        &mut self,
        most: usize,
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<io::Result<usize>> {
        self.fill_from(most, read)
    }

    fn move_from(&mut self, file: BorrowedFd<'_>, offset: u64, most: u64) -> io::Result<usize> {
        if !self.is_moving || most < PACKET as u64 {
            return Ok(0);
        }
        match Moved::of_file(file, offset, usize::try_from(most).unwrap_or(CHUNK)) {
            Ok(Some(moved)) => {
                self.flush()?;
                let length = moved.length();
                self.send(Piece::Moved(moved)).map(|()| length)
            }
            Ok(None) => Ok(0),
            Err(_) => {
                // It became shorter, or its filesystem cannot do that: reading tells.
                self.is_moving = false;
                Ok(0)
            }
        }
    }
}

/// Reads a stream from chunks; blocks while the channel is empty.
#[derive(Debug)]
pub struct ChunkReader {
    channel: mpsc::Receiver<Chunk>,
    at_hand: Bytes,
}

impl ChunkReader {
    /// Creates a reader of a channel. The stream ends when the channel is closed.
    pub fn new(channel: mpsc::Receiver<Chunk>) -> Self {
        Self { channel, at_hand: Bytes::new() }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = self.fill_buf()?;
        let read = ready.len().min(buffer.len());
        buffer[..read].copy_from_slice(&ready[..read]);
        self.consume(read);
        Ok(read)
    }
}

impl BufRead for ChunkReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at_hand.is_empty() {
            match self.channel.blocking_recv() {
                Some(chunk) => self.at_hand = chunk?,
                None => break,
            }
        }
        Ok(&self.at_hand)
    }

    fn consume(&mut self, read: usize) {
        self.at_hand.advance(read);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn files_are_moved_until_one_is_shorter_than_it_said() {
        let content = vec![7_u8; 2 * CHUNK];
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let (into, mut from) = pieces();
        let writing = std::thread::spawn(move || {
            let mut writer = ChunkWriter::of_pieces(into);
            writer.write_all(b"head").unwrap();
            let small = writer.move_from(file.as_fd(), 0, 100).unwrap();
            let moved = writer.move_from(file.as_fd(), 0, content.len() as u64).unwrap();
            file.set_len(0).unwrap();
            let gone = writer.move_from(file.as_fd(), 0, CHUNK as u64).unwrap();
            assert!(!writer.is_moving || moved == 0);
            writer.flush().unwrap();
            (small, moved, gone)
        });
        let mut lengths = Vec::new();
        while let Some(piece) = from.blocking_recv() {
            lengths.push(match piece {
                Piece::Read(bytes) => bytes.len(),
                Piece::Moved(moved) => moved.length(),
            });
        }
        let (small, moved, gone) = writing.join().unwrap();
        assert_eq!((small, gone, lengths[0]), (0, 0, 4));
        // Kernels that are faster without move nothing.
        assert!(moved == 0 || lengths[1] == moved);
    }

    #[test]
    fn each_chunk_but_the_last_is_a_whole_frame() {
        let (into, mut from) = chunks();
        let writing = std::thread::spawn(move || {
            let mut writer = ChunkWriter::new(into);
            writer.write_all(&[1; 1000]).unwrap();
            let mut left = 3 * CHUNK;
            while left > 0 {
                let read = writer.write_from(left, &mut |room| {
                    room.fill(2);
                    Ok(room.len())
                });
                left -= read.unwrap().unwrap();
            }
            writer.write_all(&vec![3; CHUNK]).unwrap();
            writer.flush().unwrap();
        });
        let mut all = Vec::new();
        let mut sizes = Vec::new();
        while let Some(chunk) = from.blocking_recv() {
            let chunk = chunk.unwrap();
            sizes.push(chunk.len());
            all.extend_from_slice(&chunk);
        }
        writing.join().unwrap();
        assert_eq!(sizes, [CHUNK, CHUNK, CHUNK, CHUNK, 1000]);
        assert!(all == [vec![1; 1000], vec![2; 3 * CHUNK], vec![3; CHUNK]].concat());
    }
}
