//! Changes several files together: all of them or none.
//!
//! ```text
//! find ──> prepare all ──> replace one after the other ──> done
//!            │ fails: no change       │ fails: the earlier ones are restored
//! ```

use std::io;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::draft::{Draft, is_beneath, under_free_name};
use super::read::open_regular;
use super::target::{Ready, Target};
use super::{failed, open_parent, refused};
use crate::places::{Made, Owner, make_directories_beneath};

/// The largest file that can be changed in part, in bytes.
const FILE_MAX: u64 = 16 << 20;
/// The maximum total size of the files of one call, in bytes.
const ALL_MAX: u64 = 48 << 20;
/// The maximum number of files of one call.
const FILES_MAX: usize = 500;

/// A file and its new state.
pub(super) struct Change {
    /// The caller's name for it.
    pub(super) name: String,
    pub(super) target: Target,
    /// Its content now; empty if it does not exist.
    pub(super) old: Vec<u8>,
    /// Its new content; `None` deletes it.
    pub(super) new: Option<Vec<u8>>,
    /// Its new permission bits, if they change.
    pub(super) mode: Option<u32>,
}

/// The files of one call, each listed once.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) all: Vec<Change>,
    bytes: u64,
    /// Nothing is written or deleted outside of it.
    root: Option<PathBuf>,
}

impl Changes {
    /// Returns no changes yet, of files in a directory whose path has no links.
    pub(super) fn within(root: &Path) -> Self {
        Self { root: Some(root.to_owned()), ..Self::default() }
    }

    /// Returns the change of an existing file. Its new content is initially the old one.
    pub(super) fn of(&mut self, name: &str, path: &Path) -> Result<&mut Change, ToolError> {
        let target = Target::find(path)?;
        let known = self.all.iter().position(|change| change.target.is_same(&target));
        let at = match known {
            Some(at) => at,
            None => {
                let old = self.read(&target, path)?;
                self.add(Change { name: name.to_owned(), target, new: Some(old.clone()), old, mode: None })?
            }
        };
        Ok(&mut self.all[at])
    }

    /// Adds the change of a file that does not exist yet.
    pub(super) fn create(
        &mut self,
        name: &str,
        target: Target,
        new: Vec<u8>,
        mode: Option<u32>,
    ) -> Result<(), ToolError> {
        self.bytes += new.len() as u64;
        let change = Change { name: name.to_owned(), target, old: Vec::new(), new: Some(new), mode };
        self.add(change).map(drop)
    }

    fn add(&mut self, change: Change) -> Result<usize, ToolError> {
        if self.all.len() >= FILES_MAX || self.bytes > ALL_MAX {
            let text = format!(
                "one call changes at most {FILES_MAX} files with at most {} MiB in total",
                ALL_MAX >> 20
            );
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("split it into several calls"));
        }
        self.all.push(change);
        Ok(self.all.len() - 1)
    }

    fn read(&mut self, target: &Target, path: &Path) -> Result<Vec<u8>, ToolError> {
        let file = open_regular("change", path)?;
        let mut old = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut old).map_err(|error| target.fail(error))?;
        if old.len() as u64 > FILE_MAX {
            let text = format!("change {}: it is larger than {} MiB", path.display(), FILE_MAX >> 20);
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("use sed with guest_run_command"));
        }
        self.bytes += old.len() as u64;
        Ok(old)
    }

    /// Makes all changes, or none.
    pub(super) fn apply(&self, owner: Owner) -> Result<(), ToolError> {
        let mut made = Vec::new();
        let outcome = self.prepare(owner, &mut made).and_then(|ready| self.commit(ready, owner));
        if outcome.is_err() {
            made.iter().rev().for_each(Made::remove);
        }
        outcome
    }

    /// Prepares all new content; adds the directories that it creates to `made`.
    fn prepare(&self, owner: Owner, made: &mut Vec<Made>) -> Result<Vec<Option<Ready>>, ToolError> {
        let root = self.root.as_deref();
        let mut ready = Vec::with_capacity(self.all.len());
        for change in &self.all {
            ready.push(match &change.new {
                None => {
                    if owner == Owner::Maker {
                        change.target.check_writable()?;
                    }
                    None
                }
                Some(new) => {
                    if change.target.existing.is_none() {
                        made.push(change.make_parents(root, owner)?);
                    }
                    let directory = change.open_directory(root)?;
                    let ready = change.target.prepare_in(directory, new.clone(), change.mode, owner)?;
                    Some(ready)
                }
            });
        }
        for change in &self.all {
            change.target.check_unchanged()?;
        }
        Ok(ready)
    }

    fn commit(&self, ready: Vec<Option<Ready>>, owner: Owner) -> Result<(), ToolError> {
        let mut done: Vec<Done> = Vec::with_capacity(ready.len());
        for (change, ready) in self.all.iter().zip(ready) {
            match change.put(ready, self.root.as_deref()) {
                Ok(one) => done.push(one),
                Err(error) => {
                    let mut error = error;
                    for (change, done) in self.all.iter().zip(done).rev() {
                        if let Err(left) = change.put_back(done, owner, self.root.as_deref()) {
                            error.message.push_str(&format!("; cannot restore {}: {left}", change.name));
                        }
                    }
                    return Err(error);
                }
            }
        }
        for one in done {
            one.finish();
        }
        Ok(())
    }
}

/// A change that was made and can be undone.
enum Done {
    /// The draft now has the old file.
    Exchanged(Draft),
    /// The file is new, and in place.
    Placed,
    /// The old content was overwritten.
    Overwritten,
    /// The file to be deleted has this name in its directory.
    Hidden(OwnedFd, String),
}

impl Done {
    fn finish(self) {
        match self {
            Self::Exchanged(draft) => draft.discard(),
            // The file under this name is the deleted one.
            Self::Hidden(directory, own) => {
                let _ = rustix::fs::unlinkat(&directory, own.as_str(), AtFlags::empty());
            }
            Self::Placed | Self::Overwritten => {}
        }
    }
}

impl Change {
    /// Makes the change.
    fn put(&self, ready: Option<Ready>, root: Option<&Path>) -> Result<Done, ToolError> {
        let (target, name) = (&self.target, self.target.name());
        match ready {
            None => self.hide(root),
            Some(Ready::InPlace(content)) => self.overwrite(&content, root),
            Some(Ready::Draft(draft)) if target.existing.is_none() => {
                draft.place(name).map(|()| Done::Placed).map_err(|error| target.fail(error))
            }
            Some(Ready::Draft(mut draft)) => match draft.exchange(name) {
                Ok(()) => Ok(Done::Exchanged(draft)),
                Err(error) => match error.raw_os_error() {
                    // The file is a mount point.
                    Some(libc::EBUSY) => self.overwrite(self.new.as_deref().unwrap_or_default(), root),
                    // The filesystem cannot exchange names.
                    Some(libc::EINVAL | libc::ENOSYS) => {
                        draft.replace(name).map(|()| Done::Overwritten).map_err(|error| target.fail(error))
                    }
                    _ => Err(target.fail(error)),
                },
            },
        }
    }

    fn overwrite(&self, content: &[u8], root: Option<&Path>) -> Result<Done, ToolError> {
        let directory = self.open_directory(root)?;
        match self.target.overwrite_in(&directory, content, self.mode) {
            Ok(()) => Ok(Done::Overwritten),
            Err(error) => {
                // If this fails too, the first error is reported.
                let _ = self.target.overwrite_in(&directory, &self.old, None);
                Err(self.target.fail(error))
            }
        }
    }

    /// Creates the missing parent directories of the file, none of them outside of `root`.
    fn make_parents(&self, root: Option<&Path>, owner: Owner) -> Result<Made, ToolError> {
        let directory = self.target.directory();
        let made = make_directories_beneath(root.unwrap_or(Path::new("/")), directory, owner);
        made.map_err(|error| match error {
            Errno::XDEV => leads_out(self.target.path()),
            error => failed("create the directory", directory, error),
        })
    }

    /// Opens the directory of the file; refuses one that is not in `root` or below any more.
    fn open_directory(&self, root: Option<&Path>) -> Result<OwnedFd, ToolError> {
        let directory = open_parent(self.target.directory()).map_err(|error| self.target.fail(error))?;
        if root.is_some_and(|root| !is_beneath(&directory, root)) {
            return Err(leads_out(self.target.path()));
        }
        Ok(directory)
    }

    fn hide(&self, root: Option<&Path>) -> Result<Done, ToolError> {
        let directory = self.open_directory(root)?;
        let name = self.target.name();
        let (own, ()) = under_free_name(|own| rustix::fs::renameat(&directory, name, &directory, own))
            .map_err(|error| self.target.fail(error))?;
        Ok(Done::Hidden(directory, own))
    }

    /// Reverts the change.
    fn put_back(&self, done: Done, owner: Owner, root: Option<&Path>) -> Result<(), ToolError> {
        let path = self.target.path();
        let fail = |error: io::Error| failed("write", path, error);
        match done {
            Done::Exchanged(mut draft) => draft.exchange(self.target.name()).map_err(fail),
            Done::Placed => {
                let directory = self.open_directory(root)?;
                rustix::fs::unlinkat(&directory, self.target.name(), AtFlags::empty())
                    .map_err(|error| fail(error.into()))
            }
            Done::Hidden(directory, own) => {
                rustix::fs::renameat(&directory, own.as_str(), &directory, self.target.name())
                    .map_err(|error| fail(error.into()))
            }
            Done::Overwritten => {
                let mode = self.target.existing.as_ref().map(|old| old.mode);
                if root.is_some() {
                    let directory = self.open_directory(root)?;
                    return self.target.overwrite_in(&directory, &self.old, mode).map_err(fail);
                }
                Target::find(path)?.put(self.old.clone(), mode, owner)
            }
        }
    }
}

/// Returns the error for a directory that was replaced by a link after it was looked at.
fn leads_out(path: &Path) -> ToolError {
    refused("write", path, "a symbolic link leads out of the given directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last of several changes fails.
    #[test]
    fn what_was_done_is_undone() {
        let root = tempfile::tempdir().unwrap();
        let paths = ["exchanged", "hidden", "last"].map(|name| root.path().join(name));
        for path in &paths {
            std::fs::write(path, "old\n").unwrap();
        }
        let mut changes = Changes::default();
        changes.of("a", &paths[0]).unwrap().new = Some(b"new\n".to_vec());
        changes.of("b", &paths[1]).unwrap().new = None;
        let new = root.path().join("made/new");
        let target = Target::find(&new).unwrap();
        changes.create("c", target, b"new\n".to_vec(), None).unwrap();
        changes.of("d", &paths[2]).unwrap().new = Some(b"new\n".to_vec());
        let mut made = Vec::new();
        let ready = changes.prepare(Owner::Maker, &mut made).unwrap();
        assert!(root.path().join("made").is_dir());
        // Created only now: a directory cannot be exchanged with a deleted file.
        std::fs::remove_file(&paths[2]).unwrap();
        let error = changes.commit(ready, Owner::Maker).unwrap_err();
        assert_eq!(error.code, ErrorCode::FileNotFound, "{error}");
        for path in &paths[..2] {
            assert_eq!(std::fs::read_to_string(path).unwrap(), "old\n", "{}", path.display());
        }
        assert!(!new.exists());
        made.iter().rev().for_each(Made::remove);
        let left = std::fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, 2, "nothing else is left");
    }

    /// As a program does that wants the agent to write what it may not write itself.
    #[test]
    fn a_directory_that_becomes_a_link_does_not_lead_out() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        let (root, outside) = (place.join("root"), place.join("outside"));
        for directory in [root.join("src"), outside.clone()] {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("old"), "old\n").unwrap();
        }
        let mut creates = Changes::within(&root);
        let target = Target::find(&root.join("src/new")).unwrap();
        creates.create("new", target, b"new\n".to_vec(), None).unwrap();
        let overwrite = || vec![Some(Ready::InPlace(b"new\n".to_vec()))];
        let mut overwrites = Changes::within(&root);
        overwrites.of("old", &root.join("src/old")).unwrap().new = Some(b"new\n".to_vec());
        overwrites.commit(overwrite(), Owner::Maker).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("src/old")).unwrap(), "new\n");
        let mut deletes = Changes::within(&root);
        deletes.of("old", &root.join("src/old")).unwrap().new = None;
        std::fs::rename(root.join("src"), root.join("moved")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("src")).unwrap();

        assert_eq!(creates.apply(Owner::Maker).unwrap_err().code, ErrorCode::FileRefused);
        // It becomes a link just before it is used.
        assert_eq!(deletes.commit(vec![None], Owner::Maker).unwrap_err().code, ErrorCode::FileRefused);
        assert_eq!(overwrites.commit(overwrite(), Owner::Maker).unwrap_err().code, ErrorCode::FileRefused);
        assert!(overwrites.all[0].put_back(Done::Overwritten, Owner::Maker, Some(&root)).is_err());
        assert!(creates.all[0].put_back(Done::Placed, Owner::Maker, Some(&root)).is_err());
        assert_eq!(std::fs::read_to_string(outside.join("old")).unwrap(), "old\n");
        let left: Vec<_> =
            std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["old"]);
    }
}
