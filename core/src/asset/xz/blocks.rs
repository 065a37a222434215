//! Decodes xz with little memory, whatever the size of its blocks. Blocks whose headers state their sizes, as `xz -T` writes
//! them, are decoded in parallel, each by its own thread, and returned in order.
//!
//! ```text
//!           ┌─> spool ─> decoder ─> spool ─┐
//! file ─────┼─> spool ─> decoder ─> spool ─┼──> Read        in parallel
//!           └─────────── decoder ──────────┘                in order: no sizes, very large, very small, too much memory
//! ```
//!
//! A spool keeps a little in memory and the rest in an unnamed file, mostly in the page cache. Read-ahead is bounded by the
//! memory of the decoders, by the bytes in the spools, and by the limit of the output. The decoder checks the blocks: headers,
//! sizes and check fields. Index and footer are checked here.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::path::PathBuf;
use std::sync::Arc;

use xz2::stream::Stream;

use super::format::{
    BlockHeader, HEAD, Head, Records, Scanner, behind_header, cut_off, damaged, fill, skip_padding,
};
use super::job::{self, Job, Sized};
use super::spool::PIECE;
use super::{MEMORY_OF_THREADS, THREADS};

/// The smallest block that gets its own thread.
const SMALL: u64 = 256 << 10;
/// The limit for all parallel blocks together, packed and unpacked.
const SPOOLED: u64 = 256 << 20;
/// A spool file that grew larger than this is not reused.
const KEPT: u64 = 64 << 20;

/// Reads the contents of one or more concatenated xz streams, with padding between them.
pub(crate) struct Blocks<R> {
    inner: R,
    place: Place,
    /// The blocks that are decoded in parallel, in order.
    jobs: VecDeque<Job>,
    /// The next block after them.
    next: Option<Next>,
    /// Files for the spools.
    files: Vec<Arc<std::fs::File>>,
    /// The directory for these files.
    directory: PathBuf,
    /// How many bytes the blocks that were not started yet may still produce.
    left: u64,
    threads: usize,
    /// The smallest block that gets a thread.
    least: u64,
}

enum Place {
    /// Before a stream, after so many zeros; another stream came before.
    Padding(u64),
    /// Inside a stream, before a block or the index.
    Stream(Box<Inside>),
    /// At the end.
    End,
}

struct Inside {
    head: Head,
    records: Records,
    /// The decoder for blocks in order; it is made once and reused for all of them.
    stream: Stream,
}

enum Next {
    /// A block that waits for room.
    Waits(BlockHeader, Sized),
    /// A block that is decoded in order.
    InOrder(InOrder),
}

struct InOrder {
    /// The part of its header that the decoder must still read.
    header: Vec<u8>,
    header_bytes: u64,
    rest: Rest,
    /// How many bytes were produced.
    made: u64,
}

/// How much of a block is still to be read.
enum Rest {
    /// Read so far, and the total that the header states.
    Told(u64, u64),
    Scanned(Scanner),
}

impl<R: BufRead> Blocks<R> {
    /// Reads all streams of `inner`, which must contain at least one. Read-ahead is kept in unnamed files in `directory`, up
    /// to `limit` bytes in all; anything beyond that is decoded in order.
    pub(crate) fn new(mut inner: R, directory: PathBuf, limit: u64) -> io::Result<Self> {
        let place = begin(&mut inner)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let (jobs, files) = (VecDeque::new(), Vec::new());
        Ok(Self { inner, place, jobs, next: None, files, directory, left: limit, threads, least: SMALL })
    }

    /// Gives threads to smaller blocks, too.
    #[cfg(test)]
    pub(super) fn with_least(self, least: u64) -> Self {
        Self { least, threads: self.threads.max(2), ..self }
    }

    /// How many blocks are being decoded in parallel.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.jobs.len()
    }

    /// Reads on in the file while there are blocks to start.
    fn look_ahead(&mut self) -> io::Result<()> {
        loop {
            match self.next.take() {
                None => {}
                Some(Next::Waits(header, block)) => {
                    if !self.has_room(block) {
                        self.next = Some(Next::Waits(header, block));
                        return Ok(());
                    }
                    self.begin_job(&header, block)?;
                }
                in_order => {
                    self.next = in_order;
                    return Ok(());
                }
            }
            match &mut self.place {
                Place::Padding(zeros) => {
                    self.place = match skip_padding(&mut self.inner, zeros)? {
                        Some(true) => begin(&mut self.inner)?,
                        Some(false) => Place::End,
                        None => continue,
                    };
                }
                Place::Stream(inside) => {
                    let mut first = [0];
                    fill(&mut self.inner, &mut first)?;
                    if first == [0] {
                        let records = std::mem::take(&mut inside.records);
                        records.read_index(&mut self.inner, &inside.head)?;
                        self.place = Place::Padding(0);
                    } else {
                        let header = BlockHeader::read(first[0], &mut self.inner)?;
                        let least = if self.threads > 1 { self.least } else { u64::MAX };
                        self.next = Some(inside.next(header, &mut self.left, least));
                    }
                }
                Place::End => return Ok(()),
            }
        }
    }

    /// Whether another block may be started beside the running ones.
    fn has_room(&self, block: Sized) -> bool {
        let all = self.jobs.iter().map(|job| job.block);
        let (memory, bytes) = all
            .fold((block.memory, block.packed + block.unpacked), |(memory, bytes), b| {
                (memory + b.memory, bytes + b.packed + b.unpacked)
            });
        // One block is being read while the others are decoded.
        self.jobs.is_empty()
            || self.jobs.len() <= self.threads && memory <= MEMORY_OF_THREADS && bytes <= SPOOLED
    }

    /// Starts a thread for a block.
    fn begin_job(&mut self, header: &BlockHeader, block: Sized) -> io::Result<()> {
        let Place::Stream(inside) = &self.place else { return Err(damaged()) };
        let file = match self.files.pop() {
            Some(file) => file,
            None => Arc::new(tempfile::tempfile_in(&self.directory).map_err(super::spool::Unkept::of)?),
        };
        let job = Job::start(inside.head, block, file)?;
        job.packed.put(&header.bytes)?;
        let mut left = block.packed - header.bytes.len() as u64;
        while left > 0 {
            let input = self.inner.fill_buf()?;
            if input.is_empty() {
                return Err(cut_off());
            }
            let n = input.len().min(PIECE).min(usize::try_from(left).unwrap_or(usize::MAX));
            job.packed.put(&input[..n])?;
            self.inner.consume(n);
            left -= n as u64;
        }
        job.packed.finish(Ok(()));
        self.jobs.push_back(job);
        Ok(())
    }

    /// Ends the first job, and keeps its file for reuse.
    fn end_job(&mut self) {
        let Some(job) = self.jobs.pop_front() else { return };
        let is_small = job.block.packed + job.block.unpacked <= KEPT;
        let file = job.into_file();
        if is_small {
            self.files.push(file);
        }
    }

    /// Decodes a part of the current block; also returns whether more follows.
    fn read_in_order(&mut self, buf: &mut [u8]) -> io::Result<(usize, bool)> {
        let (Some(Next::InOrder(block)), Place::Stream(inside)) = (&mut self.next, &mut self.place) else {
            return Ok((0, false));
        };
        if !block.header.is_empty() {
            let (taken, made) = job::step(&mut inside.stream, &block.header, buf)?;
            block.header.drain(..taken);
            return if taken == 0 { Err(damaged()) } else { Ok((made, true)) };
        }
        let is_whole = block.rest.is_whole();
        let input = if is_whole { &[][..] } else { self.inner.fill_buf()? };
        if input.is_empty() && !is_whole {
            return Err(cut_off());
        }
        let own = block.rest.of(input);
        let (taken, made) = job::step(&mut inside.stream, &input[..own], buf)?;
        block.rest.go_on(&input[..taken]);
        self.inner.consume(taken);
        block.made += made as u64;
        self.left = self.left.saturating_sub(made as u64);
        if taken > 0 || made > 0 {
            return Ok((made, true));
        }
        // All input is taken, and no more output comes.
        match block.rest.end() {
            Some(packed) => {
                inside.records.add(block.header_bytes + packed + inside.head.check_bytes(), block.made);
                Ok((0, false))
            }
            None => Err(damaged()),
        }
    }
}

/// Begins a stream.
fn begin(inner: &mut impl Read) -> io::Result<Place> {
    let mut head = Head([0; HEAD]);
    fill(inner, &mut head.0)?;
    let stream = job::decoder(head)?;
    Ok(Place::Stream(Box::new(Inside { head, records: Records::default(), stream })))
}

impl Inside {
    /// Decides how to decode a block.
    fn next(&mut self, header: BlockHeader, left: &mut u64, least: u64) -> Next {
        let header_bytes = header.bytes.len() as u64;
        let check_bytes = self.head.check_bytes();
        let rest = match header.sizes {
            Some((packed, unpacked)) => {
                let behind = behind_header(packed, check_bytes);
                let whole = behind.saturating_add(header_bytes);
                let is_within = unpacked <= *left && whole.saturating_add(unpacked) <= SPOOLED;
                if let Some(memory) = header.memory
                    && is_within
                    && unpacked >= least
                    && memory <= MEMORY_OF_THREADS / 2
                {
                    *left -= unpacked;
                    self.records.add(header_bytes + packed + check_bytes, unpacked);
                    return Next::Waits(header, Sized { packed: whole, unpacked, memory });
                }
                Rest::Told(behind, packed)
            }
            None => Rest::Scanned(Scanner::new(check_bytes)),
        };
        Next::InOrder(InOrder { header: header.bytes, header_bytes, rest, made: 0 })
    }
}

impl Rest {
    /// How many of these bytes belong to the block.
    fn of(&self, input: &[u8]) -> usize {
        match self {
            Self::Told(left, _) => input.len().min(usize::try_from(*left).unwrap_or(usize::MAX)),
            Self::Scanned(scanner) => { *scanner }.scan(input),
        }
    }

    /// Accounts for bytes that the decoder has taken.
    fn go_on(&mut self, taken: &[u8]) {
        match self {
            Self::Told(left, _) => *left -= taken.len() as u64,
            Self::Scanned(scanner) => {
                scanner.scan(taken);
            }
        }
    }

    /// Whether the block was read completely.
    fn is_whole(&self) -> bool {
        match self {
            Self::Told(left, _) => *left == 0,
            Self::Scanned(scanner) => scanner.end().is_some() || scanner.is_lost(),
        }
    }

    /// The length of its data.
    fn end(&self) -> Option<u64> {
        match self {
            Self::Told(0, packed) => Some(*packed),
            Self::Told(..) => None,
            Self::Scanned(scanner) => scanner.end(),
        }
    }
}

impl<R: BufRead> Read for Blocks<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            self.look_ahead()?;
            if let Some(job) = self.jobs.front_mut() {
                let n = job.read(buf)?;
                if n > 0 {
                    return Ok(n);
                }
                self.end_job();
                continue;
            }
            if matches!(self.place, Place::End) {
                return Ok(0);
            }
            let (n, is_more) = self.read_in_order(buf)?;
            if !is_more {
                self.next = None;
            }
            if n > 0 {
                return Ok(n);
            }
        }
    }
}
