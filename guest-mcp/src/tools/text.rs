//! Text from bytes that may not be valid text.

/// Decodes bytes as text; also returns whether some had to be replaced.
pub(crate) fn decode(bytes: &[u8]) -> (String, bool) {
    match String::from_utf8_lossy(bytes) {
        std::borrow::Cow::Borrowed(text) => (text.to_owned(), false),
        std::borrow::Cow::Owned(text) => (text, true),
    }
}

/// Returns a name or a path in one line, with a mark in place of each control character.
pub(crate) fn shown(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Returns how many bytes at the end belong to an incomplete character.
pub(crate) fn incomplete_end(bytes: &[u8]) -> usize {
    let start = bytes.len().saturating_sub(3);
    let Some(lead) = bytes[start..].iter().rposition(|byte| byte & 0xC0 != 0x80) else { return 0 };
    let have = bytes.len() - start - lead;
    let need = match bytes[start + lead] {
        0xC2..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF4 => 4,
        _ => 1,
    };
    if have < need { have } else { 0 }
}

/// Returns how many bytes at the start continue an earlier character.
pub(crate) fn continuation_start(bytes: &[u8]) -> usize {
    bytes.iter().take(3).take_while(|byte| *byte & 0xC0 == 0x80).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_in_one_line() {
        assert_eq!(shown("/a\u{1b}[2J\n\u{9b}b ä"), "/a\u{fffd}[2J\u{fffd}\u{fffd}b ä");
    }

    #[test]
    fn incomplete_characters_are_counted() {
        for (bytes, count) in [
            (&b"abc"[..], 0),
            (b"", 0),
            (b"a\xC3", 1),
            (b"a\xC3\xA4", 0),
            (b"\xE2\x82", 2),
            (b"\xF0\x9F\x98", 3),
            (b"\xF0\x9F\x98\x80", 0),
            (b"\xFF", 0),
            (b"\x80\x80\x80\x80", 0),
        ] {
            assert_eq!(incomplete_end(bytes), count, "{bytes:x?}");
        }
    }
}
