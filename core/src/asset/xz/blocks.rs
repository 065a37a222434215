//! Decodes xz with little memory, whatever the size of its blocks: those that tell their sizes, as those of `xz -T` do, are
//! decoded side by side, each by a thread of its own, and come out in their order.
//!
//! ```text
//!           ┌─> spool ─> decoder ─> spool ─┐
//! file ─────┼─> spool ─> decoder ─> spool ─┼──> Read        side by side
//!           └─────────── decoder ──────────┘                in order: no sizes, very large, very small, too much memory
//! ```
//!
//! A spool keeps a little in memory and the rest in a file without a name, most of it in the page cache. What is ahead of the
//! reader is bounded: by the memory of the decoders, by the bytes in the spools, and by what may come out in all. The decoder
//! checks the blocks: their headers, sizes and check fields; index and footer are checked here.

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

/// The smallest block that is worth a thread.
const SMALL: u64 = 256 << 10;
/// How many bytes blocks that are decoded side by side may have together, packed and unpacked.
const SPOOLED: u64 = 256 << 20;
/// What a file may have grown to that is used again.
const KEPT: u64 = 64 << 20;

/// Reads what one or several xz streams hold, one after the other, with padding between them.
pub(crate) struct Blocks<R> {
    inner: R,
    place: Place,
    /// Those that are decoded side by side, in their order.
    jobs: VecDeque<Job>,
    /// The block whose turn is after theirs.
    next: Option<Next>,
    /// Files for the spools.
    files: Vec<Arc<std::fs::File>>,
    /// Where they are made.
    directory: PathBuf,
    /// How much may still come out of blocks that were not begun.
    left: u64,
    threads: usize,
    /// The smallest block that is given to a thread.
    least: u64,
}

enum Place {
    /// Before a stream, after so many zeros; there was one before.
    Padding(u64),
    /// In a stream, before a block or its index.
    Stream(Box<Inside>),
    /// Nothing more comes.
    End,
}

struct Inside {
    head: Head,
    records: Records,
    /// The decoder of blocks in order: it is made once, and takes one after the other.
    stream: Stream,
}

enum Next {
    /// One that waits until there is room for it.
    Waits(BlockHeader, Sized),
    /// One that is decoded in order.
    InOrder(InOrder),
}

struct InOrder {
    /// What of its header the decoder has to take.
    header: Vec<u8>,
    header_bytes: u64,
    rest: Rest,
    /// What came out.
    made: u64,
}

/// How much of a block is to come.
enum Rest {
    /// So many of so many bytes.
    Told(u64, u64),
    Scanned(Scanner),
}

impl<R: BufRead> Blocks<R> {
    /// Reads all streams of `inner`; there must be one at least. What is ahead is kept in `directory`, in files without names,
    /// and no more than `limit` bytes in all: who reads more than that decodes it in order.
    pub(crate) fn new(mut inner: R, directory: PathBuf, limit: u64) -> io::Result<Self> {
        let place = begin(&mut inner)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let (jobs, files) = (VecDeque::new(), Vec::new());
        Ok(Self { inner, place, jobs, next: None, files, directory, left: limit, threads, least: SMALL })
    }

    /// Gives smaller blocks to threads, too.
    #[cfg(test)]
    pub(super) fn with_least(self, least: u64) -> Self {
        Self { least, threads: self.threads.max(2), ..self }
    }

    /// How many blocks are under way.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.jobs.len()
    }

    /// Goes on in the file as far as there is something to begin.
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

    /// Whether a block may be begun beside those that are under way.
    fn has_room(&self, block: Sized) -> bool {
        let all = self.jobs.iter().map(|job| job.block);
        let (memory, bytes) = all
            .fold((block.memory, block.packed + block.unpacked), |(memory, bytes), b| {
                (memory + b.memory, bytes + b.packed + b.unpacked)
            });
        // One is being read while the others are decoded.
        self.jobs.is_empty()
            || self.jobs.len() <= self.threads && memory <= MEMORY_OF_THREADS && bytes <= SPOOLED
    }

    /// Gives a block to a thread.
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

    /// Ends the first job, and keeps its file for another one.
    fn end_job(&mut self) {
        let Some(job) = self.jobs.pop_front() else { return };
        let is_small = job.block.packed + job.block.unpacked <= KEPT;
        let file = job.into_file();
        if is_small {
            self.files.push(file);
        }
    }

    /// Decodes a little of a block whose turn it is; whether there is more of it.
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
        // All is taken, and nothing more comes of it.
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
    /// How a block is to be decoded.
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
    /// How much of some bytes is the block's.
    fn of(&self, input: &[u8]) -> usize {
        match self {
            Self::Told(left, _) => input.len().min(usize::try_from(*left).unwrap_or(usize::MAX)),
            Self::Scanned(scanner) => { *scanner }.scan(input),
        }
    }

    /// The decoder has taken these.
    fn go_on(&mut self, taken: &[u8]) {
        match self {
            Self::Told(left, _) => *left -= taken.len() as u64,
            Self::Scanned(scanner) => {
                scanner.scan(taken);
            }
        }
    }

    /// Whether nothing more is to be read of it.
    fn is_whole(&self) -> bool {
        match self {
            Self::Told(left, _) => *left == 0,
            Self::Scanned(scanner) => scanner.end().is_some() || scanner.is_lost(),
        }
    }

    /// How long its data was.
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
