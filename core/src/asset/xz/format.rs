//! The container format of .xz files: where blocks begin and end. The decoder handles their contents.
//!
//! Source of the format: "The .xz File Format", version 1.2.1, sections 2.1 to 4, and "LZMA2" in liblzma's `lzma2_decoder.c`.

use std::io::{self, BufRead, Read};

use sha2::Digest as _;

/// The length of a stream's header, and of its footer.
pub(super) const HEAD: usize = 12;
const FOOTER_MAGIC: [u8; 2] = *b"YZ";

/// The decoder's error for an inconsistent file.
pub(super) fn damaged() -> io::Error {
    xz2::stream::Error::Data.into()
}

/// The error for a truncated file.
pub(super) fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the xz stream ends early")
}

/// Fills `bytes`.
pub(super) fn fill(inner: &mut impl Read, bytes: &mut [u8]) -> io::Result<()> {
    inner.read_exact(bytes).map_err(|e| if e.kind() == io::ErrorKind::UnexpectedEof { cut_off() } else { e })
}

/// Skips some of the zeros after a stream and counts them; returns whether another stream follows, once known.
pub(super) fn skip_padding(inner: &mut impl BufRead, zeros: &mut u64) -> io::Result<Option<bool>> {
    let input = inner.fill_buf()?;
    let more = input.iter().take_while(|byte| **byte == 0).count();
    let (is_end, is_over) = (input.is_empty(), more < input.len());
    inner.consume(more);
    *zeros += more as u64;
    if !is_end && !is_over {
        return Ok(None);
    }
    if zeros.is_multiple_of(4) { Ok(Some(is_over)) } else { Err(corrupt()) }
}

/// The error for data that cannot be continued with.
pub(super) fn corrupt() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "corrupt xz stream")
}

/// How many padding bytes follow a block's data to make its length a multiple of four.
fn padding(length: u64) -> u64 {
    length.wrapping_neg() & 3
}

fn is_crc(bytes: &[u8], stored: &[u8]) -> bool {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes() == stored
}

/// The header of a stream, already checked by the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head(pub(super) [u8; HEAD]);

impl Head {
    /// The length of a block's check field.
    pub(super) fn check_bytes(&self) -> u64 {
        match self.0[7] & 15 {
            0 => 0,
            1..=3 => 4,
            4..=6 => 8,
            7..=9 => 16,
            10..=12 => 32,
            _ => 64,
        }
    }
}

/// The header of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockHeader {
    /// All of it.
    pub(super) bytes: Vec<u8>,
    /// The lengths of its data, packed and unpacked, if stated.
    pub(super) sizes: Option<(u64, u64)>,
    /// The memory that its decoder needs, if known.
    pub(super) memory: Option<u64>,
}

impl BlockHeader {
    /// Reads the rest of a header that starts with `first`; not for the header of an index.
    pub(super) fn read(first: u8, inner: &mut impl Read) -> io::Result<Self> {
        let mut bytes = vec![first; (usize::from(first) + 1) * 4];
        fill(inner, &mut bytes[1..])?;
        let (fields, crc) = bytes.split_at(bytes.len() - 4);
        if !is_crc(fields, crc) {
            return Err(damaged());
        }
        let fields = fields[1..].to_vec();
        let mut header = Self { bytes, sizes: None, memory: None };
        // If it contains something unknown here, the decoder decides.
        let _ = header.look_at(&mut &fields[..]);
        Ok(header)
    }

    /// Finds sizes and memory; `None` if only the decoder can tell.
    fn look_at(&mut self, rest: &mut &[u8]) -> Option<()> {
        let flags = *rest.split_off_first()?;
        let packed = if flags & 0x40 != 0 { Some(number(rest).ok()?) } else { None };
        let unpacked = if flags & 0x80 != 0 { Some(number(rest).ok()?) } else { None };
        self.sizes = packed.zip(unpacked);
        for _ in 0..=flags & 3 {
            let id = number(rest).ok()?;
            let length = usize::try_from(number(rest).ok()?).ok()?;
            // LZMA2, which is always last.
            if let (0x21, [size @ 0..=39]) = (id, rest.split_off(..length)?) {
                self.memory = Some((2 | u64::from(size & 1)) << (size / 2 + 11));
            }
        }
        Some(())
    }
}

/// A number in headers and in the index: seven bits per byte, the lowest first.
fn number(inner: &mut impl Read) -> io::Result<u64> {
    let mut value = 0;
    for at in 0..9 {
        let mut byte = [0];
        fill(inner, &mut byte)?;
        value |= u64::from(byte[0] & 0x7f) << (at * 7);
        if byte[0] & 0x80 == 0 {
            return if byte[0] == 0 && at > 0 { Err(damaged()) } else { Ok(value) };
        }
    }
    Err(damaged())
}

/// The blocks that a stream's index must list. Their number does not affect the memory it takes.
#[derive(Clone, Default)]
pub(super) struct Records {
    count: u64,
    hasher: sha2::Sha256,
}

impl Records {
    /// Adds a block: its unpadded length, and its unpacked length.
    pub(super) fn add(&mut self, unpadded: u64, unpacked: u64) {
        self.count += 1;
        self.hasher.update(unpadded.to_le_bytes());
        self.hasher.update(unpacked.to_le_bytes());
    }

    /// Reads the rest of an index after its first byte, and the footer behind it. Both must match.
    pub(super) fn read_index(self, inner: &mut impl BufRead, head: &Head) -> io::Result<()> {
        let mut summed = Summed { inner, crc: flate2::Crc::new(), bytes: 1 };
        summed.crc.update(&[0]);
        let mut listed = Self::default();
        let count = number(&mut summed)?;
        if count != self.count {
            return Err(damaged());
        }
        for _ in 0..count {
            let unpadded = number(&mut summed)?;
            listed.add(unpadded, number(&mut summed)?);
        }
        if listed.hasher.finalize() != self.hasher.finalize() {
            return Err(damaged());
        }
        let mut zeros = [0; 3];
        let zeros = &mut zeros[..padding(summed.bytes) as usize];
        fill(&mut summed, zeros)?;
        let (crc, bytes) = (summed.crc.sum(), summed.bytes);
        let mut stored = [0; 4];
        fill(inner, &mut stored)?;
        if zeros.iter().any(|byte| *byte != 0) || stored != crc.to_le_bytes() {
            return Err(damaged());
        }
        let mut footer = [0; HEAD];
        fill(inner, &mut footer)?;
        // The checksum; the index's length in units of four bytes, less one; the header's flags; the magic bytes.
        let length = u64::from(u32::from_le_bytes([footer[4], footer[5], footer[6], footer[7]]));
        let is_true = is_crc(&footer[4..10], &footer[..4])
            && (length + 1) * 4 == bytes + 4
            && footer[8..10] == head.0[6..8]
            && footer[10..] == FOOTER_MAGIC;
        if is_true { Ok(()) } else { Err(damaged()) }
    }
}

/// A reader that tracks the checksum and the number of bytes read.
struct Summed<'a, R> {
    inner: &'a mut R,
    crc: flate2::Crc,
    bytes: u64,
}

impl<R: Read> Read for Summed<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.crc.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Finds the end of a block that does not state its sizes: the chunks of LZMA2 state theirs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scanner {
    place: Place,
    /// How much data of the block was scanned.
    packed: u64,
    check_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    /// Before a chunk's first byte.
    Chunk,
    /// In a chunk's header: its bytes so far, their number, and the total.
    Header([u8; 6], u8, u8),
    /// This many bytes before the next chunk.
    Data(u64),
    /// This many bytes of padding and check field before the block's end.
    Tail(u64),
    /// After an invalid chunk; the decoder reports it.
    Lost,
}

impl Scanner {
    pub(super) fn new(check_bytes: u64) -> Self {
        Self { place: Place::Chunk, packed: 0, check_bytes }
    }

    /// How many bytes at the beginning of `input` still belong to the block.
    pub(super) fn scan(&mut self, input: &[u8]) -> usize {
        let mut at = 0;
        while at < input.len() {
            let left = (input.len() - at) as u64;
            let taken = match &mut self.place {
                Place::Chunk => {
                    self.place = match input[at] {
                        // This byte counts as data, too.
                        0 => Place::Tail(padding(self.packed + 1) + self.check_bytes),
                        first @ (1 | 2) => Place::Header([first, 0, 0, 0, 0, 0], 1, 3),
                        first @ 0x80..=0xbf => Place::Header([first, 0, 0, 0, 0, 0], 1, 5),
                        first @ 0xc0.. => Place::Header([first, 0, 0, 0, 0, 0], 1, 6),
                        _ => Place::Lost,
                    };
                    self.packed += 1;
                    1
                }
                Place::Header(bytes, have, length) => {
                    bytes[usize::from(*have)] = input[at];
                    *have += 1;
                    if have == length {
                        let size = if *length == 3 { [bytes[1], bytes[2]] } else { [bytes[3], bytes[4]] };
                        self.place = Place::Data(u64::from(u16::from_be_bytes(size)) + 1);
                    }
                    self.packed += 1;
                    1
                }
                Place::Data(0) => {
                    self.place = Place::Chunk;
                    0
                }
                Place::Data(more) => {
                    let taken = left.min(*more);
                    *more -= taken;
                    self.packed += taken;
                    taken
                }
                Place::Tail(0) | Place::Lost => break,
                Place::Tail(more) => {
                    let taken = left.min(*more);
                    *more -= taken;
                    taken
                }
            };
            at += taken as usize;
        }
        at
    }

    /// The length of the block's data, once its end was found.
    pub(super) fn end(&self) -> Option<u64> {
        matches!(self.place, Place::Tail(0)).then_some(self.packed)
    }

    /// Whether the end cannot be found.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self.place, Place::Lost)
    }
}

/// How many bytes follow a block's header, given the length of its data.
pub(super) fn behind_header(packed: u64, check_bytes: u64) -> u64 {
    packed.saturating_add(padding(packed)).saturating_add(check_bytes)
}
