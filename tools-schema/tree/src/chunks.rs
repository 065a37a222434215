//! Passes chunks of a stream between the thread that packs or unpacks and the task that has the connection; few at a time.

use std::io::{self, BufRead, Read, Write};

use bytes::{Buf, Bytes};
use nexus_wire::block::Block;
use nexus_wire::frames::PIECE;
use tokio::sync::mpsc;

/// The size of a chunk, in bytes: one frame.
pub const CHUNK: usize = PIECE;
/// The maximum number of waiting chunks.
const WAITING: usize = 4;

/// A part of a stream, or the error that ended it.
pub type Chunk = io::Result<Bytes>;

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
pub struct ChunkWriter {
    channel: mpsc::Sender<Chunk>,
    waiting: Block,
}

impl ChunkWriter {
    /// Creates a writer to a channel.
    pub fn new(channel: mpsc::Sender<Chunk>) -> Self {
        Self { channel, waiting: Block::new() }
    }

    fn flush_full(&mut self) -> io::Result<()> {
        if self.waiting.len() == CHUNK { self.flush() } else { Ok(()) }
    }
}

impl Write for ChunkWriter {
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
        let sent = self.channel.blocking_send(Ok(full.freeze()));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Sink for ChunkWriter {
    fn write_from(
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
    use super::*;

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
