//! Stages of a pipeline: readers that wrap a reader. Each does one thing, so they can be combined in any order.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::str::FromStr;

use sha2::Digest as _;

use super::xz::Xz;

/// A SHA-256 digest; its text is 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 digest: 64 hexadecimal digits are expected")]
pub struct NotADigest;

impl FromStr for Sha256 {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let bytes =
            data_encoding::HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).map_err(|_| NotADigest)?;
        bytes.try_into().map(Self).map_err(|_| NotADigest)
    }
}

/// The limit was exceeded. Wrapped in an [`io::Error`] on its way through readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("larger than the {limit} bytes that are allowed")]
pub(crate) struct OverLimit {
    pub(crate) limit: u64,
}

impl OverLimit {
    /// Extracts this error from an [`io::Error`].
    pub(crate) fn in_error(error: &io::Error) -> Option<Self> {
        error.get_ref().and_then(|e| e.downcast_ref::<Self>()).copied()
    }
}

/// A reader that fails after more than a given number of bytes.
pub(crate) struct Capped<R> {
    inner: R,
    left: u64,
    limit: u64,
}

/// Reads at most `limit` bytes; one more is an error, not the end of the stream.
pub(crate) fn capped<R: Read>(inner: R, limit: u64) -> Capped<R> {
    Capped { inner, left: limit, limit }
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            return match self.inner.read(&mut [0])? {
                0 => Ok(0),
                _ => Err(io::Error::other(OverLimit { limit: self.limit })),
            };
        }
        let most = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.inner.read(&mut buf[..most])?;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A reader that tracks the hash and the number of the bytes that passed.
pub(crate) struct Hashed<R> {
    inner: R,
    hasher: sha2::Sha256,
    bytes: u64,
}

/// Hashes what is read.
pub(crate) fn hashed<R: Read>(inner: R) -> Hashed<R> {
    Hashed { inner, hasher: sha2::Sha256::new(), bytes: 0 }
}

impl<R: Read> Hashed<R> {
    /// Reads the rest, and returns the digest and the number of all bytes.
    pub(crate) fn finish(mut self) -> io::Result<(Sha256, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Sha256(self.hasher.finalize().into()), self.bytes))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

/// A compression format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Uncompressed.
    Plain,
    /// gzip, one or several members.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// The legacy frames of LZ4 that the Linux kernel uses.
    Lz4Legacy,
}

impl Compression {
    /// Detects the compression by the first bytes; `None` if unknown.
    pub fn of_magic(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4Legacy),
            _ => None,
        }
    }

    /// The compression that a file name indicates.
    pub fn of_name(name: &str) -> Self {
        match name.rsplit_once('.') {
            Some((_, "gz")) => Self::Gzip,
            Some((_, "xz")) => Self::Xz,
            Some((_, "zst")) => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// Decompresses what is read. The result is not capped: put [`capped`] around it.
pub(crate) fn decompressed<'a, R: Read + Send + 'a>(
    inner: R,
    compression: Compression,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match compression {
        Compression::Plain => Box::new(inner),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(inner)),
        Compression::Xz => Box::new(Xz::new(BufReader::with_capacity(64 << 10, inner))?),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(inner)?;
            // 2^27 is 128 MiB, the default limit of the command-line tool.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
        Compression::Lz4Legacy => Box::new(Lz4Legacy::new(BufReader::new(inner))),
    })
}

/// The block size of LZ4's legacy frame format.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184c_2102;

/// Reads LZ4's legacy frames: a magic number, then blocks of at most 8 MiB with their compressed size in front.
/// Source of the format: "Legacy frame" in LZ4's `lz4_Frame_format.md`.
struct Lz4Legacy<R> {
    inner: R,
    block: Vec<u8>,
    at: usize,
    packed: Vec<u8>,
    started: bool,
}

impl<R: BufRead> Lz4Legacy<R> {
    fn new(inner: R) -> Self {
        Self { inner, block: Vec::new(), at: 0, packed: Vec::new(), started: false }
    }

    /// A little-endian number, or `None` at the end of the input.
    fn number(&mut self) -> io::Result<Option<u32>> {
        if self.inner.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut bytes = [0; 4];
        self.inner.read_exact(&mut bytes)?;
        Ok(Some(u32::from_le_bytes(bytes)))
    }

    fn next_block(&mut self) -> io::Result<bool> {
        let bad = |text: &'static str| io::Error::new(io::ErrorKind::InvalidData, text);
        let Some(mut word) = self.number()? else {
            return if self.started { Ok(false) } else { Err(bad("an LZ4 frame is empty")) };
        };
        // Another magic number may follow: frames can be concatenated.
        while word == LZ4_MAGIC {
            self.started = true;
            match self.number()? {
                Some(next) => word = next,
                None => return Ok(false),
            }
        }
        if !self.started {
            return Err(bad("an LZ4 frame lacks its magic number"));
        }
        let size = word as usize;
        if size > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) {
            return Err(bad("an LZ4 block is larger than the format allows"));
        }
        self.packed.resize(size, 0);
        self.inner.read_exact(&mut self.packed)?;
        self.block.resize(LZ4_BLOCK, 0);
        let n = lz4_flex::block::decompress_into(&self.packed, &mut self.block)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        self.block.truncate(n);
        self.at = 0;
        Ok(true)
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let n = buf.len().min(self.block.len() - self.at);
        buf[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asset::testing::lz4_legacy;

    #[test]
    fn a_cap_lets_exactly_its_bytes_through() {
        let mut out = Vec::new();
        capped(&b"12345"[..], 5).read_to_end(&mut out).unwrap();
        assert_eq!(out, b"12345");
        let error = capped(&b"123456"[..], 5).read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(OverLimit::in_error(&error), Some(OverLimit { limit: 5 }));
    }

    #[test]
    fn a_hash_covers_what_was_not_read_too() {
        let mut reader = hashed(&b"abc"[..]);
        reader.read_exact(&mut [0]).unwrap();
        let (digest, bytes) = reader.finish().unwrap();
        assert_eq!(bytes, 3);
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Sha256>().unwrap(), digest);
        assert!("abc".parse::<Sha256>().is_err());
    }

    #[test]
    fn lz4_blocks_and_frames_follow_each_other() {
        let big = vec![7; LZ4_BLOCK];
        let mut packed = lz4_legacy(&[&big, b"tail"]);
        packed.extend(lz4_legacy(&[b"second frame"]));
        let mut out = Vec::new();
        decompressed(&packed[..], Compression::Lz4Legacy).unwrap().read_to_end(&mut out).unwrap();
        assert_eq!(out.len(), LZ4_BLOCK + 4 + 12);
        assert!(out.ends_with(b"tailsecond frame"));
    }

    #[test]
    fn damaged_lz4_is_an_error_and_no_panic() {
        let good = lz4_legacy(&[b"some text that is long enough to be packed packed packed packed"]);
        let read = |bytes: &[u8]| {
            decompressed(bytes, Compression::Lz4Legacy).unwrap().read_to_end(&mut Vec::new()).is_ok()
        };
        assert!(read(&good));
        for cut in 1..good.len() - 1 {
            let _ = read(&good[..cut]);
        }
        assert!(!read(&good[..good.len() - 3]));
        assert!(!read(b""));
        let mut huge = LZ4_MAGIC.to_le_bytes().to_vec();
        huge.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(!read(&huge));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            for compression in [Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Lz4Legacy] {
                let reader = decompressed(&bytes[..], compression).unwrap();
                let _ = capped(reader, 1 << 20).read_to_end(&mut Vec::new());
            }
        }
    }
}
