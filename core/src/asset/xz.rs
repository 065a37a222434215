//! Decodes xz: the blocks of a file side by side where there are several and their headers have their sizes, as those of
//! `xz -T` have; everything else one after the other.

use std::io::{self, BufRead, Read};

use xz2::stream::{Action, MtStreamBuilder, Status, Stream};

/// How much memory a decoder of hostile input may take.
const MEMORY: u64 = 256 << 20;
/// How much of it blocks may take that are decoded side by side; what needs more is decoded in the order of the file.
const MEMORY_OF_THREADS: u64 = 40 << 20;
/// The most threads.
const THREADS: usize = 4;

/// Reads what one or several xz streams hold, one after the other, with padding between them.
pub(crate) struct Xz<R> {
    inner: R,
    /// `None` between two streams.
    stream: Option<Stream>,
    /// Zeros after the last stream.
    padding: u64,
}

impl<R: BufRead> Xz<R> {
    /// Reads all streams of `inner`; there must be one at least.
    pub(crate) fn new(inner: R) -> io::Result<Self> {
        Ok(Self { inner, stream: Some(decoder()?), padding: 0 })
    }

    /// Goes to the next stream; says whether there is one.
    fn next_stream(&mut self) -> io::Result<bool> {
        loop {
            let input = self.inner.fill_buf()?;
            let zeros = input.iter().take_while(|byte| **byte == 0).count();
            let (is_end, is_over) = (input.is_empty(), zeros < input.len());
            self.inner.consume(zeros);
            self.padding += zeros as u64;
            if is_end || is_over {
                if !self.padding.is_multiple_of(4) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "corrupt xz stream"));
                }
                self.padding = 0;
                if is_over {
                    self.stream = Some(decoder()?);
                }
                return Ok(is_over);
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
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the xz stream ends early"));
                }
                _ if made == 0 && taken == 0 => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "corrupt xz stream"));
                }
                _ => {}
            }
            if made > 0 {
                return Ok(made);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Bytes that pack to about a half.
    fn content(bytes: usize) -> Vec<u8> {
        let mut state: u32 = 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            b'a' + ((state >> 24) & 15) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    /// Packed in blocks, as by `xz -T2 --block-size`.
    fn in_blocks(bytes: &[u8], block: u64) -> Vec<u8> {
        let stream = MtStreamBuilder::new().threads(2).preset(1).block_size(block).encoder().unwrap();
        let mut writer = xz2::write::XzEncoder::new_stream(Vec::new(), stream);
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn in_one(bytes: &[u8]) -> Vec<u8> {
        let mut writer = xz2::write::XzEncoder::new(Vec::new(), 1);
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Xz::new(io::BufReader::with_capacity(1000, packed))?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn blocks_and_streams_come_out_in_order() {
        let bytes = content(600_000);
        for block in [16 << 10, 200 << 10, 8 << 20] {
            assert!(unpack(&in_blocks(&bytes, block)).unwrap() == bytes, "blocks of {block}");
        }
        assert!(unpack(&in_one(&bytes)).unwrap() == bytes);
        assert_eq!(unpack(&in_one(b"")).unwrap(), b"");
        let several =
            [&in_one(b"one")[..], &in_blocks(b"two", 4096), &[0; 8], &in_one(b"three"), &[0; 4]].concat();
        assert_eq!(unpack(&several).unwrap(), b"onetwothree");
    }

    #[test]
    fn what_is_cut_off_or_has_something_behind_it_is_refused() {
        for packed in [in_blocks(&content(300_000), 64 << 10), in_one(&content(300_000))] {
            for cut in [0, 1, 11, 12, 100, packed.len() / 2, packed.len() - 13, packed.len() - 1] {
                assert!(unpack(&packed[..cut]).is_err(), "{cut} of {}", packed.len());
            }
            for behind in [&[0u8, 0][..], b"behind", &[0, 0, 0, 0, 7]] {
                assert!(unpack(&[&packed[..], behind].concat()).is_err(), "{behind:?}");
            }
            let mut damaged = packed;
            let at = damaged.len() / 2;
            damaged[at] ^= 4;
            assert!(unpack(&damaged).is_err());
        }
    }

    #[test]
    fn more_memory_than_is_allowed_is_refused() {
        let mut packed = in_one(b"small");
        // The header of its block: size, flags, the filter with its dictionary's size, padding, checksum.
        assert_eq!(packed[12..16], [2, 0, 0x21, 1]);
        // 4 GiB.
        packed[16] = 40;
        let mut checksum = flate2::Crc::new();
        checksum.update(&packed[12..20]);
        packed[20..24].copy_from_slice(&checksum.sum().to_le_bytes());
        let error = unpack(&packed).unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
    }
}
