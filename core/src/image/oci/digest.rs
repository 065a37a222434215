//! Digests of blobs, and readers that check them.

use std::fmt;
use std::io::{self, Read};

use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256, Sha512};

use super::OciError;

/// The digest of a blob: `sha256:HEX` or `sha512:HEX`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Digest {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Digest {
    /// Parses a digest: only lowercase hexadecimal digits of the right number.
    pub(crate) fn parse(text: &str) -> Result<Self, OciError> {
        let bad = || OciError::Document { what: format!("`{}` is no sha256 or sha512 digest", shown(text)) };
        let (algorithm, digits, hex) = match text.split_once(':') {
            Some(("sha256", hex)) => (Algorithm::Sha256, 64, hex),
            Some(("sha512", hex)) => (Algorithm::Sha512, 128, hex),
            _ => return Err(bad()),
        };
        let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() == digits && hex.bytes().all(is_digit) {
            Ok(Self { algorithm, hex: hex.to_owned() })
        } else {
            Err(bad())
        }
    }

    /// The SHA-256 of bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { algorithm: Algorithm::Sha256, hex: HEXLOWER.encode(&Sha256::digest(bytes)) }
    }

    /// The digest that a SHA-256 of many pieces gives.
    pub(crate) fn of_pieces(pieces: Sha256) -> Self {
        Self { algorithm: Algorithm::Sha256, hex: HEXLOWER.encode(&pieces.finalize()) }
    }

    /// The algorithm's name.
    pub(crate) fn algorithm(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// The digits.
    pub(crate) fn hex(&self) -> &str {
        &self.hex
    }

    /// Starts a digest with this algorithm.
    pub(crate) fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            Algorithm::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    /// Fails unless `found` equals this digest.
    pub(crate) fn expect(&self, what: &str, found: Hasher) -> Result<(), OciError> {
        let found = found.finish();
        if found == *self {
            return Ok(());
        }
        Err(OciError::Digest { what: what.to_owned(), expected: self.to_string(), found: found.to_string() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex)
    }
}

/// A digest that is being computed.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => {
                Digest { algorithm: Algorithm::Sha256, hex: HEXLOWER.encode(&hasher.finalize()) }
            }
            Self::Sha512(hasher) => {
                Digest { algorithm: Algorithm::Sha512, hex: HEXLOWER.encode(&hasher.finalize()) }
            }
        }
    }
}

/// A reader that hashes what is read.
pub(crate) struct Hashed<R> {
    pub(crate) source: R,
    pub(crate) hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Makes untrusted text short and printable.
pub(crate) fn shown(text: &str) -> String {
    crate::os::shown::printable(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_are_digests() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::parse(empty).unwrap(), Digest::of(b""));
        assert_eq!(Digest::of(b"").to_string(), empty);
        for bad in [
            "",
            "sha256:",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256:../../../../etc/passwd",
            &empty[..70],
            &empty.to_uppercase(),
            &empty.replace("sha256", "sha512"),
            &format!("{empty}/"),
        ] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
