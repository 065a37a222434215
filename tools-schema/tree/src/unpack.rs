//! Unpacks a tar stream into a directory.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use nexus_schema::tools::tree::{SkipReason, TreeSummary};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use tar::EntryType;

use crate::archive::{Archive, Entry};
use crate::attributes::{Attribute, is_kept};
use crate::chunks::CHUNK;
use crate::destination::{Destination, Facts, settle_name};
use crate::draft::Draft;
use crate::error::{Broken, TreeError, shown};
use crate::report::{Watch, copied, skip};
use crate::unpacking::{Owner, Top, TopIs, Unpacking};

/// The interval of checks of the free disk space, in bytes.
const LOOK_EVERY: u64 = 8 << 20;

/// Unpacks an archive to its end. Each file is either complete or unchanged, even if this fails halfway.
pub fn unpack(
    source: impl BufRead,
    into: OwnedFd,
    how: &mut Unpacking<'_>,
    watch: &mut dyn Watch,
) -> Result<TreeSummary, Broken> {
    let limits = how.limits.clone();
    let mut summary = TreeSummary::default();
    let mut archive = Archive::new(source, &limits);
    let result = Unpacker::new(into, how, watch).and_then(|mut unpacker| {
        let result = unpacker.run(&mut archive, &mut summary);
        // The directories get their final attributes even after a failure.
        result.and(unpacker.destination.finish())
    });
    match result {
        Ok(()) => Ok(summary),
        Err(error) => Err(Broken { error, done: Box::new(summary) }),
    }
}

struct Unpacker<'a, 'b> {
    how: &'a mut Unpacking<'b>,
    watch: &'a mut dyn Watch,
    destination: Destination,
    owner: Option<(u32, u32)>,
    top: Rc<Top>,
    seed: u64,
    /// How many bytes the extended attributes have that are kept.
    attribute_bytes: u64,
    /// The byte count at which the free disk space is checked next.
    look_at: u64,
}

impl<'a, 'b> Unpacker<'a, 'b> {
    fn new(into: OwnedFd, how: &'a mut Unpacking<'b>, watch: &'a mut dyn Watch) -> Result<Self, TreeError> {
        let mut destination = Destination::new(into);
        let stat = destination.stat().map_err(|error| TreeError::file("look at", b".", error))?;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let owner = match how.owner {
            Owner::Same | Owner::Own => None,
            Owner::Given(uid, gid) => Some((uid, gid)),
            Owner::OfDirectory => Some((stat.st_uid, stat.st_gid)).filter(|owner| *owner != own),
        };
        destination.give_to(owner);
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| TreeError::file("get random bytes for", b".", error))?;
        let (top, seed) = (Rc::new(how.top.clone()), u64::from_ne_bytes(seed));
        Ok(Self { how, watch, destination, owner, top, seed, attribute_bytes: 0, look_at: 0 })
    }

    fn run(
        &mut self,
        archive: &mut Archive<'_, impl BufRead>,
        summary: &mut TreeSummary,
    ) -> Result<(), TreeError> {
        let mut entries = 0;
        while let Some(entry) = archive.next()? {
            entries += 1;
            if entries > self.how.limits.entries {
                return Err(TreeError::TooLarge { limit: self.how.limits.entries, what: "entries" });
            }
            self.watch.at(summary.bytes, summary.entries())?;
            self.entry(&entry, archive, summary)?;
        }
        self.watch.at(summary.bytes, summary.entries())
    }

    fn entry(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<'_, impl BufRead>,
        summary: &mut TreeSummary,
    ) -> Result<(), TreeError> {
        let top = self.top.clone();
        let names = self.names(&top, &entry.path, &entry.path)?;
        let owner = match self.how.owner {
            Owner::Same => Some((entry.uid, entry.gid)),
            _ => self.owner,
        };
        let facts = Facts { mode: entry.mode & self.how.modes, owner, mtime: Some(entry.mtime) };
        let Some((last, parents)) = names.split_last() else {
            // The directory itself.
            if entry.kind != EntryType::Directory {
                return Err(TreeError::refused(&entry.path, "it has no name of its own"));
            }
            if self.how.is_new {
                self.destination.describe_root(facts);
            }
            return Ok(());
        };
        if parents.is_empty() {
            self.check_top(entry)?;
        }
        self.destination.go(parents)?;
        let name = OsStr::from_bytes(last);
        let path = names.join(&b'/');
        match entry.kind {
            EntryType::Directory => {
                self.destination.make(&names, facts)?;
                summary.directories += 1;
            }
            EntryType::Regular => {
                self.file(entry, &path, name, &facts, archive, summary)?;
                summary.files += 1;
            }
            EntryType::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(TreeError::refused(&entry.path, "it is a link to nothing"));
                }
                let target = OsStr::from_bytes(&entry.link);
                self.put(&entry.path, name, |destination, temporary| {
                    rustix::fs::symlinkat(target, destination.here(), temporary)?;
                    settle_name(destination.here(), temporary, &facts)
                })?;
                summary.symlinks += 1;
                if leads_out(parents.len(), &entry.link) {
                    summary.links_out += 1;
                }
                if let Some(track) = &mut self.how.track {
                    track.symlink(&path, &entry.link);
                }
            }
            EntryType::Link => {
                self.hard_link(entry, &names, name)?;
                summary.hard_links += 1;
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block if self.how.specials => {
                let (kind, device) = match entry.kind {
                    EntryType::Fifo => (FileType::Fifo, Some((0, 0))),
                    EntryType::Char => (FileType::CharacterDevice, entry.device),
                    _ => (FileType::BlockDevice, entry.device),
                };
                let refuse = || TreeError::refused(&entry.path, "a device has no number");
                let (major, minor) = device.ok_or_else(refuse)?;
                self.put(&entry.path, name, |destination, temporary| {
                    let (mode, device) = (Mode::from_raw_mode(facts.mode), rustix::fs::makedev(major, minor));
                    rustix::fs::mknodat(destination.here(), temporary, kind, mode, device)?;
                    settle_name(destination.here(), temporary, &facts)
                })?;
                summary.specials += 1;
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                skip(summary, &path, SkipReason::Special);
                return Ok(());
            }
            _ => return Err(TreeError::refused(&entry.path, "it is of an unknown kind")),
        }
        copied(summary, &path);
        summary.last = Some(shown(&path));
        Ok(())
    }

    /// Checks what may be at the top of the archive.
    fn check_top(&self, entry: &Entry) -> Result<(), TreeError> {
        let refuse = |why| Err(TreeError::refused(&entry.path, why));
        match (self.how.top_is, entry.kind) {
            (TopIs::Directory, kind) if kind != EntryType::Directory && *self.top != Top::Stripped => {
                refuse("it is not a directory, as it should be")
            }
            (TopIs::Within, EntryType::Symlink) if leads_out(0, &entry.link) => {
                refuse("it is a link that leads elsewhere: copy its target, or follow it")
            }
            _ => Ok(()),
        }
    }

    /// Returns the components of a path, which may not leave the directory.
    fn names<'p>(&self, top: &'p Top, path: &'p [u8], entry: &[u8]) -> Result<Vec<&'p [u8]>, TreeError> {
        let limits = &self.how.limits;
        let refuse = |why| Err(TreeError::refused(entry, why));
        if path.len() > limits.path_bytes {
            return refuse("its path is too long");
        }
        if path.starts_with(b"/") {
            return refuse("its path is absolute");
        }
        if path.contains(&0) {
            return refuse("its path contains a NUL byte");
        }
        let mut names: Vec<&[u8]> =
            path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".").collect();
        if names.iter().any(|name| *name == b"..") {
            return refuse("its path leads out of the directory");
        }
        if names.len() > limits.depth {
            return refuse("it is too deep");
        }
        match (top, names.first_mut()) {
            (Top::Kept, _) => {}
            (Top::Only(only), Some(first)) if *first == only.as_slice() => {}
            (Top::Named(name), Some(first)) => *first = name,
            (Top::Stripped, Some(_)) => drop(names.remove(0)),
            (_, _) => return refuse("it is not in the requested tree"),
        }
        Ok(names)
    }

    fn temporary(&mut self) -> OsString {
        self.seed = self.seed.wrapping_add(1);
        format!(".nexus-{:016x}", self.seed).into()
    }

    /// Creates something under a temporary name in the current directory, then renames it into place.
    fn put(
        &mut self,
        entry: &[u8],
        name: &OsStr,
        make: impl FnOnce(&Destination, &OsStr) -> Result<(), Errno>,
    ) -> Result<(), TreeError> {
        let temporary = self.temporary();
        let made = make(&self.destination, &temporary).and_then(|()| self.rename(&temporary, name));
        made.map_err(|error| self.undo(&temporary, entry, error))
    }

    fn rename(&self, temporary: &OsStr, name: &OsStr) -> Result<(), Errno> {
        let here = self.destination.here();
        rustix::fs::renameat(here, temporary, here, name)
    }

    /// Removes what was created, and returns the failure as an error.
    fn undo(&self, temporary: &OsStr, entry: &[u8], error: Errno) -> TreeError {
        // It may not exist.
        let _ = rustix::fs::unlinkat(self.destination.here(), temporary, AtFlags::empty());
        match error {
            Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY => {
                TreeError::refused(entry, "a directory of that name is in the way")
            }
            error => TreeError::file("write", entry, error),
        }
    }

    fn hard_link(&mut self, entry: &Entry, names: &[&[u8]], name: &OsStr) -> Result<(), TreeError> {
        let top = self.top.clone();
        let target = self.names(&top, &entry.link, &entry.path)?;
        let Some((last, parents)) = target.split_last() else {
            return Err(TreeError::refused(&entry.path, "it is a hard link to nothing"));
        };
        let from = open_beneath(&self.destination, parents).map_err(|_| {
            TreeError::refused(&entry.path, "the target of the hard link is not a file in the tree")
        })?;
        let last = OsStr::from_bytes(last);
        let stat = rustix::fs::statat(&from, last, AtFlags::SYMLINK_NOFOLLOW);
        if stat.map_or(true, |stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory) {
            return Err(TreeError::refused(
                &entry.path,
                "the target of the hard link is not a file in the tree",
            ));
        }
        let temporary = self.temporary();
        let linked = rustix::fs::linkat(&from, last, self.destination.here(), &*temporary, AtFlags::empty())
            .and_then(|()| self.rename(&temporary, name));
        linked.map_err(|error| self.undo(&temporary, &entry.path, error))?;
        // If both names are already links to the same file, renaming does nothing.
        let _ = rustix::fs::unlinkat(self.destination.here(), &*temporary, AtFlags::empty());
        if let Some(track) = &mut self.how.track {
            track.hard_link(&names.join(&b'/'), &target.join(&b'/'));
        }
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        path: &[u8],
        name: &OsStr,
        facts: &Facts,
        archive: &mut Archive<'_, impl BufRead>,
        summary: &mut TreeSummary,
    ) -> Result<(), TreeError> {
        let attributes = self.attributes(entry, path, summary)?;
        let real = entry.sparse.as_ref().map_or(entry.size, |sparse| sparse.real);
        if let Some(track) = &mut self.how.track {
            track.file(path, facts.mode, real, entry.mtime);
        }
        let temporary = self.temporary();
        let draft = match self.how.part.take() {
            Some(part) => Draft::Part(part.begin(path, entry.from)?),
            None if entry.from > 0 => {
                return Err(TreeError::refused(
                    &entry.path,
                    "it is the rest of a file, and nothing of it is here",
                ));
            }
            None => Draft::create(self.destination.here(), &temporary, entry.size)
                .map_err(|error| TreeError::file("write", path, error))?,
        };
        if let Err(error) = self.contents(entry, path, draft.file(), archive, summary) {
            let _ = rustix::fs::unlinkat(self.destination.here(), &*temporary, AtFlags::empty());
            return Err(error);
        }
        let placed = draft.place(self.destination.here(), &temporary, name, facts, &attributes);
        placed.map_err(|error| self.undo(&temporary, &entry.path, error))?;
        if let Some(track) = &mut self.how.track {
            track.file_done();
        }
        Ok(())
    }

    /// Returns the attributes that a file keeps. They take room as its content does.
    fn attributes<'e>(
        &mut self,
        entry: &'e Entry,
        path: &[u8],
        summary: &TreeSummary,
    ) -> Result<Vec<&'e Attribute>, TreeError> {
        // Rights are those of numeric owners, and where set-user-ID bits are not wanted, capabilities are not, either.
        let rights = self.how.owner == Owner::Same && self.how.modes == 0o7777;
        let kept: Vec<_> = entry.attributes.iter().filter(|(name, _)| is_kept(name, rights)).collect();
        if !kept.is_empty() {
            let bytes: usize = kept.iter().map(|(name, value)| name.len() + value.len()).sum();
            self.attribute_bytes += bytes as u64;
            self.check_room(path, summary)?;
        }
        Ok(kept)
    }

    fn contents(
        &mut self,
        entry: &Entry,
        path: &[u8],
        mut file: &File,
        archive: &mut Archive<'_, impl BufRead>,
        summary: &mut TreeSummary,
    ) -> Result<(), TreeError> {
        let Some(sparse) = &entry.sparse else {
            let mut at = 0;
            while at < entry.size {
                let bytes = archive.data(CHUNK as u64)?;
                file.write_all(bytes).map_err(|error| TreeError::file("write", path, error))?;
                let length = self.took(path, at, bytes, summary)?;
                archive.took(length);
                at += length as u64;
            }
            return Ok(());
        };
        for (offset, length) in &sparse.parts {
            let (mut at, end) = (*offset, offset + length);
            while at < end {
                let bytes = archive.data((end - at).min(CHUNK as u64))?;
                file.write_all_at(bytes, at).map_err(|error| TreeError::file("write", path, error))?;
                let length = self.took(path, at, bytes, summary)?;
                archive.took(length);
                at += length as u64;
            }
        }
        file.set_len(sparse.real).map_err(|error| TreeError::file("write", path, error))
    }

    /// Counts written bytes; returns their number.
    fn took(
        &mut self,
        path: &[u8],
        at: u64,
        bytes: &[u8],
        summary: &mut TreeSummary,
    ) -> Result<usize, TreeError> {
        if let Some(track) = &mut self.how.track {
            track.data(at, bytes);
        }
        summary.bytes += bytes.len() as u64;
        self.check_room(path, summary)?;
        self.watch.at(summary.bytes, summary.entries())?;
        Ok(bytes.len())
    }

    /// Fails if more was unpacked than is allowed, or if the disk is nearly full.
    fn check_room(&mut self, path: &[u8], summary: &TreeSummary) -> Result<(), TreeError> {
        let (limits, written) = (&self.how.limits, summary.bytes + self.attribute_bytes);
        if written > limits.bytes {
            return Err(TreeError::TooLarge { limit: limits.bytes, what: "bytes of content" });
        }
        if limits.keep_free > 0 && written >= self.look_at {
            self.look_at = written + LOOK_EVERY;
            let disk = rustix::fs::fstatvfs(self.destination.root());
            if disk.is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) < limits.keep_free) {
                return Err(TreeError::Full { path: shown(path), keep_free: limits.keep_free });
            }
        }
        Ok(())
    }
}

/// Opens a directory below the destination without following links.
fn open_beneath(destination: &Destination, names: &[&[u8]]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::openat(destination.root(), ".", flags, Mode::empty())?;
    for name in names {
        at = rustix::fs::openat(&at, OsStr::from_bytes(name), flags, Mode::empty())?;
    }
    Ok(at)
}

/// Returns whether a link at this depth below the destination points outside of it.
fn leads_out(depth: usize, target: &[u8]) -> bool {
    if target.starts_with(b"/") {
        return true;
    }
    let mut depth = depth;
    for name in target.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." if depth == 0 => return true,
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
    false
}
