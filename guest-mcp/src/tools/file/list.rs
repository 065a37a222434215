//! `file_list`: a tree in the order of its paths, page by page, in memory that depends on the page only.

use std::collections::BinaryHeap;
use std::os::fd::OwnedFd;

use data_encoding::BASE64URL_NOPAD;
use nexus_schema::ToolError;
use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::file::{FileEntry, FileList, FileListOutput, FileListParams, FileType};
use rustix::fs::{CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::stat::{describe, entry_at};
use super::{check_path, failed};
use crate::tools::{Block, Call, Reply, Run, cancelled};

/// Entries of a page when not told otherwise.
const LIMIT_DEFAULT: u32 = 200;
/// Entries of the largest page.
const LIMIT_MAX: u32 = 2000;
/// The deepest listing.
const DEPTH_MAX: u32 = 16;
/// A page ends early once its text has this many bytes.
const TEXT_MAX: usize = OUTPUT_MAX as usize - 6000;

impl Run for FileList {
    async fn run(call: Call, params: FileListParams) -> Result<Reply<FileListOutput>, ToolError> {
        check_path(&params.path)?;
        let within = |name: &str, value: Option<u32>, default: u32, max: u32| match value.unwrap_or(default) {
            value if (1..=max).contains(&value) => Ok(value as usize),
            _ => Err(ToolError::invalid(format!("{name} is 1 to {max}"))),
        };
        let depth = within("depth", params.depth, 1, DEPTH_MAX)?;
        let limit = within("limit", params.limit, LIMIT_DEFAULT, LIMIT_MAX)?;
        let after = params.cursor.as_deref().map(parse_cursor).transpose()?;
        let path = params.path;
        let (output, text) = call.blocking(move |cancel| list(path, depth, limit, after, cancel)).await?;
        let mut header = format!("{} · {} entries", output.path, output.entries.len());
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
    let path = path.map_err(|_| ToolError::invalid("cursor is not one that guest_file_list gave"))?;
    Ok(path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect())
}

fn list(
    path: String,
    depth: usize,
    limit: usize,
    after: Option<Position>,
    cancel: &CancellationToken,
) -> Result<(FileListOutput, String), ToolError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::openat(CWD, path.as_str(), flags, Mode::empty()).map_err(|error| match error {
            Errno::NOTDIR => failed("list", &path, error).hint("call guest_file_read or guest_file_stat"),
            other => failed("list", &path, other),
        })?;
    let mut walk =
        Walk { limit, entries: Vec::new(), text: String::new(), last: Vec::new(), more: false, cancel };
    walk.directory(&directory, &mut Vec::new(), after.as_deref().unwrap_or_default(), depth)
        .map_err(|error| if cancel.is_cancelled() { cancelled() } else { failed("list", &path, error) })?;
    let next_cursor = walk.more.then(|| BASE64URL_NOPAD.encode(&walk.last));
    Ok((FileListOutput { path, entries: walk.entries, next_cursor }, walk.text))
}

struct Walk<'a> {
    limit: usize,
    entries: Vec<FileEntry>,
    text: String,
    /// The path of the last entry.
    last: Vec<u8>,
    more: bool,
    cancel: &'a CancellationToken,
}

impl Walk<'_> {
    fn is_full(&self) -> bool {
        self.entries.len() >= self.limit || self.text.len() >= TEXT_MAX
    }

    /// Lists what comes after `after` in a directory whose own path is `prefix`.
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
        // One more than fits, to know whether there is more.
        let names = self.smallest_names(directory, resume, self.limit - self.entries.len() + 1)?;
        for name in names {
            let length = prefix.len();
            if !prefix.is_empty() {
                prefix.push(b'/');
            }
            prefix.extend_from_slice(&name);
            // The page before ended with this entry or below it.
            let is_resumed = resume == Some(name.as_slice());
            let descend = if is_resumed {
                true
            } else if self.is_full() {
                self.more = true;
                return Ok(());
            } else {
                self.entry(directory, &name, prefix)
            };
            if descend && depth > 1 {
                self.descend(directory, &name, prefix, if is_resumed { deeper } else { &[] }, depth - 1)?;
                if self.more {
                    return Ok(());
                }
            }
            prefix.truncate(length);
        }
        Ok(())
    }

    /// Adds one entry; says whether it is a directory.
    fn entry(&mut self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> bool {
        // What vanished meanwhile is not listed.
        let Ok(entry) = entry_at(directory, name, path) else { return false };
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(&describe(&entry));
        self.last = path.to_vec();
        let is_directory = entry.kind == FileType::Directory;
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
            // Not a directory any more, gone, or not to be read: it is in the list, its content is not.
            Err(_) => Ok(()),
        }
    }

    /// The `count` smallest names of a directory, from `from` on, in order.
    fn smallest_names(
        &self,
        directory: &OwnedFd,
        from: Option<&[u8]>,
        count: usize,
    ) -> Result<Vec<Vec<u8>>, Errno> {
        let mut heap: BinaryHeap<Vec<u8>> = BinaryHeap::new();
        // The entry of the page before takes a place of its own.
        let count = count + usize::from(from.is_some());
        for entry in Dir::read_from(directory)? {
            if self.cancel.is_cancelled() {
                return Err(Errno::CANCELED);
            }
            let entry = match entry {
                Ok(entry) => entry,
                // A directory of /proc whose process is gone.
                Err(Errno::NOENT | Errno::SRCH) => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") || from.is_some_and(|from| name < from) {
                continue;
            }
            if heap.len() < count {
                heap.push(name.to_vec());
            } else if heap.peek().is_some_and(|largest| name < largest.as_slice()) {
                heap.pop();
                heap.push(name.to_vec());
            }
        }
        Ok(heap.into_sorted_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(path: &str, depth: usize, limit: usize, after: Option<&str>) -> (Vec<String>, Option<String>) {
        let after = after.map(|cursor| parse_cursor(cursor).unwrap());
        let (output, _) = list(path.into(), depth, limit, after, &CancellationToken::new()).unwrap();
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
    fn strange_cursors_are_refused() {
        assert!(parse_cursor("!!").is_err());
        assert_eq!(parse_cursor(&BASE64URL_NOPAD.encode(b"a/b")).unwrap(), [b"a", b"b"]);
    }
}
