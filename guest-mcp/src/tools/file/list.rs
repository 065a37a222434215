//! `file_list`: a tree in the order of its paths, page by page. The memory use depends only on the page.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use data_encoding::BASE64URL_NOPAD;
use globset::{GlobBuilder, GlobMatcher};
use nexus_schema::ToolError;
use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::file::{FileEntry, FileList, FileListOutput, FileListParams, FileType};
use rustix::fs::{CWD, Dir, FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::stat::{describe, entry_at};
use super::{failed, parse_path};
use crate::tools::text::{decode, shown};
use crate::tools::{Block, Call, Reply, Run, cancelled};

/// The default number of entries of a page.
const LIMIT_DEFAULT: u32 = 200;
/// The maximum number of entries of a page.
const LIMIT_MAX: u32 = 2000;
/// The maximum depth of a listing.
const DEPTH_MAX: u32 = 16;
/// The maximum depth of a listing of a whole tree.
const WHOLE_DEPTH_MAX: usize = 100;
/// A page ends early once its text has this many bytes.
const TEXT_MAX: usize = OUTPUT_MAX as usize - 6000;

impl Run for FileList {
    async fn run(call: Call, params: FileListParams) -> Result<Reply<FileListOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let within = |name: &str, value: Option<u32>, default: u32, max: u32| match value.unwrap_or(default) {
            value if (1..=max).contains(&value) => Ok(value as usize),
            _ => Err(ToolError::invalid(format!("{name} must be 1 to {max}"))),
        };
        let depth = match (params.recursive, params.depth) {
            (true, None) => WHOLE_DEPTH_MAX,
            (_, depth) => within("depth", depth, 1, DEPTH_MAX)?,
        };
        let default = if params.compact { LIMIT_MAX } else { LIMIT_DEFAULT };
        let limit = within("limit", params.limit, default, LIMIT_MAX)?;
        let wanted = Wanted {
            depth,
            limit,
            glob: params.glob.as_deref().map(parse_glob).transpose()?,
            compact: params.compact,
            after: params.cursor.as_deref().map(parse_cursor).transpose()?,
        };
        let named = params.path;
        let work = move |_, cancel: &_| list(named, &path, wanted, cancel);
        let (output, count, text) = call.blocking_as(params.user, work).await?;
        let mut header = format!("{} · {count} entries", shown(&output.path));
        if output.next_cursor.is_some() {
            header.push_str(" · there are more: call again with cursor = next_cursor");
        }
        let mut reply = Reply::new(header, output);
        if !text.is_empty() {
            reply.blocks.push(Block::talk(text));
        }
        Ok(reply)
    }
}

/// The names from the listed directory down to the last entry of the page before.
type Position = Vec<Vec<u8>>;

fn parse_cursor(cursor: &str) -> Result<Position, ToolError> {
    let path = BASE64URL_NOPAD.decode(cursor.as_bytes());
    let path =
        path.map_err(|_| ToolError::invalid("cursor is not from an earlier list of this directory"))?;
    Ok(path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect())
}

/// Parses a glob. Without a slash it matches names, with one it matches paths.
fn parse_glob(text: &str) -> Result<GlobMatcher, ToolError> {
    let text = text.trim_start_matches('/');
    let anywhere = if text.contains('/') { text.to_owned() } else { format!("**/{text}") };
    let glob = GlobBuilder::new(&anywhere).literal_separator(true).build();
    let glob = glob.map_err(|error| ToolError::invalid(format!("glob: {}", error.kind())))?;
    Ok(glob.compile_matcher())
}

/// The requested entries of a tree.
struct Wanted {
    depth: usize,
    limit: usize,
    glob: Option<GlobMatcher>,
    compact: bool,
    after: Option<Position>,
}

/// Lists a directory; also returns the number of entries and their text.
fn list(
    named: String,
    path: &Path,
    wanted: Wanted,
    cancel: &CancellationToken,
) -> Result<(FileListOutput, usize, String), ToolError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR => failed("list", path, error).hint("call guest_file_read or guest_file_stat"),
        other => failed("list", path, other),
    })?;
    let Wanted { depth, limit, glob, compact, after } = wanted;
    let mut walk = Walk {
        limit,
        glob,
        tree: compact.then(Tree::default),
        count: 0,
        entries: Vec::new(),
        text: String::new(),
        last: Vec::new(),
        more: false,
        cancel,
    };
    walk.directory(&directory, &mut Vec::new(), after.as_deref().unwrap_or_default(), depth)
        .map_err(|error| if cancel.is_cancelled() { cancelled() } else { failed("list", path, error) })?;
    let next_cursor = walk.more.then(|| BASE64URL_NOPAD.encode(&walk.last));
    let tree = walk.tree.map(|tree| tree.text);
    let text = tree.clone().unwrap_or(walk.text);
    Ok((FileListOutput { path: named, entries: walk.entries, tree, next_cursor }, walk.count, text))
}

struct Walk<'a> {
    limit: usize,
    glob: Option<GlobMatcher>,
    /// The text of a compact listing.
    tree: Option<Tree>,
    count: usize,
    entries: Vec<FileEntry>,
    text: String,
    /// The path of the last entry.
    last: Vec<u8>,
    more: bool,
    cancel: &'a CancellationToken,
}

impl Walk<'_> {
    fn is_full(&self) -> bool {
        let length = self.tree.as_ref().map_or(self.text.len(), |tree| tree.escaped);
        self.count >= self.limit || length >= TEXT_MAX
    }

    /// Lists what comes after `after` in the directory whose own path is `prefix`.
    fn directory(
        &mut self,
        directory: &OwnedFd,
        prefix: &mut Vec<u8>,
        after: &[Vec<u8>],
        depth: usize,
    ) -> Result<(), Errno> {
        let (resume, deeper) = match after {
            [] => (None, &[][..]),
            [first, rest @ ..] => (Some(first.as_slice()), rest),
        };
        let mut from = resume.map(|name| (name.to_vec(), true));
        loop {
            // One more than fits, to find out whether there is more.
            let room = self.limit - self.count.min(self.limit) + 1;
            let (names, is_all) = self.smallest_names(directory, prefix, depth, from.as_ref(), room)?;
            for name in &names {
                let length = prefix.len();
                if !prefix.is_empty() {
                    prefix.push(b'/');
                }
                prefix.extend_from_slice(name);
                // The previous page ended with this entry, or below it.
                let is_resumed = resume == Some(name.as_slice());
                let descend = if is_resumed {
                    true
                } else if self.is_full() {
                    self.more = true;
                    return Ok(());
                } else {
                    self.entry(directory, name, prefix)
                };
                if descend && depth > 1 {
                    self.descend(directory, name, prefix, if is_resumed { deeper } else { &[] }, depth - 1)?;
                    if self.more {
                        return Ok(());
                    }
                }
                prefix.truncate(length);
            }
            match names.into_iter().next_back() {
                Some(last) if !is_all => from = Some((last, false)),
                _ => return Ok(()),
            }
        }
    }

    /// Returns whether an entry matches the glob.
    fn is_wanted(&self, path: &[u8]) -> bool {
        self.glob.as_ref().is_none_or(|glob| glob.is_match(OsStr::from_bytes(path)))
    }

    /// Adds an entry if it matches; returns whether it is a directory.
    fn entry(&mut self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> bool {
        // An entry that was deleted meanwhile is not listed.
        let Ok(entry) = entry_at(directory, name, path) else { return false };
        let is_directory = entry.kind == FileType::Directory;
        if !self.is_wanted(path) {
            return is_directory;
        }
        self.count += 1;
        self.last = path.to_vec();
        if let Some(tree) = &mut self.tree {
            tree.add(path, &entry);
            return is_directory;
        }
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(&describe(&entry));
        self.entries.push(entry);
        is_directory
    }

    fn descend(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        prefix: &mut Vec<u8>,
        after: &[Vec<u8>],
        depth: usize,
    ) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(inner) => self.directory(&inner, prefix, after, depth),
            // It is no longer a directory, deleted, or not readable: it is listed, but not its content.
            Err(_) => Ok(()),
        }
    }

    /// Returns the `count` smallest names of a directory that may match, in order, and whether these are all. They start at the name in `from`, or
    /// after it.
    fn smallest_names(
        &self,
        directory: &OwnedFd,
        prefix: &[u8],
        depth: usize,
        from: Option<&(Vec<u8>, bool)>,
        count: usize,
    ) -> Result<(Vec<Vec<u8>>, bool), Errno> {
        let mut heap: BinaryHeap<Vec<u8>> = BinaryHeap::new();
        // The last entry of the previous page needs one more slot.
        let count = count + usize::from(from.is_some());
        let mut is_all = true;
        for entry in Dir::read_from(directory)? {
            if self.cancel.is_cancelled() {
                return Err(Errno::CANCELED);
            }
            let entry = match entry {
                Ok(entry) => entry,
                // A directory of /proc whose process has ended.
                Err(Errno::NOENT | Errno::SRCH) => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name().to_bytes();
            let is_past = |(from, also): &(Vec<u8>, bool)| match name.cmp(from) {
                Ordering::Less => false,
                Ordering::Equal => *also,
                Ordering::Greater => true,
            };
            if matches!(name, b"." | b"..") || !from.is_none_or(is_past) {
                continue;
            }
            let may_lead_on = depth > 1 && matches!(entry.file_type(), Kind::Directory | Kind::Unknown);
            if !may_lead_on && self.glob.is_some() {
                let slash = if prefix.is_empty() { &b""[..] } else { b"/" };
                if !self.is_wanted(&[prefix, slash, name].concat()) {
                    continue;
                }
            }
            if heap.len() < count {
                heap.push(name.to_vec());
                continue;
            }
            is_all = false;
            if heap.peek().is_some_and(|largest| name < largest.as_slice()) {
                heap.pop();
                heap.push(name.to_vec());
            }
        }
        Ok((heap.into_sorted_vec(), is_all))
    }
}

/// The text of a compact listing.
#[derive(Default)]
struct Tree {
    text: String,
    /// Its length as escaped JSON, in bytes.
    escaped: usize,
    /// The parent directories of the last line, and the last entry itself if it is a directory.
    open: Vec<Vec<u8>>,
}

impl Tree {
    /// Adds an entry, after its parents that are not listed yet.
    fn add(&mut self, path: &[u8], entry: &FileEntry) {
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        let Some((name, parents)) = names.split_last() else { return };
        let common = self.open.iter().zip(parents).take_while(|(open, parent)| open == *parent).count();
        self.open.truncate(common);
        for parent in &parents[common..] {
            self.line(parent, "/");
            self.open.push(parent.to_vec());
        }
        match (&entry.kind, &entry.target) {
            (FileType::Directory, _) => {
                self.line(name, "/");
                self.open.push(name.to_vec());
            }
            (_, Some(target)) => self.line(name, &format!(" -> {}", shown(target))),
            _ => self.line(name, ""),
        }
    }

    fn line(&mut self, name: &[u8], end: &str) {
        let line = format!("{:2$}{}{end}", "", shown(&decode(name).0), self.open.len());
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(&line);
        let quotes = line.bytes().filter(|byte| matches!(byte, b'"' | b'\\')).count();
        self.escaped += line.len() + quotes + 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(path: &str, depth: usize, limit: usize, after: Option<&str>) -> (Vec<String>, Option<String>) {
        let after = after.map(|cursor| parse_cursor(cursor).unwrap());
        let wanted = Wanted { depth, limit, glob: None, compact: false, after };
        let (output, ..) = list(path.into(), Path::new(path), wanted, &CancellationToken::new()).unwrap();
        (output.entries.into_iter().map(|entry| entry.path).collect(), output.next_cursor)
    }

    #[test]
    fn pages_of_a_tree_add_up_to_the_whole() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for path in ["a/1", "a/2/x", "a/2/y", "a.txt", "b/3", "c"] {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink("/", root.join("d")).unwrap();
        let root = root.to_str().unwrap();
        let (whole, next) = page(root, 16, 100, None);
        assert_eq!(whole, ["a", "a/1", "a/2", "a/2/x", "a/2/y", "a.txt", "b", "b/3", "c", "d"]);
        assert_eq!(next, None);
        assert_eq!(page(root, 1, 100, None).0, ["a", "a.txt", "b", "c", "d"]);
        for limit in 1..=whole.len() {
            let (mut all, mut cursor) = (Vec::new(), None);
            loop {
                let (mut entries, next) = page(root, 16, limit, cursor.as_deref());
                assert!(entries.len() <= limit && !entries.is_empty());
                all.append(&mut entries);
                cursor = next;
                if cursor.is_none() {
                    break;
                }
            }
            assert_eq!(all, whole, "limit {limit}");
        }
    }

    #[test]
    fn globs_match_names_or_paths() {
        let is_match = |glob: &str, path: &str| parse_glob(glob).unwrap().is_match(path);
        for (glob, path, is) in [
            ("*.rs", "a.rs", true),
            ("*.rs", "a/b/c.rs", true),
            ("*.{c,h}", "x/y.h", true),
            ("src/*.rs", "src/a.rs", true),
            ("src/*.rs", "src/a/b.rs", false),
            ("src/**/*.rs", "src/a/b.rs", true),
            ("/src/*", "src/x", true),
            ("b", "a/b", true),
            ("b", "b/a", false),
        ] {
            assert_eq!(is_match(glob, path), is, "{glob} {path}");
        }
        assert!(parse_glob("a[").is_err());
    }

    #[test]
    fn strange_cursors_are_refused() {
        assert!(parse_cursor("!!").is_err());
        assert_eq!(parse_cursor(&BASE64URL_NOPAD.encode(b"a/b")).unwrap(), [b"a", b"b"]);
    }
}
