//! Files that get new content together: all of them or none.
//!
//! ```text
//! find ──> prepare all ──> put one in its place after the other ──> done
//!            │ nothing is changed     │ those before are put back
//! ```

use std::io;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use rustix::fs::{AtFlags, CWD};

use super::draft::{Draft, under_free_name};
use super::failed;
use super::read::open_regular;
use super::target::{Ready, Target};
use crate::places::Owner;

/// The largest file that is changed in part, in bytes.
const FILE_MAX: u64 = 16 << 20;
/// The most that all files of one call hold together, in bytes.
const ALL_MAX: u64 = 48 << 20;
/// The most files of one call.
const FILES_MAX: usize = 500;

/// A file and what becomes of it.
pub(super) struct Change {
    /// What the caller calls it.
    pub(super) name: String,
    pub(super) target: Target,
    /// What it holds; empty where it is not there.
    pub(super) old: Vec<u8>,
    /// What it will hold; `None` where it will be gone.
    pub(super) new: Option<Vec<u8>>,
    /// Its permission bits, where they change.
    pub(super) mode: Option<u32>,
}

/// The files of one call, each once.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) all: Vec<Change>,
    bytes: u64,
}

impl Changes {
    /// The change of a file that is there; its old content is its new one at first.
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

    /// The change of a file that is not there yet.
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
                "one call changes at most {FILES_MAX} files, which hold at most {} MiB together",
                ALL_MAX >> 20
            );
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("do it in several calls"));
        }
        self.all.push(change);
        Ok(self.all.len() - 1)
    }

    fn read(&mut self, target: &Target, path: &Path) -> Result<Vec<u8>, ToolError> {
        let file = open_regular("change", path)?;
        let mut old = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut old).map_err(|error| target.fail(error))?;
        if old.len() as u64 > FILE_MAX {
            let text = format!("change {}: it holds more than {} MiB", path.display(), FILE_MAX >> 20);
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
            for first in made {
                remove_empty(&first);
            }
        }
        outcome
    }

    /// Has all new content ready; the directories that were made for it are put in `made`.
    fn prepare(&self, owner: Owner, made: &mut Vec<PathBuf>) -> Result<Vec<Option<Ready>>, ToolError> {
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
                        made.extend(change.target.make_parents(owner)?);
                    }
                    Some(change.target.prepare(new.clone(), change.mode, owner)?)
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
            match change.put(ready) {
                Ok(one) => done.push(one),
                Err(error) => {
                    let mut error = error;
                    for (change, done) in self.all.iter().zip(done).rev() {
                        if let Err(left) = change.put_back(done, owner) {
                            error.message.push_str(&format!("; put back {}: {left}", change.name));
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
    /// The draft is the old file now.
    Exchanged(Draft),
    /// The file is new.
    Placed,
    /// The old content is gone.
    Overwritten,
    /// The file has this name for now.
    Hidden(PathBuf),
}

impl Done {
    fn finish(self) {
        match self {
            Self::Exchanged(draft) => draft.discard(),
            // The name is ours.
            Self::Hidden(path) => drop(std::fs::remove_file(path)),
            Self::Placed | Self::Overwritten => {}
        }
    }
}

impl Change {
    /// Makes it.
    fn put(&self, ready: Option<Ready>) -> Result<Done, ToolError> {
        let (target, name) = (&self.target, self.target.name());
        match ready {
            None => self.hide().map_err(|error| target.fail(error)),
            Some(Ready::InPlace(content)) => self.overwrite(&content),
            Some(Ready::Draft(draft)) if target.existing.is_none() => {
                draft.place(name).map(|()| Done::Placed).map_err(|error| target.fail(error))
            }
            Some(Ready::Draft(mut draft)) => match draft.exchange(name) {
                Ok(()) => Ok(Done::Exchanged(draft)),
                Err(error) => match error.raw_os_error() {
                    // Something is mounted on it.
                    Some(libc::EBUSY) => self.overwrite(self.new.as_deref().unwrap_or_default()),
                    // A filesystem that cannot exchange names.
                    Some(libc::EINVAL | libc::ENOSYS) => {
                        draft.replace(name).map(|()| Done::Overwritten).map_err(|error| target.fail(error))
                    }
                    _ => Err(target.fail(error)),
                },
            },
        }
    }

    fn overwrite(&self, content: &[u8]) -> Result<Done, ToolError> {
        match self.target.overwrite(content, self.mode) {
            Ok(()) => Ok(Done::Overwritten),
            Err(error) => {
                // As far as that goes: the error says what did not.
                let _ = self.target.overwrite(&self.old, None);
                Err(self.target.fail(error))
            }
        }
    }

    fn hide(&self) -> io::Result<Done> {
        let directory = self.target.directory();
        let (own, ()) =
            under_free_name(|own| rustix::fs::renameat(CWD, self.target.path(), CWD, directory.join(own)))?;
        Ok(Done::Hidden(directory.join(own)))
    }

    /// Undoes it.
    fn put_back(&self, done: Done, owner: Owner) -> Result<(), ToolError> {
        let path = self.target.path();
        let fail = |error: io::Error| failed("write", path, error);
        match done {
            Done::Exchanged(mut draft) => draft.exchange(self.target.name()).map_err(fail),
            Done::Placed => std::fs::remove_file(path).map_err(fail),
            Done::Hidden(own) => std::fs::rename(own, path).map_err(fail),
            Done::Overwritten => {
                let mode = self.target.existing.as_ref().map(|old| old.mode);
                Target::find(path)?.put(self.old.clone(), mode, owner)
            }
        }
    }
}

/// Removes a directory that was made, with all directories in it, if there is nothing else.
fn remove_empty(directory: &Path) {
    if let Ok(entries) = std::fs::read_dir(directory) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove_empty(&entry.path());
        }
    }
    // What somebody else put there meanwhile stays.
    let _ = rustix::fs::unlinkat(CWD, directory.as_os_str().as_bytes(), AtFlags::REMOVEDIR);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A set of two files whose second cannot be put in its place.
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
        assert_eq!(made, [root.path().join("made")]);
        // In the way only now: a directory does not change places with a file that is gone.
        std::fs::remove_file(&paths[2]).unwrap();
        let error = changes.commit(ready, Owner::Maker).unwrap_err();
        assert_eq!(error.code, ErrorCode::FileNotFound, "{error}");
        for path in &paths[..2] {
            assert_eq!(std::fs::read_to_string(path).unwrap(), "old\n", "{}", path.display());
        }
        assert!(!new.exists());
        made.iter().for_each(|first| remove_empty(first));
        let left = std::fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, 2, "nothing else is left");
    }
}
