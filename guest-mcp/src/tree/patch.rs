//! Writes differences in the format of `git diff`, so that `git apply` accepts them.

use std::time::{Duration, Instant};

use similar::{Algorithm, DiffOp, capture_diff_slices_deadline, group_diff_ops};

/// How many unchanged lines are shown around a change.
const CONTEXT: usize = 3;
/// How long the best difference of one file is searched for; after that any is accepted.
const DEADLINE: Duration = Duration::from_secs(2);
/// The mode of a symbolic link.
pub(super) const LINK: u32 = 0o120_000;

/// One side of a file: its git mode and its content.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) mode: u32,
    pub(super) content: &'a [u8],
}

/// How many lines a difference adds and removes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lines {
    pub(super) added: u64,
    pub(super) removed: u64,
}

/// Returns a file's mode in git.
pub(super) const fn git_mode(mode: u32) -> u32 {
    if mode & 0o100 != 0 { 0o100_755 } else { 0o100_644 }
}

/// Returns whether content is text, as git decides: it contains no NUL byte.
pub(super) fn is_text(content: &[u8]) -> bool {
    !content.contains(&0)
}

/// Writes the difference of one path. `None` means that the file does not exist on that side.
pub(super) fn write(out: &mut Vec<u8>, path: &[u8], old: Option<Side<'_>>, new: Option<Side<'_>>) -> Lines {
    // In git a file becomes a link only by deleting one and creating the other.
    if let (Some(before), Some(after)) = (old, new)
        && (before.mode == LINK) != (after.mode == LINK)
    {
        let deleted = write(out, path, old, None);
        let made = write(out, path, None, new);
        return Lines { added: made.added, removed: deleted.removed };
    }
    let (from, to) = (name(b"a/", path), name(b"b/", path));
    let mut line = |parts: &[&[u8]]| {
        parts.iter().for_each(|part| out.extend_from_slice(part));
        out.push(b'\n');
    };
    line(&[b"diff --git ", &from, b" ", &to]);
    match (old, new) {
        (None, Some(new)) => line(&[format!("new file mode {:06o}", new.mode).as_bytes()]),
        (Some(old), None) => line(&[format!("deleted file mode {:06o}", old.mode).as_bytes()]),
        (Some(old), Some(new)) if old.mode != new.mode => {
            line(&[format!("old mode {:06o}", old.mode).as_bytes()]);
            line(&[format!("new mode {:06o}", new.mode).as_bytes()]);
        }
        _ => {}
    }
    let before = old.map_or(&b""[..], |side| side.content);
    let after = new.map_or(&b""[..], |side| side.content);
    if before == after {
        return Lines::default();
    }
    let end = |name: &[u8]| if name.contains(&b' ') { &b"\t"[..] } else { b"" };
    match old {
        Some(_) => line(&[b"--- ", &from, end(&from)]),
        None => line(&[b"--- /dev/null"]),
    }
    match new {
        Some(_) => line(&[b"+++ ", &to, end(&to)]),
        None => line(&[b"+++ /dev/null"]),
    }
    hunks(out, &lines(before), &lines(after))
}

/// Returns the lines of a content, including line ends.
fn lines(content: &[u8]) -> Vec<&[u8]> {
    content.split_inclusive(|byte| *byte == b'\n').collect()
}

fn hunks(out: &mut Vec<u8>, old: &[&[u8]], new: &[&[u8]]) -> Lines {
    let deadline = Some(Instant::now() + DEADLINE);
    let ops = capture_diff_slices_deadline(Algorithm::Myers, old, new, deadline);
    let mut count = Lines::default();
    for group in group_diff_ops(ops, CONTEXT) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let range = |start: usize, end: usize| match end - start {
            // For an empty side: the line after which it would be.
            0 => format!("{start},0"),
            1 => format!("{}", start + 1),
            length => format!("{},{length}", start + 1),
        };
        let before = range(first.old_range().start, last.old_range().end);
        let after = range(first.new_range().start, last.new_range().end);
        out.extend_from_slice(format!("@@ -{before} +{after} @@\n").as_bytes());
        for op in group {
            let (before, after) = (op.old_range(), op.new_range());
            if matches!(op, DiffOp::Equal { .. }) {
                old[before].iter().for_each(|text| write_line(out, b' ', text));
                continue;
            }
            count.removed += before.len() as u64;
            count.added += after.len() as u64;
            old[before].iter().for_each(|text| write_line(out, b'-', text));
            new[after].iter().for_each(|text| write_line(out, b'+', text));
        }
    }
    count
}

fn write_line(out: &mut Vec<u8>, mark: u8, text: &[u8]) {
    out.push(mark);
    out.extend_from_slice(text);
    if !text.ends_with(b"\n") {
        out.extend_from_slice(b"\n\\ No newline at end of file\n");
    }
}

/// Returns a path after its prefix, quoted as in C if necessary.
fn name(prefix: &[u8], path: &[u8]) -> Vec<u8> {
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
    if path.iter().all(is_plain) {
        return [prefix, path].concat();
    }
    let mut quoted = vec![b'"'];
    quoted.extend_from_slice(prefix);
    for byte in path {
        match byte {
            b'\n' => quoted.extend_from_slice(b"\\n"),
            b'\t' => quoted.extend_from_slice(b"\\t"),
            b'"' | b'\\' => quoted.extend_from_slice(&[b'\\', *byte]),
            byte if is_plain(byte) => quoted.push(*byte),
            byte => quoted.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
        }
    }
    quoted.push(b'"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diff(path: &str, old: Option<(u32, &str)>, new: Option<(u32, &str)>) -> String {
        let side = |(mode, text): (u32, &'static str)| Side { mode, content: text.as_bytes() };
        // In tests it may leak.
        let leak = |side: (u32, &str)| (side.0, &*Box::leak(side.1.to_owned().into_boxed_str()));
        let mut out = Vec::new();
        write(&mut out, path.as_bytes(), old.map(leak).map(side), new.map(leak).map(side));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn differences_are_those_of_git() {
        let old = "1\n2\n3\n4\n5\n6\n7\n8\n9\n";
        assert_eq!(
            diff("a b.txt", Some((0o100_644, old)), Some((0o100_755, "1\n2\n3\n4\nfive\n6\n7\n8\n9\n10"))),
            "diff --git a/a b.txt b/a b.txt\nold mode 100644\nnew mode 100755\n--- a/a b.txt\t\n+++ b/a b.txt\t\n\
             @@ -2,8 +2,9 @@\n 2\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n 9\n+10\n\\ No newline at end of file\n"
        );
        assert_eq!(
            diff("new", None, Some((0o100_644, "x\n"))),
            "diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+x\n"
        );
        assert_eq!(
            diff("old", Some((0o100_755, "x\n")), None),
            "diff --git a/old b/old\ndeleted file mode 100755\n--- a/old\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"
        );
        assert_eq!(
            diff("e", Some((0o100_644, "")), Some((0o100_755, ""))),
            "diff --git a/e b/e\nold mode 100644\nnew mode 100755\n"
        );
        let linked = diff("l", Some((0o100_644, "x\n")), Some((LINK, "to")));
        assert!(
            linked.contains("deleted file mode 100644") && linked.contains("new file mode 120000"),
            "{linked}"
        );
    }

    #[test]
    fn names_are_quoted_as_git_does() {
        assert_eq!(name(b"a/", b"plain name-1.x"), b"a/plain name-1.x");
        assert_eq!(name(b"a/", b"a\"b\\c\n\td\x01\xc3\xa4"), br#""a/a\"b\\c\n\td\001\303\244""#);
    }
}
