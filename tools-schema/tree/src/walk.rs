//! Walks through a tree: a directory before its contents, names sorted.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nexus_schema::tools::tree::{SkipReason, TreeSummary};
use rustix::fs::{AtFlags, Dir, FileType, Mode, Stat};
use rustix::io::Errno;

use crate::error::TreeError;
use crate::filter::{Filter, IGNORE_FILE, Pattern};
use crate::report::skip;
use crate::source::{DIRECTORY, FILE, Kind, Source};

/// The maximum depth; each level needs an open descriptor.
const DEPTH_MAX: usize = 400;
/// The largest `.gitignore` that is read, in bytes.
const IGNORE_MAX: u64 = 1 << 20;

/// An entry of a tree.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Its path below the top; empty for the top itself.
    pub path: &'a [u8],
    /// Its type.
    pub kind: FileType,
    /// Its attributes.
    pub stat: &'a Stat,
    /// Its parent directory; for the top directory, the directory itself.
    pub parent: BorrowedFd<'a>,
    /// Its name there; empty for the top directory.
    pub name: &'a OsStr,
    /// The path of the same file in the tree, if this is another hard link of it.
    pub linked_to: Option<&'a [u8]>,
}

/// Called for each entry, with the file if it was opened; returns false if it was skipped after all.
pub(crate) type Visit<'a> =
    dyn FnMut(&Entry<'_>, Option<OwnedFd>, &mut TreeSummary) -> Result<bool, TreeError> + 'a;

struct Frame {
    directory: OwnedFd,
    /// The names that are left, and their types as far as the directory tells them.
    names: std::vec::IntoIter<(Vec<u8>, FileType)>,
    /// The length of its path, including a trailing slash.
    length: usize,
    ignore: Option<Pattern>,
}

/// Calls `visit` for everything in a tree that `filter` keeps. Unreadable files are noted in `summary`. With `opens` the files come opened for
/// reading: they need not be looked at by their names before.
pub(crate) fn walk(
    source: &Source,
    filter: &Filter,
    opens: bool,
    summary: &mut TreeSummary,
    visit: &mut Visit<'_>,
) -> Result<(), TreeError> {
    let stat = source.stat()?;
    let directory = match &source.kind {
        Kind::Other { parent, name } => {
            let kind = FileType::from_raw_mode(stat.st_mode);
            let name = OsStr::from_bytes(name);
            let entry = Entry { path: b"", kind, stat: &stat, parent: parent.as_fd(), name, linked_to: None };
            return visit(&entry, None, summary).map(drop);
        }
        Kind::Directory(directory) => directory,
    };
    let fail = |error: Errno| TreeError::file("read", &source.path, error);
    let own = rustix::fs::openat(directory, ".", DIRECTORY, Mode::empty()).map_err(fail)?;
    let top = Entry {
        path: b"",
        kind: FileType::Directory,
        stat: &stat,
        parent: own.as_fd(),
        name: OsStr::new(""),
        linked_to: None,
    };
    visit(&top, None, summary)?;
    let mut walk = Walk { filter, opens, stack: Vec::new(), path: Vec::new(), links: HashMap::new() };
    walk.enter(own).map_err(fail)?;
    while walk.next(summary, visit)? {}
    Ok(())
}

/// Calls `look` for everything readable in a tree that `filter` keeps.
pub fn visit(
    source: &Source,
    filter: &Filter,
    look: &mut dyn FnMut(&Entry<'_>) -> Result<(), TreeError>,
) -> Result<(), TreeError> {
    let mut summary = TreeSummary::default();
    walk(source, filter, false, &mut summary, &mut |entry, _, _| look(entry).map(|()| false))
}

struct Walk<'a> {
    filter: &'a Filter,
    opens: bool,
    stack: Vec<Frame>,
    /// The path of the directory on top of the stack; with a trailing slash unless it is the top.
    path: Vec<u8>,
    /// The first path of each file with several hard links, by device and inode number.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Walk<'_> {
    fn enter(&mut self, directory: OwnedFd) -> Result<(), Errno> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push((name.to_vec(), entry.file_type()));
            }
        }
        names.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let has_ignore = self.filter.gitignore
            && names.binary_search_by(|(name, _)| name.as_slice().cmp(IGNORE_FILE)).is_ok();
        let ignore = if has_ignore { read_ignore(&directory) } else { None };
        let length = self.path.len();
        self.stack.push(Frame { directory, names: names.into_iter(), length, ignore });
        Ok(())
    }

    /// Returns whether the present path is left out, and notes it then.
    fn leaves_out(&self, is_directory: bool, summary: &mut TreeSummary) -> bool {
        let levels =
            self.stack.iter().filter_map(|frame| frame.ignore.as_ref().map(|ignore| (frame.length, ignore)));
        match self.filter.leaves_out(&self.path, is_directory, levels) {
            Some(reason) => {
                skip(summary, &self.path, reason);
                true
            }
            None => false,
        }
    }

    /// Visits the next entry; returns false at the end.
    fn next(&mut self, summary: &mut TreeSummary, visit: &mut Visit<'_>) -> Result<bool, TreeError> {
        let Some(frame) = self.stack.last_mut() else { return Ok(false) };
        let Some((name, kind)) = frame.names.next() else {
            self.stack.pop();
            self.path.truncate(self.stack.last().map_or(0, |frame| frame.length));
            return Ok(true);
        };
        self.path.truncate(frame.length);
        self.path.extend_from_slice(&name);
        let name = OsStr::from_bytes(&name);
        let is_file = self.opens && kind == FileType::RegularFile;
        // What is left out is not opened.
        if is_file && self.leaves_out(false, summary) {
            return Ok(true);
        }
        let Some(frame) = self.stack.last() else { return Ok(false) };
        let (stat, opened) = match look(&frame.directory, name, is_file) {
            Ok(found) => found,
            Err(error) => {
                skip(summary, &self.path, why(error));
                return Ok(true);
            }
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_directory = kind == FileType::Directory;
        if opened.is_none() && self.leaves_out(is_directory, summary) {
            return Ok(true);
        }
        // Opened first: an unreadable directory is skipped as a whole.
        let mut inside = None;
        if is_directory {
            if self.stack.len() >= DEPTH_MAX {
                return Err(TreeError::TooLarge {
                    limit: DEPTH_MAX as u64,
                    what: "directories in each other",
                });
            }
            match rustix::fs::openat(&frame.directory, name, DIRECTORY, Mode::empty()) {
                Ok(directory) => inside = Some(directory),
                Err(error) => {
                    skip(summary, &self.path, why(error));
                    return Ok(true);
                }
            }
        }
        let known = match !is_directory && stat.st_nlink > 1 {
            true => self.links.get(&(stat.st_dev, stat.st_ino)),
            false => None,
        };
        let linked_to = known.map(Vec::as_slice);
        let entry =
            Entry { path: &self.path, kind, stat: &stat, parent: frame.directory.as_fd(), name, linked_to };
        let copied = visit(&entry, opened, summary)?;
        if copied && !is_directory && stat.st_nlink > 1 && known.is_none() {
            self.links.insert((stat.st_dev, stat.st_ino), self.path.clone());
        }
        if let Some(directory) = inside {
            self.path.push(b'/');
            if let Err(error) = self.enter(directory) {
                self.path.pop();
                skip(summary, &self.path, why(error));
            }
        }
        Ok(true)
    }
}

/// Opens what should be a file, and returns its attributes; those alone if it is none.
fn look(directory: &OwnedFd, name: &OsStr, is_file: bool) -> Result<(Stat, Option<OwnedFd>), Errno> {
    if is_file {
        let file = rustix::fs::openat(directory, name, FILE, Mode::empty())?;
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            return Ok((stat, Some(file)));
        }
    }
    Ok((rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?, None))
}

/// Returns the reason why something cannot be read.
pub(crate) fn why(error: Errno) -> SkipReason {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => SkipReason::Changed,
        _ => SkipReason::Unreadable,
    }
}

fn read_ignore(directory: &OwnedFd) -> Option<Pattern> {
    let name = OsStr::from_bytes(IGNORE_FILE);
    let file = File::from(rustix::fs::openat(directory, name, FILE, Mode::empty()).ok()?);
    let mut text = Vec::new();
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    file.take(IGNORE_MAX).read_to_end(&mut text).ok()?;
    Some(Pattern::of_file(&text))
}
