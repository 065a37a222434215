//! The first line of a host program on the Unix socket: `CONNECT <port>\n`.

/// Maximum length of the line, including the newline, in bytes.
pub(super) const LINE_MAX: usize = 32;

/// The line of a host connection, as far as it has been received.
#[derive(Debug, Clone, Default)]
pub(super) struct Greeting {
    line: [u8; LINE_MAX],
    length: usize,
}

/// State of the line after the bytes received so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is incomplete.
    More,
    /// The line requests this port of the guest.
    Connect(u32),
    /// The line is invalid or too long.
    Refused,
}

impl Greeting {
    /// Returns the number of bytes to read next; never 0 while the line is incomplete.
    pub(super) fn room(&self) -> usize {
        LINE_MAX - self.length
    }

    /// Takes bytes up to and including the line's newline. Returns how many it took; bytes after the newline do not belong to the line.
    pub(super) fn take(&mut self, bytes: &[u8]) -> (usize, Progress) {
        let bytes = &bytes[..bytes.len().min(self.room())];
        let newline = bytes.iter().position(|byte| *byte == b'\n');
        let taken = newline.map_or(bytes.len(), |at| at + 1);
        self.line[self.length..self.length + taken].copy_from_slice(&bytes[..taken]);
        self.length += taken;
        let progress = match newline {
            Some(_) => parse(&self.line[..self.length - 1]).map_or(Progress::Refused, Progress::Connect),
            None if self.room() == 0 => Progress::Refused,
            None => Progress::More,
        };
        (taken, progress)
    }
}

/// Parses the port of a line without its newline.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_matches([' ', '\t', '\r']);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the final state after `bytes` in pieces of these sizes, and how many bytes were taken.
    fn feed(bytes: &[u8], pieces: impl IntoIterator<Item = usize>) -> (usize, Progress) {
        let (mut greeting, mut taken) = (Greeting::default(), 0);
        for piece in pieces {
            let end = (taken + piece.max(1)).min(bytes.len());
            let (count, progress) = greeting.take(&bytes[taken..end]);
            taken += count;
            if progress != Progress::More || taken == bytes.len() {
                return (taken, progress);
            }
        }
        (taken, Progress::More)
    }

    fn whole(bytes: &[u8]) -> Progress {
        feed(bytes, [usize::MAX / 2; 2]).1
    }

    #[test]
    fn a_port_is_a_decimal_number_of_32_bits() {
        assert_eq!(whole(b"CONNECT 0\n"), Progress::Connect(0));
        assert_eq!(whole(b"CONNECT 200\n"), Progress::Connect(200));
        assert_eq!(whole(b"CONNECT 200\r\n"), Progress::Connect(200));
        assert_eq!(whole(b"CONNECT  200 \n"), Progress::Connect(200));
        assert_eq!(whole(b"CONNECT 4294967295\n"), Progress::Connect(u32::MAX));
        for bad in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT 4294967296\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 0x10\n",
            "CONNECT 1 2\n",
            "connect 200\n",
            " CONNECT 200\n",
            "CONNECT 200\0\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT \u{0663}\n",
        ] {
            assert_eq!(whole(bad.as_bytes()), Progress::Refused, "{bad:?}");
        }
        assert_eq!(whole(b"CONNECT \xff\n"), Progress::Refused);
    }

    #[test]
    fn a_line_ends_within_32_bytes() {
        let line = |spaces| format!("CONNECT {}7\n", " ".repeat(spaces));
        assert_eq!(line(22).len(), 32);
        assert_eq!(whole(line(22).as_bytes()), Progress::Connect(7));
        assert_eq!(whole(line(23).as_bytes()), Progress::Refused);
        assert_eq!(whole(&[b'x'; 33]), Progress::Refused);
        assert_eq!(whole(&[b'x'; 32]), Progress::Refused);
        assert_eq!(whole(&[b'x'; 31]), Progress::More);
    }

    proptest! {
        #[test]
        fn cutting_the_line_changes_nothing_and_no_byte_behind_it_is_taken(
            port: u32,
            behind in proptest::collection::vec(any::<u8>(), 0..200),
            pieces in proptest::collection::vec(1usize..12, 40),
        ) {
            let line = format!("CONNECT {port}\n");
            let bytes = [line.as_bytes(), &behind].concat();
            prop_assert_eq!(feed(&bytes, pieces), (line.len(), Progress::Connect(port)));
        }

        #[test]
        fn garbage_is_refused_within_32_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 33..100),
            pieces in proptest::collection::vec(1usize..40, 100),
        ) {
            prop_assume!(!bytes.starts_with(b"CONNECT "));
            let (taken, progress) = feed(&bytes, pieces);
            prop_assert_eq!(progress, Progress::Refused);
            prop_assert!(taken <= LINE_MAX);
        }
    }
}
