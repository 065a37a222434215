//! Decodes xz. If a file has several blocks whose headers state their sizes, as `xz -T` writes them, they are decoded in
//! parallel; everything else is decoded in order. [`Xz`] works in memory, which suits only small blocks; [`Blocks`] uses a
//! directory for its read-ahead.

mod blocks;
mod format;
mod job;
mod spool;
#[cfg(test)]
mod tests;

use std::io::{self, BufRead, Read};

pub(crate) use blocks::Blocks;
use format::{corrupt, cut_off, skip_padding};
pub(crate) use spool::Unkept;
use xz2::stream::{Action, MtStreamBuilder, Status, Stream};

/// The memory limit of a decoder of untrusted input.
const MEMORY: u64 = 256 << 20;
/// The part of it for blocks that are decoded in parallel; blocks that need more are decoded in order.
const MEMORY_OF_THREADS: u64 = 40 << 20;
/// The most threads.
const THREADS: usize = 4;

/// Reads the contents of one or more concatenated xz streams, with padding between them.
pub(crate) struct Xz<R> {
    inner: R,
    /// `None` between two streams.
    stream: Option<Stream>,
    /// Zeros after the last stream.
    padding: u64,
}

impl<R: BufRead> Xz<R> {
    /// Reads all streams of `inner`, which must contain at least one.
    pub(crate) fn new(inner: R) -> io::Result<Self> {
        Ok(Self { inner, stream: Some(decoder()?), padding: 0 })
    }

    /// Goes to the next stream; returns whether there is one.
    fn next_stream(&mut self) -> io::Result<bool> {
        loop {
            if let Some(is_more) = skip_padding(&mut self.inner, &mut self.padding)? {
                self.padding = 0;
                if is_more {
                    self.stream = Some(decoder()?);
                }
                return Ok(is_more);
            }
        }
    }
}

fn decoder() -> io::Result<Stream> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let mut builder = MtStreamBuilder::new();
    builder
        .threads(u32::try_from(threads).unwrap_or(1))
        .memlimit_threading(MEMORY_OF_THREADS)
        .memlimit_stop(MEMORY);
    builder.decoder().map_err(io::Error::from)
}

impl<R: BufRead> Read for Xz<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let Some(stream) = &mut self.stream else {
                match self.next_stream()? {
                    true => continue,
                    false => return Ok(0),
                }
            };
            let input = self.inner.fill_buf()?;
            let is_end = input.is_empty();
            let (before_in, before_out) = (stream.total_in(), stream.total_out());
            let action = if is_end { Action::Finish } else { Action::Run };
            let status = stream.process(input, buf, action);
            let taken = (stream.total_in() - before_in) as usize;
            let made = (stream.total_out() - before_out) as usize;
            self.inner.consume(taken);
            match status? {
                Status::StreamEnd => self.stream = None,
                _ if made == 0 && is_end => {
                    return Err(cut_off());
                }
                _ if made == 0 && taken == 0 => {
                    return Err(corrupt());
                }
                _ => {}
            }
            if made > 0 {
                return Ok(made);
            }
        }
    }
}
