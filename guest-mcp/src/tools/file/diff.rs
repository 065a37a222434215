//! Unified diffs of changed files, and line endings.

use std::borrow::Cow;
use std::time::Duration;

use nexus_schema::limits::OUTPUT_DEFAULT;
use nexus_schema::tools::file::{ChangedFile, FileChangeOutput};
use sha2::{Digest, Sha256};
use similar::{ChangeTag, TextDiff};

use super::change::Changes;
use crate::tools::text::shown;
use crate::tools::{Block, Reply};

/// How long the shortest diff of one file is searched for; after that, a longer one is accepted.
const PATIENCE: Duration = Duration::from_millis(500);
/// The number of lines shown around each change.
const CONTEXT: usize = 3;

/// Returns the SHA-256 of content, in hexadecimal.
pub(super) fn sha256(content: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(content))
}

/// Returns the reply to a call that changes files.
pub(super) fn reply(changes: &Changes, count: u64, what: &str, dry_run: bool) -> Reply<FileChangeOutput> {
    let (mut diff, mut files) = (String::new(), Vec::new());
    for change in &changes.all {
        let created = change.target.existing.is_none();
        let new = change.new.as_deref().unwrap_or_default();
        let (old, name) = (&change.old, shown(&change.name));
        let headers = (
            if created { "/dev/null" } else { name.as_str() },
            if change.new.is_none() { "/dev/null" } else { name.as_str() },
        );
        let (text, added, removed) = unified(old, new, headers);
        diff.push_str(&text);
        files.push(ChangedFile {
            path: change.name.clone(),
            added,
            removed,
            sha256: change.new.as_deref().map(sha256),
            created,
            deleted: change.new.is_none(),
        });
    }
    let most = OUTPUT_DEFAULT as usize;
    let diff_is_cut = diff.len() > most;
    if diff_is_cut {
        let end = diff.floor_char_boundary(most);
        diff.truncate(diff[..end].rfind('\n').map_or(end, |at| at + 1));
    }
    let sum = |of: fn(&ChangedFile) -> u64| files.iter().map(of).sum::<u64>();
    let (added, removed) = (sum(|file| file.added), sum(|file| file.removed));
    let mut header = match files.as_slice() {
        [one] => format!("{} · {count} {what}", shown(&one.path)),
        many => format!("{} files · {count} {what}", many.len()),
    };
    header.push_str(&format!(" · +{added} -{removed} lines"));
    if dry_run {
        header.push_str(" · dry run: nothing was written");
    }
    if diff_is_cut {
        header.push_str(" · the diff is cut");
    }
    let mut reply = Reply::new(header, FileChangeOutput { files, changes: count, dry_run, diff_is_cut });
    if !diff.is_empty() {
        reply.blocks.push(Block::stream("content", diff));
    }
    reply
}

/// Returns the diff of two contents with their names, and how many lines it adds and removes.
fn unified(old: &[u8], new: &[u8], headers: (&str, &str)) -> (String, u64, u64) {
    if old == new {
        return (String::new(), 0, 0);
    }
    let lines = |text| <[u8]>::split_inclusive(text, |byte| *byte == b'\n').collect::<Vec<_>>();
    let (old, new) = (lines(old), lines(new));
    let diff = TextDiff::configure().timeout(PATIENCE).newline_terminated(true).diff_slices(&old, &new);
    let count = |tag| diff.iter_all_changes().filter(|change| change.tag() == tag).count() as u64;
    let (added, removed) = (count(ChangeTag::Insert), count(ChangeTag::Delete));
    let text = diff.unified_diff().context_radius(CONTEXT).header(headers.0, headers.1).to_string();
    (text, added, removed)
}

/// Returns whether every line ends with CR LF. Texts of the caller with LF are then taken to mean CR LF.
fn is_crlf(content: &[u8]) -> bool {
    let mut ends = memchr::memchr_iter(b'\n', content).peekable();
    ends.peek().is_some() && ends.all(|at| at > 0 && content[at - 1] == b'\r')
}

/// Runs `work` on content. If all lines end with CR LF and the caller's texts have no CR, `work` sees LF, and the result gets CR LF again.
pub(super) fn with_endings<E>(
    content: &[u8],
    has_cr: bool,
    work: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    if has_cr || !is_crlf(content) {
        return work(content);
    }
    let plain: Cow<'_, [u8]> = replaced(content, b"\r\n", b"\n").into();
    Ok(replaced(&work(&plain)?, b"\n", b"\r\n"))
}

/// Returns content with every `old` replaced.
pub(super) fn replaced(content: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let (mut result, mut from) = (Vec::with_capacity(content.len()), 0);
    for at in memchr::memmem::find_iter(content, old) {
        result.extend_from_slice(&content[from..at]);
        result.extend_from_slice(new);
        from = at + old.len();
    }
    result.extend_from_slice(&content[from..]);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diffs_are_unified() {
        let (text, added, removed) = unified(b"a\nb\nc", b"a\nB\nc\n", ("/x", "/x"));
        assert_eq!(
            text,
            "--- /x\n+++ /x\n@@ -1,3 +1,3 @@\n a\n-b\n-c\n\\ No newline at end of file\n+B\n+c\n"
        );
        assert_eq!((added, removed), (2, 2));
        assert_eq!(unified(b"a", b"a", ("", "")).0, "");
    }

    #[test]
    fn line_ends_stay() {
        let edit = |content: &[u8], has_cr| {
            with_endings(content, has_cr, |text| Ok::<_, ()>(replaced(text, b"a\nb", b"x\ny"))).unwrap()
        };
        assert_eq!(edit(b"a\r\nb\r\n", false), b"x\r\ny\r\n");
        assert_eq!(edit(b"a\nb\n", false), b"x\ny\n");
        assert_eq!(edit(b"a\r\nb\r\n", true), b"a\r\nb\r\n");
        // With mixed line endings, nothing is converted.
        assert_eq!(edit(b"a\nb\r\n", false), b"x\ny\r\n");
    }
}
