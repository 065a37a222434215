//! Compares the files of two filesystems.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nexus_schema::tools::checkpoint::{ChangedPath, PathChange};

use super::content::{self, Place};
use super::scan::{Facts, Scanned, scan};
use super::{DIFF_BYTES, FILES_BYTES, Wish, shown};
use crate::ext4::{Kind, ReadError};

/// How many bytes are compared of files that have the same size and other times.
const COMPARED_MAX: u64 = 1 << 30;
/// What a row of the list takes beside its path, in bytes.
const ROW_BYTES: usize = 120;
const NOTES_MAX: usize = 20;

/// Why a comparison ended.
#[derive(Debug)]
pub(super) enum Stopped {
    /// Its time is over.
    Late,
    /// A file with a drive cannot be opened.
    Missing { path: PathBuf, source: std::io::Error },
    /// A filesystem cannot be read.
    Read(ReadError),
}

impl From<ReadError> for Stopped {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Stopped => Self::Late,
            error => Self::Read(error),
        }
    }
}

/// What was found until now.
#[derive(Debug)]
pub(super) struct Differences<'w> {
    wish: &'w Wish,
    until: Instant,
    pub(super) added: u64,
    pub(super) changed: u64,
    pub(super) removed: u64,
    pub(super) files: Vec<ChangedPath>,
    pub(super) is_cut: bool,
    pub(super) diff: String,
    pub(super) diff_is_cut: bool,
    pub(super) notes: Vec<String>,
    /// The bytes of the list.
    listed: usize,
    /// How many bytes may still be compared.
    left: u64,
    /// How many files were taken for changed by their times.
    unread: u64,
}

impl<'w> Differences<'w> {
    pub(super) fn new(wish: &'w Wish, until: Instant) -> Self {
        Self {
            wish,
            until,
            added: 0,
            changed: 0,
            removed: 0,
            files: Vec::new(),
            is_cut: false,
            diff: String::new(),
            diff_is_cut: false,
            notes: Vec::new(),
            listed: 0,
            left: COMPARED_MAX,
            unread: 0,
        }
    }

    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(note);
        }
    }

    /// Compares two filesystems whose files are at `place`.
    pub(super) fn compare(&mut self, place: &str, old: &Path, new: &Path) -> Result<(), Stopped> {
        let wished = self.wish.path.as_bytes();
        // Of `PLACE/path`, without writing that down for each file.
        let wants = |path: &[u8]| {
            let Some(rest) = wished.strip_prefix(place.as_bytes()) else {
                let above = place.as_bytes().strip_prefix(wished);
                return wished.is_empty() || above.is_some_and(|rest| rest.first() == Some(&b'/'));
            };
            let Some(rest) = rest.strip_prefix(b"/") else { return rest.is_empty() };
            let below = path.strip_prefix(rest);
            below.is_some_and(|below| below.is_empty() || below.first() == Some(&b'/'))
        };
        let old = scan(old, self.until, wants)?;
        let new = scan(new, self.until, wants)?;
        if old.is_cut || new.is_cut {
            let limit = old.files.len().max(new.files.len());
            self.note(format!(
                "not compared: {} has more than {limit} files; narrow it with path",
                root(place)
            ));
            return Ok(());
        }
        for (path, facts) in merged(&old.files, &new.files) {
            if Instant::now() >= self.until {
                return Err(Stopped::Late);
            }
            self.one(place, path, facts, (&old, &new))?;
        }
        Ok(())
    }

    /// Says what only its end shows.
    pub(super) fn finish(&mut self) {
        if self.unread > 0 {
            let unread = self.unread;
            self.note(format!(
                "{unread} large files of the same size and other times count as changed; their bytes were not compared"
            ));
        }
    }

    fn one(
        &mut self,
        place: &str,
        path: &[u8],
        facts: (Option<Facts>, Option<Facts>),
        (old, new): (&Scanned, &Scanned),
    ) -> Result<(), Stopped> {
        let before = facts.0.map(|facts| Place { filesystem: &old.filesystem, facts });
        let after = facts.1.map(|facts| Place { filesystem: &new.filesystem, facts });
        let (change, what) = match (before, after) {
            (Some(before), Some(after)) => {
                let what = self.what(before, after)?;
                if what.is_empty() {
                    return Ok(());
                }
                (PathChange::Changed, what)
            }
            (None, _) => (PathChange::Added, Vec::new()),
            (_, None) => (PathChange::Removed, Vec::new()),
        };
        match change {
            PathChange::Added => self.added += 1,
            PathChange::Changed => self.changed += 1,
            PathChange::Removed => self.removed += 1,
        }
        let path = format!("{}/{}", shown::path(place.as_bytes()), shown::path(path));
        let bytes = path.len() + ROW_BYTES;
        if self.files.len() >= self.wish.limit || self.listed + bytes > FILES_BYTES {
            self.is_cut = true;
            return Ok(());
        }
        self.listed += bytes;
        let is_file = |place: &Place<'_>| place.facts.kind == Kind::File;
        let size = |place: Option<Place<'_>>| place.filter(is_file).map(|place| place.facts.size);
        let has_other_content = what.is_empty() || what.contains(&"content") || what.contains(&"type");
        if self.wish.text && has_other_content && before.iter().chain(&after).all(is_file) {
            self.show(&path, before, after)?;
        }
        let kind = after.or(before).map_or(Kind::Other, |place| place.facts.kind);
        self.files.push(ChangedPath {
            change,
            path,
            kind: name_of(kind).to_owned(),
            old_bytes: size(before),
            new_bytes: size(after),
            what: what.into_iter().map(str::to_owned).collect(),
        });
        Ok(())
    }

    fn show(&mut self, path: &str, old: Option<Place<'_>>, new: Option<Place<'_>>) -> Result<(), Stopped> {
        let Some(text) = content::diff(path, old, new)? else { return Ok(()) };
        if self.diff.len() + text.len() > DIFF_BYTES {
            self.diff_is_cut = true;
        } else {
            self.diff.push_str(&text);
        }
        Ok(())
    }

    /// What of a file changed.
    fn what(&mut self, old: Place<'_>, new: Place<'_>) -> Result<Vec<&'static str>, Stopped> {
        if old.facts == new.facts {
            return Ok(Vec::new());
        }
        let (was, is) = (old.facts, new.facts);
        if was.kind != is.kind {
            return Ok(vec!["type"]);
        }
        let mut what = Vec::new();
        match is.kind {
            Kind::File if was.size != is.size || !self.is_same(old, new)? => what.push("content"),
            Kind::Symlink => {
                let target = |place: Place<'_>| {
                    place.filesystem.link_target(&place.filesystem.inode(place.facts.number)?)
                };
                if target(old)? != target(new)? {
                    what.push("target");
                }
            }
            Kind::CharDevice | Kind::BlockDevice if was.device != is.device => what.push("device"),
            _ => {}
        }
        if was.mode != is.mode {
            what.push("mode");
        }
        if was.owner != is.owner {
            what.push("owner");
        }
        let xattrs = |place: Place<'_>| -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ReadError> {
            let inode = place.filesystem.inode(place.facts.number)?;
            Ok(place.filesystem.xattrs(&inode)?.into_iter().collect())
        };
        if xattrs(old)? != xattrs(new)? {
            what.push("attributes");
        }
        // The time of a directory says only that something in it came or went, which is listed itself.
        if what.is_empty() && is.kind != Kind::Directory && was.mtime != is.mtime {
            what.push("time");
        }
        Ok(what)
    }

    /// Whether two files of the same size have the same content. Those that are too large to be read are told by their times.
    fn is_same(&mut self, old: Place<'_>, new: Place<'_>) -> Result<bool, Stopped> {
        if old.facts.size > self.left {
            let is_same = old.facts.mtime == new.facts.mtime;
            self.unread += u64::from(!is_same);
            return Ok(is_same);
        }
        self.left -= old.facts.size;
        Ok(content::is_same(old, new)?)
    }
}

fn root(place: &str) -> String {
    if place.is_empty() { "/".to_owned() } else { shown::path(place.as_bytes()) }
}

/// What is in one of two lists or in both, in the order of the paths.
fn merged<'a>(
    old: &'a BTreeMap<Vec<u8>, Facts>,
    new: &'a BTreeMap<Vec<u8>, Facts>,
) -> impl Iterator<Item = (&'a [u8], (Option<Facts>, Option<Facts>))> {
    let (mut left, mut right) = (old.iter().peekable(), new.iter().peekable());
    std::iter::from_fn(move || {
        let path: &'a [u8] = match (left.peek(), right.peek()) {
            (Some((old, _)), Some((new, _))) => (*old).min(*new).as_slice(),
            (Some((path, _)), None) | (None, Some((path, _))) => (*path).as_slice(),
            (None, None) => return None,
        };
        let old = left.next_if(|(found, _)| found.as_slice() == path).map(|(_, facts)| *facts);
        let new = right.next_if(|(found, _)| found.as_slice() == path).map(|(_, facts)| *facts);
        Some((path, (old, new)))
    })
}

fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink",
        Kind::CharDevice | Kind::BlockDevice => "device",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Other => "other",
    }
}
