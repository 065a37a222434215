//! Applies the hunks of a patch to one file. A hunk may be at another line than it says, but its lines must match.

use super::Bad;
use super::parse::Hunk;

/// Returns the content with all hunks applied.
pub(super) fn apply(content: &[u8], hunks: &[Hunk]) -> Result<Vec<u8>, Bad> {
    let lines: Vec<&[u8]> = content.split_inclusive(|byte| *byte == b'\n').collect();
    let mut new = Vec::with_capacity(content.len());
    // The first line that no hunk has used yet, and by how many lines the last hunk was off.
    let (mut next, mut moved) = (0, 0_isize);
    for (number, hunk) in hunks.iter().enumerate() {
        let wanted = if hunk.old.is_empty() { hunk.start } else { hunk.start.saturating_sub(1) };
        let expected = wanted.saturating_add_signed(moved);
        let at = find(&lines, next, expected, hunk).ok_or_else(|| refuse(&lines, expected, number, hunk))?;
        moved = at as isize - wanted as isize;
        lines[next..at].iter().for_each(|line| new.extend_from_slice(line));
        hunk.new.iter().for_each(|line| new.extend_from_slice(line));
        next = at + hunk.old.len();
    }
    lines[next..].iter().for_each(|line| new.extend_from_slice(line));
    Ok(new)
}

fn is_at(lines: &[&[u8]], at: usize, hunk: &Hunk) -> bool {
    let there = at.checked_add(hunk.old.len()).and_then(|end| lines.get(at..end));
    there.is_some_and(|there| there.iter().zip(&hunk.old).all(|(line, old)| line == old))
}

/// Returns the position of the hunk's lines: the match nearest to the expected one, from line `from` on.
fn find(lines: &[&[u8]], from: usize, expected: usize, hunk: &Hunk) -> Option<usize> {
    let most = lines.len().checked_sub(hunk.old.len())?;
    if hunk.old.is_empty() {
        // Without lines to match, it can only be at the expected position.
        return (from..=most).contains(&expected).then_some(expected);
    }
    if from > most {
        return None;
    }
    // The header may contain any number.
    let expected = expected.clamp(from, most);
    let near = |distance: usize| [expected.checked_sub(distance), expected.checked_add(distance)];
    (0..=most).flat_map(near).flatten().find(|at| (from..=most).contains(at) && is_at(lines, *at, hunk))
}

/// The maximum number of line comparisons for a better error message.
const COMPARISONS_MAX: usize = 2_000_000;

/// Returns the position where most of the hunk's lines match, the nearest to the expected one among equals.
fn best(lines: &[&[u8]], expected: usize, hunk: &Hunk) -> usize {
    if lines.len().saturating_mul(hunk.old.len()) > COMPARISONS_MAX {
        return expected;
    }
    let right = |at: usize| lines[at..].iter().zip(&hunk.old).filter(|(line, old)| line == old).count();
    let places = (0..lines.len()).map(|at| (right(at), at));
    let best = places.max_by_key(|(right, at)| (*right, std::cmp::Reverse(at.abs_diff(expected))));
    best.filter(|(right, _)| *right > 0).map_or(expected, |(_, at)| at)
}

/// Describes which hunk does not fit, and its first line that differs.
fn refuse(lines: &[&[u8]], expected: usize, number: usize, hunk: &Hunk) -> Bad {
    let expected = best(lines, expected, hunk);
    let line_at = |at: usize| expected.checked_add(at).and_then(|at| lines.get(at));
    let shown = |line: &[u8]| {
        let text: String = String::from_utf8_lossy(line).trim_end().chars().take(120).collect();
        format!("`{text}`")
    };
    let mut what = format!("hunk {} ({}) does not fit", number + 1, hunk.head);
    let differs = hunk.old.iter().enumerate().find(|(at, old)| line_at(*at) != Some(&old.as_slice()));
    if let Some((at, old)) = differs {
        let found = match line_at(at) {
            Some(line) if line.trim_ascii_end() == old.trim_ascii_end() => {
                "the same with another line ending".to_owned()
            }
            Some(line) => shown(line),
            None => "the end of the file".to_owned(),
        };
        what.push_str(&format!(
            ": line {} should be {}, and is {found}",
            expected.saturating_add(at + 1),
            shown(old)
        ));
    }
    Bad { what }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn patched(content: &str, hunks: &str) -> Result<String, String> {
        let files = parse(&format!("--- x\n+++ x\n{hunks}")).unwrap();
        let new = apply(content.as_bytes(), &files[0].hunks);
        new.map(|new| String::from_utf8(new).unwrap()).map_err(|bad| bad.what)
    }

    #[test]
    fn hunks_are_found_where_they_are() {
        let hunk = "@@ -2,3 +2,3 @@\n b\n-c\n+C\n d\n";
        assert_eq!(patched("a\nb\nc\nd\ne\n", hunk).unwrap(), "a\nb\nC\nd\ne\n");
        assert_eq!(
            patched("1\n2\n3\na\nb\nc\nd", "@@ -2,2 +2,2 @@\n b\n-c\n+C\n").unwrap(),
            "1\n2\n3\na\nb\nC\nd"
        );
        // Later hunks are off by as much as the one before.
        let two = "@@ -1,1 +1,2 @@\n a\n+new\n@@ -5,1 +6,1 @@\n-x\n+y\n";
        assert_eq!(patched("0\n0\na\nx\nb\nc\nx\n", two).unwrap(), "0\n0\na\nnew\nx\nb\nc\ny\n");
        assert_eq!(patched("", "@@ -0,0 +1,1 @@\n+a\n").unwrap(), "a\n");
        assert_eq!(patched("a\n", "@@ -1,0 +2,1 @@\n+b\n").unwrap(), "a\nb\n");
        assert_eq!(patched("a", "@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n").unwrap(), "b\n");
        let error = patched("a\nb\nX\nd\n", hunk).unwrap_err();
        assert!(
            error.contains("hunk 1 (@@ -2,3 +2,3 @@)") && error.contains("line 3 should be `c`, and is `X`"),
            "{error}"
        );
        let error = patched("a\nb\n", hunk).unwrap_err();
        assert!(error.contains("the end of the file"), "{error}");
        // A hunk that only fits before an earlier one is refused.
        assert!(patched("a\nb\n", "@@ -2 +2 @@\n-b\n+c\n@@ -3 +3 @@\n-a\n+c\n").is_err());
        assert!(patched("a\n", "@@ -9,0 +9,1 @@\n+b\n").is_err());
    }

    #[test]
    fn line_numbers_as_large_as_may_be_are_harmless() {
        let max = usize::MAX;
        assert!(patched("a\n", &format!("@@ -{max} +1 @@\n-b\n+c\n")).is_err());
        assert!(patched("a\n", &format!("@@ -{max},0 +1 @@\n+c\n")).is_err());
    }
}
