//! Passes chunks of a stream between the thread that packs or unpacks and the task that has the connection; few at a time.

use std::io::{self, BufRead, Read, Write};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::mpsc;

/// The size of a chunk, in bytes.
pub const CHUNK: usize = 128 << 10;
/// The maximum number of waiting chunks.
const WAITING: usize = 4;

/// A part of a stream, or the error that ended it.
pub type Chunk = io::Result<Bytes>;

/// Creates a channel for chunks.
pub fn chunks() -> (mpsc::Sender<Chunk>, mpsc::Receiver<Chunk>) {
    mpsc::channel(WAITING)
}

/// Writes a stream as chunks; blocks while the channel is full.
#[derive(Debug)]
pub struct ChunkWriter {
    channel: mpsc::Sender<Chunk>,
    waiting: BytesMut,
}

impl ChunkWriter {
    /// Creates a writer to a channel.
    pub fn new(channel: mpsc::Sender<Chunk>) -> Self {
        Self { channel, waiting: BytesMut::with_capacity(CHUNK) }
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.waiting.len();
        let taken = room.min(bytes.len());
        self.waiting.extend_from_slice(&bytes[..taken]);
        if self.waiting.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.waiting, BytesMut::with_capacity(CHUNK));
        let sent = self.channel.blocking_send(Ok(full.freeze()));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
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
