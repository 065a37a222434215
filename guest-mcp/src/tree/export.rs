//! Exports the changes to a tree since it was copied in, as a patch.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nexus_schema::tools::tree::{ExportOutput, NotInPatch, TreeChange};
use nexus_tree::{Filter, Source, TreeError, visit};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::manifest::{HASH_MAX, Manifest, ORIGINAL_MAX, Original, hash};
use super::patch::{self, LINK, Lines, Side, git_mode, is_text};

/// The largest patch, in bytes.
const PATCH_MAX: usize = 16 << 20;
/// How many changes that are not in the patch are listed by name.
const NAMED: usize = 50;
/// Git's own directory, which is never part of a patch.
const OF_GIT: &str = ".git";

const NOT_TEXT: &str = "it is not text";
const TOO_LARGE: &str = "it is larger than 1 MiB";
const NOT_KEPT: &str = "its old content was not kept: it was not text, or there was too much";
const NOT_READ: &str = "it cannot be read";
const PATCH_FULL: &str = "the patch has reached 16 MiB";

/// The result for one path.
enum Section {
    /// Its part of the patch.
    Patch(Vec<u8>, Lines),
    /// It changed, but cannot be shown as a patch.
    Not(TreeChange, &'static str),
}

/// A patch, and information about it.
pub(super) struct Patch {
    pub(super) text: Vec<u8>,
    pub(super) facts: ExportOutput,
}

/// Compares a tree with its manifest. `directory` is its parent, or the tree itself.
pub(super) fn export(manifest: &Manifest, directory: &OwnedFd) -> Result<Patch, TreeError> {
    let top = manifest.header.top.as_bytes();
    let mut exclude = manifest.header.exclude.clone();
    exclude.push(OF_GIT.to_owned());
    // New files that are ignored are not part of the patch.
    let filter = Filter::new(&exclude, true)?;
    let is_of_git = |path: &[u8]| path.split(|byte| *byte == b'/').any(|name| name == OF_GIT.as_bytes());
    let kept = manifest.files.iter().filter(|(path, _)| !is_of_git(path));
    let mut originals: BTreeMap<&[u8], &Original> =
        kept.map(|(path, original)| (path.as_slice(), original)).collect();
    let mut sections: BTreeMap<Vec<u8>, Section> = BTreeMap::new();
    // A file that was copied alone is shown by its name.
    let shown = |path: &[u8]| if path.is_empty() { top.to_vec() } else { path.to_vec() };

    let fail = |error: Errno| TreeError::file("open", top, error);
    let own = rustix::io::dup(directory).map_err(fail)?;
    let source = match top.is_empty() {
        true => Some(Source::of_directory(own, b".")),
        false => match Source::at(own, OsStr::from_bytes(top), top) {
            Ok(source) => Some(source),
            Err(TreeError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        },
    };
    if let Some(source) = &source {
        visit(source, &filter, &mut |entry| {
            if matches!(entry.kind, FileType::RegularFile | FileType::Symlink) {
                let file = Found { parent: entry.parent, name: entry.name, stat: entry.stat };
                if let Some(section) =
                    compare(manifest, entry.path, originals.remove(entry.path), &file, &shown)
                {
                    sections.insert(shown(entry.path), section);
                }
            }
            Ok(())
        })?;
    }
    // Files that were not visited were deleted, or are ignored by now.
    for (path, original) in originals {
        let here = source.as_ref().and_then(|source| open_parent(source.directory()?, path));
        let here = here.as_ref().and_then(|(parent, name)| {
            let stat = rustix::fs::statat(parent, *name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            matches!(kind, FileType::RegularFile | FileType::Symlink).then_some((parent.as_fd(), *name, stat))
        });
        let section = match &here {
            Some((parent, name, stat)) => {
                let file = Found { parent: *parent, name, stat };
                compare(manifest, path, Some(original), &file, &shown)
            }
            None => Some(deleted(manifest, &shown(path), original)),
        };
        if let Some(section) = section {
            sections.insert(shown(path), section);
        }
    }
    Ok(put_together(sections))
}

/// A file in its current state.
struct Found<'a> {
    parent: BorrowedFd<'a>,
    name: &'a OsStr,
    stat: &'a Stat,
}

impl Found<'_> {
    fn is_link(&self) -> bool {
        FileType::from_raw_mode(self.stat.st_mode) == FileType::Symlink
    }

    /// Returns the file's mode in git.
    fn mode(&self) -> u32 {
        if self.is_link() { LINK } else { git_mode(self.stat.st_mode) }
    }

    fn open(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(self.parent, self.name, flags, Mode::empty())?.into())
    }

    /// Its content, or the target of a link; `None` if it is too large to show.
    fn content(&self) -> io::Result<Option<Vec<u8>>> {
        if self.is_link() {
            return Ok(Some(rustix::fs::readlinkat(self.parent, self.name, Vec::new())?.into_bytes()));
        }
        if self.stat.st_size.unsigned_abs() > ORIGINAL_MAX {
            return Ok(None);
        }
        let mut content = Vec::new();
        self.open()?.take(ORIGINAL_MAX + 1).read_to_end(&mut content)?;
        Ok(Some(content).filter(|content| content.len() as u64 <= ORIGINAL_MAX))
    }
}

/// Returns the changes of an existing file; `None` if it is unchanged.
fn compare(
    manifest: &Manifest,
    path: &[u8],
    original: Option<&Original>,
    file: &Found<'_>,
    shown: &dyn Fn(&[u8]) -> Vec<u8>,
) -> Option<Section> {
    let change = if original.is_some() { TreeChange::Modified } else { TreeChange::Added };
    let Ok(content) = file.content() else { return Some(Section::Not(change, NOT_READ)) };
    let new = content.as_deref().map(|content| Side { mode: file.mode(), content });
    let Some(original) = original else {
        return Some(match new {
            None => Section::Not(change, TOO_LARGE),
            Some(new) if !is_text(new.content) => Section::Not(change, NOT_TEXT),
            Some(new) => difference(&shown(path), None, Some(new)),
        });
    };
    let mode = original.git_mode();
    let before = match manifest.content(original) {
        Ok(before) => before,
        Err(_) => return Some(Section::Not(change, NOT_READ)),
    };
    if let (Some(before), Some(new)) = (&before, new) {
        let old = Side { mode, content: before };
        if old.mode == new.mode && old.content == new.content {
            return None;
        }
        if !is_text(new.content) {
            return Some(Section::Not(change, NOT_TEXT));
        }
        return Some(difference(&shown(path), Some(old), Some(new)));
    }
    match is_same(original, file, content.as_deref()) {
        Err(_) => Some(Section::Not(change, NOT_READ)),
        Ok(true) if mode == file.mode() => None,
        // A change of only the mode can be shown without the content.
        Ok(true) => {
            let side = |mode| Some(Side { mode, content: b"" });
            Some(difference(&shown(path), side(mode), side(file.mode())))
        }
        Ok(false) if content.is_none() => Some(Section::Not(change, TOO_LARGE)),
        Ok(false) => Some(Section::Not(change, NOT_KEPT)),
    }
}

/// Returns whether a file has the same content as when it was copied in.
fn is_same(original: &Original, file: &Found<'_>, content: Option<&[u8]>) -> io::Result<bool> {
    let size = file.stat.st_size.unsigned_abs();
    if original.link != file.is_link() || original.size != size {
        return Ok(false);
    }
    match (&original.sha256, content) {
        (Some(sha256), Some(content)) => Ok(*sha256 == hash(content)?),
        (Some(sha256), None) => Ok(*sha256 == hash(file.open()?.take(HASH_MAX + 1))?),
        (None, _) => Ok(original.is_of_time(file.stat.st_mtime, file.stat.st_mtime_nsec)),
    }
}

fn deleted(manifest: &Manifest, shown: &[u8], original: &Original) -> Section {
    match manifest.content(original) {
        Ok(Some(content)) => {
            difference(shown, Some(Side { mode: original.git_mode(), content: &content }), None)
        }
        Ok(None) => Section::Not(TreeChange::Deleted, NOT_KEPT),
        Err(_) => Section::Not(TreeChange::Deleted, NOT_READ),
    }
}

fn difference(path: &[u8], old: Option<Side<'_>>, new: Option<Side<'_>>) -> Section {
    let mut text = Vec::new();
    let lines = patch::write(&mut text, path, old, new);
    Section::Patch(text, lines)
}

/// Opens the parent directory of a path below `root` without following links; also returns the name in it.
fn open_parent<'p>(root: &OwnedFd, path: &'p [u8]) -> Option<(OwnedFd, &'p OsStr)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::openat(root, ".", flags, Mode::empty()).ok()?;
    let mut names = path.split(|byte| *byte == b'/');
    let last = names.next_back()?;
    for name in names {
        at = rustix::fs::openat(&at, OsStr::from_bytes(name), flags, Mode::empty()).ok()?;
    }
    Some((at, OsStr::from_bytes(last)))
}

fn put_together(sections: BTreeMap<Vec<u8>, Section>) -> Patch {
    let mut text = Vec::new();
    let mut facts = ExportOutput {
        files: 0,
        added_lines: 0,
        removed_lines: 0,
        patch_bytes: 0,
        whole: true,
        patch_file: None,
        not_in_patch: Vec::new(),
        not_in_patch_count: 0,
    };
    for (path, section) in sections {
        let (change, why) = match section {
            Section::Patch(part, lines) if text.len() + part.len() <= PATCH_MAX => {
                facts.files += 1;
                facts.added_lines += lines.added;
                facts.removed_lines += lines.removed;
                text.extend_from_slice(&part);
                continue;
            }
            Section::Patch(..) => (TreeChange::Modified, PATCH_FULL),
            Section::Not(change, why) => (change, why),
        };
        facts.not_in_patch_count += 1;
        if facts.not_in_patch.len() < NAMED {
            let path = String::from_utf8_lossy(&path).into_owned();
            facts.not_in_patch.push(NotInPatch { path, change, why: why.to_owned() });
        }
    }
    facts.patch_bytes = text.len() as u64;
    Patch { text, facts }
}
