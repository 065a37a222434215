//! All files of a filesystem, by their paths.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use super::compare::Stopped;
use crate::ext4::{Entry, Filesystem, Inode, Kind};

/// How many files are kept of one filesystem, and how many bytes of their paths, which a guest can make long.
const FILES_MAX: usize = 500_000;
const PATHS_MAX: usize = 128 << 20;
/// Where files are that a check of the filesystem found.
const FOUND: &[u8] = b"lost+found";

/// What is compared of a file before anything is read of it. What is equal in all of it is the same file with the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) number: u32,
    pub(super) mode: u16,
    pub(super) owner: (u32, u32),
    pub(super) size: u64,
    pub(super) mtime: (i64, u32),
    ctime: (i64, u32),
    generation: u32,
    pub(super) device: Option<(u32, u32)>,
    pub(super) kind: Kind,
}

impl Facts {
    fn of(inode: &Inode) -> Self {
        Self {
            number: inode.number,
            mode: inode.mode & 0o7777,
            owner: (inode.uid, inode.gid),
            size: inode.size,
            mtime: inode.mtime,
            ctime: inode.ctime,
            generation: inode.generation,
            device: inode.device,
            kind: inode.kind(),
        }
    }
}

/// A filesystem with what is in it.
pub(super) struct Scanned {
    pub(super) filesystem: Filesystem,
    /// By path, without a slash at the beginning.
    pub(super) files: BTreeMap<Vec<u8>, Facts>,
    /// Whether there are more.
    pub(super) is_cut: bool,
}

/// Reads all files of a filesystem that `wants` takes.
pub(super) fn scan(file: &Path, until: Instant, wants: impl Fn(&[u8]) -> bool) -> Result<Scanned, Stopped> {
    let opened = File::open(file).map_err(|source| Stopped::Missing { path: file.to_owned(), source })?;
    let goes_on = || Instant::now() < until;
    let filesystem = Filesystem::open_while(opened, &goes_on)?;
    let (mut files, mut paths) = (BTreeMap::new(), 0_usize);
    let (mut is_cut, mut is_late) = (false, false);
    filesystem.walk_while(&goes_on, &mut |entry: &Entry<'_>| {
        if !goes_on() {
            is_late = true;
            return ControlFlow::Break(());
        }
        if entry.path != FOUND && wants(entry.path) {
            paths = paths.saturating_add(entry.path.len());
            if files.len() >= FILES_MAX || paths > PATHS_MAX {
                is_cut = true;
                return ControlFlow::Break(());
            }
            files.insert(entry.path.to_vec(), Facts::of(entry.inode));
        }
        ControlFlow::Continue(())
    })?;
    if is_late { Err(Stopped::Late) } else { Ok(Scanned { filesystem, files, is_cut }) }
}
