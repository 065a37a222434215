//! The newest lines of output, as progress for waiting callers: one line of text without cursor movements.

use std::sync::atomic::Ordering;

use nexus_wire::fold;

use super::command::Command;

/// How much of the end of the output is examined, in bytes.
const LOOK: usize = 4 << 10;
/// The maximum number of lines.
const LINES: usize = 3;
/// The maximum length, in characters, as the host limits it.
const TOLD_MAX: usize = 400;
/// The separator of two lines.
const BETWEEN: &str = " ⏎ ";

/// Returns the newest lines of a command; `None` if there are none.
pub(super) fn lines(command: &Command) -> Option<String> {
    let at = usize::from(command.newest.load(Ordering::Acquire));
    let bytes = command.streams[at].kept().last(LOOK);
    let text = told(&bytes);
    (!text.is_empty()).then_some(text)
}

fn told(bytes: &[u8]) -> String {
    let text = fold::fold(&String::from_utf8_lossy(&bytes[..fold::whole(bytes)]));
    let lines: Vec<String> = text.split('\n').map(line).filter(|line| !line.is_empty()).collect();
    let newest = lines[lines.len().saturating_sub(LINES)..].join(BETWEEN);
    let count = newest.chars().count();
    newest.chars().skip(count.saturating_sub(TOLD_MAX)).collect()
}

fn line(text: &str) -> String {
    let tame: String =
        text.chars().map(|c| if c == '\t' { ' ' } else { c }).filter(|c| !c.is_control()).collect();
    tame.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_lines_are_plain_text() {
        for (text, shown) in [
            ("", ""),
            ("one\n", "one"),
            ("1\n2\n3\n4\n5", "3 ⏎ 4 ⏎ 5"),
            ("a\n\n\nb\n", "a ⏎ b"),
            ("10%\r20%\r30%\r", "30%"),
            ("ok\r\nnext\r\n", "ok ⏎ next"),
            ("\u{1b}[1;32mgreen\u{1b}[0m \u{1b}]0;title\u{7}x\u{1b}]8;;u\u{1b}\\y", "green xy"),
            ("\u{1b}(Bplain\u{1b}7\u{1b}[2Jend", "plainend"),
            ("a\tb\u{7}\u{8}c\u{85}", "a c"),
            ("x\u{1b}[", "x"),
        ] {
            assert_eq!(told(text.as_bytes()), shown, "{text:?}");
        }
        let long = told("é".repeat(9_000).as_bytes());
        assert_eq!(long.chars().count(), TOLD_MAX);
        assert!(!told(&(0..=255).collect::<Vec<u8>>()).chars().any(char::is_control));
    }
}
