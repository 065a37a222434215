//! Reduces a program's output to what a terminal would show: without escape sequences, and only the last state of a line that
//! was overwritten repeatedly, such as a progress bar.

/// The longest escape sequence, in bytes; anything longer is not treated as one.
const SEQUENCE_MAX: usize = 4096;

/// Stand-ins for the sequences that erase. These characters do not occur otherwise in the text.
const ERASE_TO_END: char = '\u{b}';
const ERASE_LINE: char = '\u{c}';

/// Folds text that was meant for a terminal.
pub fn fold(text: &str) -> String {
    let plain = without_sequences(text);
    let mut folded = String::with_capacity(plain.len());
    for line in plain.split_inclusive('\n') {
        let (line, end) = match line.strip_suffix('\n') {
            Some(line) => (line, "\n"),
            None => (line, ""),
        };
        folded.push_str(&overwritten(line.trim_end_matches('\r')));
        folded.push_str(end);
    }
    folded
}

/// How many of these bytes can be folded without more input: a sequence or a carriage return at the end may continue. All of
/// them if there is nothing else.
pub fn whole(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(SEQUENCE_MAX);
    let end = match bytes[tail..].iter().rposition(|b| *b == 0x1b) {
        Some(at) if !is_whole(&bytes[tail + at..]) => tail + at,
        _ => bytes.len(),
    };
    let end = end - bytes[..end].iter().rev().take_while(|b| **b == b'\r').count();
    if end == 0 { bytes.len() } else { end }
}

/// What remains visible of a line whose parts were written over each other: a later part hides as many characters as it has.
fn overwritten(line: &str) -> String {
    if !line.contains(['\r', '\u{8}', ERASE_TO_END, ERASE_LINE]) {
        return line.to_owned();
    }
    let (mut shown, mut at) = (Vec::new(), 0_usize);
    for c in line.chars() {
        match c {
            '\r' => at = 0,
            '\u{8}' => at = at.saturating_sub(1),
            ERASE_TO_END => shown.truncate(at),
            ERASE_LINE => shown.iter_mut().for_each(|c| *c = ' '),
            c => {
                if at < shown.len() {
                    shown[at] = c;
                } else {
                    shown.push(c);
                }
                at += 1;
            }
        }
    }
    String::from_iter(shown).trim_end().to_owned()
}

/// Removes escape sequences, and control characters that only affect a terminal.
fn without_sequences(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_control() && !matches!(c, '\n' | '\t' | '\r' | '\u{8}')) {
        let (before, from) = rest.split_at(at);
        plain.push_str(before);
        let length = match from.as_bytes()[0] {
            0x1b => sequence(from.as_bytes()).0,
            _ => from.chars().next().map_or(1, char::len_utf8),
        };
        match from.get(..length) {
            Some("\u{1b}[K" | "\u{1b}[0K" | "\u{1b}[J") => plain.push(ERASE_TO_END),
            Some("\u{1b}[2K") => plain.push(ERASE_LINE),
            _ => {}
        }
        // If a sequence would end inside a character, only the escape character is removed.
        rest = match from.get(length..) {
            Some(rest) => rest,
            None => &from[1..],
        };
    }
    plain.push_str(rest);
    plain
}

fn is_whole(bytes: &[u8]) -> bool {
    sequence(bytes).1
}

/// The length of the escape sequence (ECMA-48) at the beginning of these bytes, and whether it is complete.
fn sequence(bytes: &[u8]) -> (usize, bool) {
    let find = |from: usize, is_end: fn(u8) -> bool| {
        bytes.iter().skip(from).take(SEQUENCE_MAX).position(|b| is_end(*b)).map(|at| from + at + 1)
    };
    let end = match bytes.get(1) {
        None => None,
        // Control sequences: parameters, then one of @ to ~. Anything else ends a broken one.
        Some(b'[') => {
            let end = find(2, |b| !(0x20..=0x3f).contains(&b));
            end.map(|end| if (0x40..=0x7e).contains(&bytes[end - 1]) { end } else { end - 1 })
        }
        // Strings, such as a window title, up to BEL or ESC \.
        Some(b']' | b'P' | b'X' | b'^' | b'_') => {
            find(2, |b| b == 0x07 || b == 0x1b || b == b'\n').map(|end| {
                match (bytes[end - 1], bytes.get(end)) {
                    (0x1b, Some(b'\\')) => end + 1,
                    (0x07, _) => end,
                    _ => end - 1,
                }
            })
        }
        // Two characters, with intermediate ones between.
        Some(0x20..=0x2f) => {
            let end = find(2, |b| !(0x20..=0x2f).contains(&b));
            end.map(|end| if (0x30..=0x7e).contains(&bytes[end - 1]) { end } else { end - 1 })
        }
        Some(0x30..=0x7e) => Some(2),
        // Not a sequence: the escape character stands alone.
        Some(_) => Some(1),
    };
    match end {
        Some(end) => (end, true),
        None => (1, false),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_log_is_what_a_terminal_would_show() {
        for (text, seen) in [
            ("plain\n", "plain\n"),
            ("one\r\ntwo\r\n", "one\ntwo\n"),
            ("\u{1b}[1;31mred\u{1b}[0m\n", "red\n"),
            ("\u{1b}]0;title\u{7}ok \u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\\n", "ok link\n"),
            ("\u{1b}(B\u{1b}=\u{1b}[?25lhidden\u{1b}[?25h\n", "hidden\n"),
            ("  0%\r 50%\r100%\n", "100%\n"),
            ("downloading\rdone\n", "doneloading\n"),
            ("downloading\r\u{1b}[Kdone\n", "done\n"),
            ("downloading\u{1b}[2K\rdone\n", "done\n"),
            ("kept\u{1b}[K\n", "kept\n"),
            ("abc\u{8}\u{8}XY\n", "aXY\n"),
            ("bell\u{7} tab\t.\n", "bell tab\t.\n"),
            ("50%\r", "50%"),
            ("ä\u{9b}x\n", "äx\n"),
        ] {
            assert_eq!(fold(text), seen, "{text:?}");
        }
    }

    #[test]
    fn what_may_go_on_is_left_for_the_next_piece() {
        for (bytes, length) in [
            (&b"abc"[..], 3),
            (b"abc\r", 3),
            (b"abc\r\n", 5),
            (b"abc\x1b", 3),
            (b"abc\x1b[1;3", 3),
            (b"abc\x1b[1;31m", 10),
            (b"abc\x1b]0;ti", 3),
            (b"\x1b[1", 3),
            (b"\r\r", 2),
        ] {
            assert_eq!(whole(bytes), length, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_too_odd(text in "[\u{1b}\r\n\u{8}\\[\\]PX;0-9mKä\u{7}\\\\ ]{0,60}") {
            let folded = fold(&text);
            prop_assert_eq!(folded.find('\u{1b}'), None);
            prop_assert_eq!(folded.matches('\n').count(), text.matches('\n').count());
            prop_assert!(whole(text.as_bytes()) <= text.len());
        }
    }
}
