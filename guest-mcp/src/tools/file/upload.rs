//! `file_write` in pieces: they are collected in a draft beside the file, which replaces the file at the end. If the filesystem supports it, a draft
//! has no name, so nothing is left of it however the agent ends.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::UPLOAD_MAX;

use super::draft::{Draft, sync};
use super::target::{Target, open_again};
use crate::places::Owner;

/// Timeout between two pieces of an upload.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// The maximum number of open uploads.
const UPLOADS_MAX: usize = 32;
/// The maximum length of an id, in bytes.
const ID_MAX: usize = 64;

/// The open uploads, by the ids that their callers chose.
#[derive(Debug, Default)]
pub(crate) struct Uploads {
    all: Mutex<HashMap<String, Arc<Mutex<Upload>>>>,
}

/// One upload.
#[derive(Debug)]
struct Upload {
    path: PathBuf,
    user: Option<String>,
    draft: Option<Draft>,
    length: u64,
    touched: Instant,
}

/// A piece of an upload.
pub(super) struct Piece {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) user: Option<String>,
    /// Its offset; by default after the previous piece.
    pub(super) offset: Option<u64>,
    pub(super) content: Vec<u8>,
    pub(super) create_parents: bool,
    /// Whether it is the last piece.
    pub(super) commit: bool,
    /// The permission bits, used with the last piece.
    pub(super) mode: Option<u32>,
}

/// The state of an upload after a piece.
pub(super) struct Received {
    /// The number of bytes received.
    pub(super) length: u64,
    /// Whether the file is new; `None` if it is not in place yet.
    pub(super) created: Option<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses an invalid id.
pub(super) fn check_id(id: &str) -> Result<(), ToolError> {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !id.is_empty() && id.len() <= ID_MAX && id.bytes().all(is_letter) {
        return Ok(());
    }
    Err(ToolError::invalid(format!("upload_id must have 1 to {ID_MAX} letters, digits, `.`, `_` or `-`")))
}

impl Uploads {
    /// How long after the last piece [`Self::tidy`] must run to drop an abandoned upload.
    pub(crate) const TIDY_AFTER: Duration = Duration::from_secs(IDLE_MAX.as_secs() + 1);

    /// Drops abandoned uploads.
    pub(crate) fn tidy(&self) {
        // A locked upload is being written.
        let is_wanted = |upload: &Mutex<Upload>| {
            upload.try_lock().map_or(true, |upload| upload.touched.elapsed() < IDLE_MAX)
        };
        lock(&self.all).retain(|_, upload| is_wanted(upload));
    }

    /// Handles a piece; the last one puts the file in place.
    pub(super) fn take(&self, piece: &Piece, owner: Owner) -> Result<Received, ToolError> {
        self.tidy();
        let found = self.find(piece, owner)?;
        let mut upload = lock(&found);
        let taken = upload.take(piece, owner);
        // It is in place, or could not be put there: then a retry starts again instead of hearing that it is done.
        if upload.draft.is_none() {
            // Another upload may have its id by now.
            lock(&self.all).retain(|_, other| !Arc::ptr_eq(other, &found));
        }
        taken
    }

    /// Returns the upload that a piece belongs to; the first piece starts one.
    fn find(&self, piece: &Piece, owner: Owner) -> Result<Arc<Mutex<Upload>>, ToolError> {
        if let Some(upload) = lock(&self.all).get(&piece.id) {
            return Ok(upload.clone());
        }
        if piece.offset.unwrap_or(0) > 0 {
            let text = format!("there is no open upload `{}`", piece.id);
            return Err(ToolError::new(ErrorCode::Changed, text)
                .hint("it was committed, or dropped after 10 minutes without a piece or when the agent restarted: start again at offset 0"));
        }
        let target = Target::find(&piece.path)?;
        if piece.create_parents {
            target.make_parents(owner)?;
        }
        if owner == Owner::Maker {
            target.check_writable()?;
        }
        let draft = Draft::create(target.directory()).map_err(|error| target.fail(error))?;
        let upload = Arc::new(Mutex::new(Upload {
            path: target.path().to_owned(),
            user: piece.user.clone(),
            draft: Some(draft),
            length: 0,
            touched: Instant::now(),
        }));
        let mut all = lock(&self.all);
        if all.len() >= UPLOADS_MAX {
            let text = format!("{UPLOADS_MAX} uploads are open");
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("commit them first"));
        }
        Ok(all.entry(piece.id.clone()).or_insert(upload).clone())
    }
}

impl Upload {
    fn take(&mut self, piece: &Piece, owner: Owner) -> Result<Received, ToolError> {
        let target = Target::find(&piece.path)?;
        if (target.path(), &piece.user) != (self.path.as_path(), &self.user) {
            let text = format!("upload `{}` is for another path or user", piece.id);
            return Err(ToolError::invalid(text).hint("use a different id for each upload"));
        }
        let Some(draft) = &self.draft else {
            let text = format!("upload `{}` is already committed", piece.id);
            return Err(ToolError::new(ErrorCode::Changed, text));
        };
        let offset = piece.offset.unwrap_or(self.length);
        if offset > self.length {
            let text = format!("the piece starts at {offset}, but only {} bytes were received", self.length);
            return Err(ToolError::invalid(text).hint("send the bytes in between first"));
        }
        let end = offset.saturating_add(piece.content.len() as u64);
        if end > UPLOAD_MAX {
            let text = format!("an upload can have at most {UPLOAD_MAX} bytes");
            return Err(ToolError::new(ErrorCode::TooLarge, text));
        }
        let written = (|| {
            // Sending the first piece again restarts the upload.
            if offset == 0 {
                draft.file.set_len(0)?;
            }
            draft.file.write_all_at(&piece.content, offset)
        })();
        written.map_err(|error| target.fail(error))?;
        self.length = if offset == 0 { end } else { self.length.max(end) };
        self.touched = Instant::now();
        if !piece.commit {
            return Ok(Received { length: self.length, created: None });
        }
        let created = target.existing.is_none();
        self.commit(&target, piece.mode, owner)?;
        Ok(Received { length: self.length, created: Some(created) })
    }

    fn commit(&mut self, target: &Target, mode: Option<u32>, owner: Owner) -> Result<(), ToolError> {
        if owner == Owner::Maker {
            target.check_writable()?;
        }
        let Some(draft) = &self.draft else { return Ok(()) };
        let old = target.existing.as_ref().map(|old| (target.path(), old));
        match draft.dress(old, mode, owner) {
            Ok(()) => {}
            // The file has another owner, but this user may write it.
            Err(error) if old.is_some() && error.kind() == io::ErrorKind::PermissionDenied => {
                overwrite(&draft.file, target.path()).map_err(|error| target.fail(error))?;
                self.draft = None;
                return Ok(());
            }
            Err(error) => return Err(target.fail(error)),
        }
        sync(&draft.file).map_err(|error| target.fail(error))?;
        let Some(draft) = self.draft.take() else { return Ok(()) };
        draft.replace(target.name()).map_err(|error| target.fail(error))
    }
}

/// Overwrites a file with a draft's content.
fn overwrite(draft: &File, path: &Path) -> io::Result<()> {
    let mut file = open_again(path)?;
    let mut source = draft;
    io::Seek::rewind(&mut source)?;
    io::copy(&mut source, &mut file)?;
    sync(&file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(path: &Path, content: &[u8], commit: bool) -> Piece {
        Piece {
            id: "up-1".to_owned(),
            path: path.to_owned(),
            user: None,
            offset: None,
            content: content.to_vec(),
            create_parents: false,
            commit,
            mode: None,
        }
    }

    #[test]
    fn a_file_of_a_gibibyte_is_taken_and_no_larger_one() {
        assert_eq!(UPLOAD_MAX, 1_073_741_824);
        let root = tempfile::tempdir().unwrap();
        let (uploads, path) = (Uploads::default(), root.path().join("big"));
        let first = piece(&path, b"first", false);
        assert_eq!(uploads.take(&first, Owner::Maker).unwrap().length, 5);
        // As after all pieces but the last one; the file has a hole in their place.
        let upload = uploads.find(&first, Owner::Maker).unwrap();
        lock(&upload).length = UPLOAD_MAX - 4;
        let Err(error) = uploads.take(&piece(&path, b"12345", true), Owner::Maker) else {
            panic!("it is too large")
        };
        assert_eq!(error.code, ErrorCode::TooLarge);
        let received = uploads.take(&piece(&path, b"1234", true), Owner::Maker).unwrap();
        assert_eq!((received.length, received.created), (UPLOAD_MAX, Some(true)));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), UPLOAD_MAX);
    }

    #[test]
    fn an_upload_that_cannot_be_put_in_place_is_not_told_as_committed() {
        let root = tempfile::tempdir().unwrap();
        let (uploads, path) = (Uploads::default(), root.path().join("file"));
        let first = piece(&path, b"lost", false);
        uploads.take(&first, Owner::Maker).unwrap();
        // A draft whose directory is gone cannot get a name.
        let place = root.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let upload = uploads.find(&first, Owner::Maker).unwrap();
        lock(&upload).draft = Some(Draft::create(&place).unwrap());
        std::fs::remove_dir_all(&place).unwrap();
        assert!(uploads.take(&piece(&path, b"", true), Owner::Maker).is_err());
        let again = uploads.take(&piece(&path, b"whole", true), Owner::Maker).unwrap();
        assert_eq!((again.length, again.created), (5, Some(true)));
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
    }
}
