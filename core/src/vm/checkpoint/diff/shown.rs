//! Names of guests' files for people and models: any bytes, in printable form.

use std::fmt::Write;

/// A path, in which everything but printable text is written as `\xNN`, byte by byte, and a backslash twice.
pub(super) fn path(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '\\' {
                text.push_str("\\\\");
            } else if is_plain(c) {
                text.push(c);
            } else {
                escape(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

fn escape(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
    }
}

/// Whether a character is seen, and changes nothing of what is beside it.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// A text of a guest on one line.
pub(super) fn line(text: &str) -> String {
    path(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_shown_and_none_acts() {
        assert_eq!(path(b"etc/motd"), "etc/motd");
        assert_eq!(path("grün \u{202e}x".as_bytes()), "grün \\xe2\\x80\\xaex");
        assert_eq!(path("\u{61c}x".as_bytes()), "\\xd8\\x9cx");
        assert_eq!(path(b"a\n\x1b[0m\xff\\"), "a\\x0a\\x1b[0m\\xff\\\\");
        for byte in 1..=255_u8 {
            assert!(path(&[byte]).chars().all(|c| !c.is_control()), "{byte}");
        }
    }
}
