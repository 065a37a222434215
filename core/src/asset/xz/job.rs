//! Decodes a block on a thread of its own.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use xz2::stream::{Action, Stream};

use super::MEMORY;
use super::format::{Head, damaged};
use super::spool::{PIECE, Spool};

/// A block that states its sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sized {
    /// Its total length in the file, header included.
    pub(super) packed: u64,
    pub(super) unpacked: u64,
    /// The memory that its decoder needs.
    pub(super) memory: u64,
}

/// The decoding of one block. Dropping it ends the thread and waits for it.
pub(super) struct Job {
    pub(super) block: Sized,
    pub(super) packed: Arc<Spool>,
    unpacked: Arc<Spool>,
    file: Arc<std::fs::File>,
    thread: Option<JoinHandle<()>>,
    piece: Vec<u8>,
    at: usize,
}

impl Job {
    /// Starts one, with a file for data that does not fit in memory.
    pub(super) fn start(head: Head, block: Sized, file: Arc<std::fs::File>) -> io::Result<Self> {
        let packed = Arc::new(Spool::new(file.clone(), 0));
        let unpacked = Arc::new(Spool::new(file.clone(), block.packed));
        let (from, to) = (packed.clone(), Lost(unpacked.clone()));
        let thread = thread::Builder::new().name("xz-block".into());
        let thread = thread.spawn(move || {
            let ended = decode(head, block, &from, &to.0);
            to.0.finish(ended);
        })?;
        Ok(Self { block, packed, unpacked, file, thread: Some(thread), piece: Vec::new(), at: 0 })
    }

    /// Reads output; zero bytes mean the end.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            self.at = 0;
            self.unpacked.take(&mut self.piece)?;
        }
        let n = buf.len().min(self.piece.len() - self.at);
        buf[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }

    /// Ends it, and returns its file for reuse.
    pub(super) fn into_file(self) -> Arc<std::fs::File> {
        self.file.clone()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.packed.abandon();
        self.unpacked.abandon();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported as an error here.
            let _ = thread.join();
        }
    }
}

/// Tells the reader if the thread was lost.
struct Lost(Arc<Spool>);

impl Drop for Lost {
    fn drop(&mut self) {
        self.0.finish(Err(io::Error::other("a thread of the pipeline ended")));
    }
}

/// Runs the thread: decodes one block, whose length must match its header. The decoder checks the check field.
fn decode(head: Head, block: Sized, from: &Spool, to: &Spool) -> io::Result<()> {
    let mut stream = decoder(head)?;
    let (mut input, mut output) = (Vec::new(), vec![0; PIECE]);
    let (mut packed, mut unpacked) = (0, 0);
    loop {
        from.take(&mut input)?;
        if input.is_empty() {
            break;
        }
        packed += input.len() as u64;
        let mut rest = &input[..];
        loop {
            let (taken, made) = step(&mut stream, rest, &mut output)?;
            rest = &rest[taken..];
            unpacked += made as u64;
            if made > 0 && !to.put(&output[..made])? {
                return Ok(());
            }
            // If the output is full, the decoder may have more.
            if rest.is_empty() && made < output.len() {
                break;
            }
            if taken == 0 && made == 0 {
                return Err(damaged());
            }
        }
    }
    if (packed, unpacked) == (block.packed, block.unpacked) { Ok(()) } else { Err(damaged()) }
}

/// A block decoder that has read the stream's header.
pub(super) fn decoder(head: Head) -> io::Result<Stream> {
    let mut stream = Stream::new_stream_decoder(MEMORY, 0)?;
    let (taken, _) = step(&mut stream, &head.0, &mut [0])?;
    if taken == head.0.len() { Ok(stream) } else { Err(damaged()) }
}

/// One decoding step; returns how much input was taken and how much output was made.
pub(super) fn step(stream: &mut Stream, input: &[u8], output: &mut [u8]) -> io::Result<(usize, usize)> {
    let (before_in, before_out) = (stream.total_in(), stream.total_out());
    stream.process(input, output, Action::Run)?;
    Ok(((stream.total_in() - before_in) as usize, (stream.total_out() - before_out) as usize))
}
