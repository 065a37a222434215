//! Parses a unified diff, as `diff -u` and `git diff` write it.

use super::Bad;

/// The maximum number of files of a patch.
const FILES_MAX: usize = 500;
/// The maximum line counts in a hunk's header.
const LINES_MAX: usize = 10_000_000;

/// The change of one file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FilePatch {
    /// Its old name; `None` if the patch creates it.
    pub(super) old: Option<Vec<u8>>,
    /// Its new name; `None` if the patch deletes it.
    pub(super) new: Option<Vec<u8>>,
    /// Its new permission bits, if the patch has them.
    pub(super) mode: Option<u32>,
    pub(super) hunks: Vec<Hunk>,
}

/// One changed place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hunk {
    /// Its header, for messages.
    pub(super) head: String,
    /// The number of its first line in the old file; 0 if there is none.
    pub(super) start: usize,
    /// The old lines, with line ends.
    pub(super) old: Vec<Vec<u8>>,
    /// The new lines.
    pub(super) new: Vec<Vec<u8>>,
}

/// Parses all files of a patch.
pub(super) fn parse(patch: &str) -> Result<Vec<FilePatch>, Bad> {
    let mut files: Vec<FilePatch> = Vec::new();
    let mut lines = patch.split_inclusive('\n').enumerate().peekable();
    // Whether the last file has a git header whose names have not been read yet.
    let mut is_git = false;
    while let Some((at, line)) = lines.next() {
        let bad = |what: &str| Bad { what: format!("line {} of the patch: {what}", at + 1) };
        let text = line.trim_end_matches(['\n', '\r']);
        if let Some(names) = text.strip_prefix("diff --git ") {
            let (old, new) = git_names(names).unwrap_or_default();
            files.push(FilePatch { old, new, ..FilePatch::default() });
            is_git = true;
        } else if let Some(old) = text.strip_prefix("--- ")
            && let Some((_, next)) = lines.peek()
            && let Some(new) = next.trim_end_matches(['\n', '\r']).strip_prefix("+++ ")
        {
            let (old, new) = (name(old).map_err(|what| bad(&what))?, name(new).map_err(|what| bad(&what))?);
            lines.next();
            if old.is_none() && new.is_none() {
                return Err(bad("both names are /dev/null"));
            }
            match files.last_mut() {
                Some(file) if is_git && file.hunks.is_empty() => (file.old, file.new) = (old, new),
                _ => files.push(FilePatch { old, new, ..FilePatch::default() }),
            }
            is_git = false;
        } else if text.starts_with("@@ ") {
            let file = files.last_mut().ok_or_else(|| bad("a hunk before the first file name"))?;
            let hunk = hunk(text, &mut lines).map_err(|what| bad(&what))?;
            file.hunks.push(hunk);
            is_git = false;
        } else if text.starts_with("GIT binary patch") || text.starts_with("Binary files ") {
            return Err(bad("changes of binary files cannot be applied"));
        } else if is_git && let Some(file) = files.last_mut() {
            extended(text, file).map_err(|what| bad(&what))?;
        }
        if files.len() > FILES_MAX {
            return Err(bad(&format!("more than {FILES_MAX} files")));
        }
    }
    files.retain(|file| file.old.is_some() || file.new.is_some());
    if files.is_empty() {
        return Err(Bad { what: "the patch names no file: it needs `--- ` and `+++ ` lines".to_owned() });
    }
    Ok(files)
}

/// Parses a line of a file's git header.
fn extended(text: &str, file: &mut FilePatch) -> Result<(), String> {
    let mode = |digits: &str| match u32::from_str_radix(digits.trim(), 8) {
        Ok(mode) if mode & 0o170_000 == 0o100_000 => Ok(Some(mode & 0o7777)),
        _ => Err(format!("`{digits}` is not the mode of a regular file; only regular files can be patched")),
    };
    if let Some(digits) = text.strip_prefix("new file mode ") {
        (file.old, file.mode) = (None, mode(digits)?);
    } else if let Some(digits) = text.strip_prefix("new mode ") {
        file.mode = mode(digits)?;
    } else if let Some(digits) = text.strip_prefix("deleted file mode ") {
        mode(digits)?;
        file.new = None;
    } else if let Some(from) = text.strip_prefix("rename from ") {
        file.old = Some([b"a/", &*unquote(from)?].concat());
    } else if let Some(to) = text.strip_prefix("rename to ") {
        file.new = Some([b"b/", &*unquote(to)?].concat());
    } else if text.starts_with("copy from ") || text.starts_with("copy to ") {
        return Err("copies cannot be applied".to_owned());
    }
    Ok(())
}

/// A file's name; `None` for `/dev/null`.
type FileName = Option<Vec<u8>>;

/// Parses the names after `diff --git`: quoted ones, or two that are equal except for their first part.
fn git_names(names: &str) -> Option<(FileName, FileName)> {
    if names.starts_with('"') {
        let end = closing_quote(names)?;
        let (old, new) = (unquote(&names[..=end]).ok()?, unquote(names[end + 1..].trim_start()).ok()?);
        return Some((Some(old), Some(new)));
    }
    let middle = names.len() / 2;
    let (old, new) = (names.get(..middle)?, names.get(middle + 1..)?);
    (old.get(2..) == new.get(2..)).then(|| (Some(old.as_bytes().to_vec()), Some(new.as_bytes().to_vec())))
}

/// Parses the name in a `---` or `+++` line, without the time after it; `None` for /dev/null.
fn name(text: &str) -> Result<Option<Vec<u8>>, String> {
    let text = match text.starts_with('"') {
        true => text,
        false => text.split('\t').next().unwrap_or_default(),
    };
    if text.trim_end() == "/dev/null" {
        return Ok(None);
    }
    let name = unquote(text)?;
    if name.is_empty() { Err("the name is empty".to_owned()) } else { Ok(Some(name)) }
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    text.bytes().enumerate().skip(1).find_map(|(at, byte)| {
        let closes = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        closes.then_some(at)
    })
}

/// Decodes a name. Git quotes names with special bytes, with the escapes of C.
fn unquote(text: &str) -> Result<Vec<u8>, String> {
    if !text.starts_with('"') {
        return Ok(text.as_bytes().to_vec());
    }
    let wrong = || format!("`{text}` is not a quoted name");
    let end = closing_quote(text).ok_or_else(wrong)?;
    let mut bytes = text.as_bytes()[1..end].iter().copied();
    let mut name = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            name.push(byte);
            continue;
        }
        name.push(match bytes.next().ok_or_else(wrong)? {
            b'a' => 7,
            b'b' => 8,
            b't' => b'\t',
            b'n' => b'\n',
            b'v' => 11,
            b'f' => 12,
            b'r' => b'\r',
            first @ b'0'..=b'3' => {
                let mut digit = || match bytes.next() {
                    Some(digit @ b'0'..=b'7') => Ok(digit - b'0'),
                    _ => Err(wrong()),
                };
                (first - b'0') * 64 + digit()? * 8 + digit()?
            }
            other @ (b'"' | b'\\') => other,
            _ => return Err(wrong()),
        });
    }
    Ok(name)
}

/// Parses a hunk's header: its first old line, and its number of old and new lines.
fn head(text: &str) -> Option<(usize, usize, usize)> {
    let ranges = text.strip_prefix("@@ -")?.split_once(" @@")?.0;
    let (old, new) = ranges.split_once(" +")?;
    let range = |text: &str| {
        let (start, count) = text.split_once(',').unwrap_or((text, "1"));
        Some((start.parse::<usize>().ok()?, count.parse::<usize>().ok().filter(|n| *n <= LINES_MAX)?))
    };
    let ((start, old), (_, new)) = (range(old)?, range(new)?);
    Some((start, old, new))
}

fn hunk<'a>(
    text: &str,
    lines: &mut std::iter::Peekable<impl Iterator<Item = (usize, &'a str)>>,
) -> Result<Hunk, String> {
    let (start, mut old_left, mut new_left) =
        head(text).ok_or("a hunk starts with `@@ -LINE,COUNT +LINE,COUNT @@`")?;
    let shown: String = text.chars().take(60).collect();
    let mut hunk = Hunk { head: shown, start, old: Vec::new(), new: Vec::new() };
    // Which sides the last line is on: old, new.
    let mut last = (false, false);
    let whole = |line: &str| {
        let mut bytes = line.as_bytes().to_vec();
        // The last line of a patch may lack its line end.
        if !bytes.ends_with(b"\n") {
            bytes.push(b'\n');
        }
        bytes
    };
    while old_left > 0 || new_left > 0 {
        let Some((at, line)) = lines.next() else {
            return Err(format!("the hunk has {} lines fewer than its header says", old_left.max(new_left)));
        };
        let (is_old, is_new, content) = match line.as_bytes().first() {
            Some(b' ') => (true, true, &line[1..]),
            Some(b'-') => (true, false, &line[1..]),
            Some(b'+') => (false, true, &line[1..]),
            // An empty line whose leading blank was lost in transit.
            Some(b'\n') | None => (true, true, line),
            Some(b'\r') if line == "\r\n" => (true, true, line),
            Some(b'\\') => {
                no_newline(&mut hunk, last);
                continue;
            }
            Some(_) => {
                return Err(format!("line {} is in a hunk but does not begin with ` `, `-` or `+`", at + 1));
            }
        };
        if (is_old && old_left == 0) || (is_new && new_left == 0) {
            return Err(format!("the hunk has more lines than its header says (line {})", at + 1));
        }
        last = (is_old, is_new);
        if is_old {
            hunk.old.push(whole(content));
            old_left -= 1;
        }
        if is_new {
            hunk.new.push(whole(content));
            new_left -= 1;
        }
    }
    if let Some((_, line)) = lines.peek()
        && line.starts_with('\\')
    {
        no_newline(&mut hunk, last);
        lines.next();
    }
    Ok(hunk)
}

/// Handles `\ No newline at end of file`: the line before it has no line end.
fn no_newline(hunk: &mut Hunk, (is_old, is_new): (bool, bool)) {
    for line in [(is_old, &mut hunk.old), (is_new, &mut hunk.new)] {
        if let (true, Some(line)) = (line.0, line.1.last_mut())
            && line.ends_with(b"\n")
        {
            line.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_of_diff_and_of_git_are_read() {
        let patch = "noise\n--- a/x\t2026-01-01\n+++ b/x\n@@ -1,2 +1,2 @@ fn x\n a\n-b\n+c\n\\ No newline at end of file\n\
            diff --git a/new b/new\nnew file mode 100755\nindex 0..1\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+x\n\
            diff --git a/old b/old\ndeleted file mode 100644\n--- a/old\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n\
            diff --git a/one b/two\nsimilarity index 100%\nrename from one\nrename to two\n\
            diff --git a/mode b/mode\nold mode 100644\nnew mode 100755\n\
            diff --git \"a/\\303\\244 \\\"\" \"b/\\303\\244 \\\"\"\nold mode 100644\nnew mode 100755\n";
        let files = parse(patch).unwrap();
        let names = |file: &FilePatch| {
            [&file.old, &file.new]
                .map(|name| name.as_ref().map(|name| String::from_utf8_lossy(name).into_owned()))
        };
        let named = |old: Option<&str>, new: Option<&str>| [old.map(str::to_owned), new.map(str::to_owned)];
        let expected = [
            named(Some("a/x"), Some("b/x")),
            named(None, Some("b/new")),
            named(Some("a/old"), None),
            named(Some("a/one"), Some("b/two")),
            named(Some("a/mode"), Some("b/mode")),
            named(Some("a/\u{e4} \""), Some("b/\u{e4} \"")),
        ];
        assert_eq!(files.iter().map(names).collect::<Vec<_>>(), expected);
        assert_eq!(files[0].hunks[0].old, [b"a\n".to_vec(), b"b\n".to_vec()]);
        assert_eq!(files[0].hunks[0].new, [b"a\n".to_vec(), b"c".to_vec()]);
        assert_eq!((files[1].mode, files[4].mode), (Some(0o755), Some(0o755)));
    }

    #[test]
    fn malformed_patches_are_refused() {
        for bad in [
            "",
            "hello\n",
            "@@ -1 +1 @@\n-a\n+b\n",
            "--- a\n+++ b\n@@ -1 +1\n-a\n+b\n",
            "--- a\n+++ b\n@@ -1,2 +1 @@\n-a\n+b\n",
            "--- a\n+++ b\n@@ -1,1 +1 @@\n-a\n-b\n+b\n",
            "--- a\n+++ b\n@@ -1 +1 @@\n*a\n+b\n",
            "--- a\n+++ b\n@@ -1,99999999999 +1 @@\n-a\n+b\n",
            "--- /dev/null\n+++ /dev/null\n@@ -1 +1 @@\n-a\n+b\n",
            "--- \"a\n+++ b\n@@ -1 +1 @@\n-a\n+b\n",
            "diff --git a/x b/x\nnew file mode 120000\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+x\n",
            "diff --git a/x b/x\nGIT binary patch\nliteral 5\n",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
