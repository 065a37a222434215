//! `file_write` in pieces: they are put together in a draft beside the file, which takes its place at the end. A draft has no name
//! where the filesystem can do that, so whatever ends the agent leaves nothing of it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::UPLOAD_MAX;

use super::draft::{Draft, sync};
use super::target::Target;
use crate::places::Owner;

/// How long an upload waits for its next piece.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// How many may be under way.
const UPLOADS_MAX: usize = 32;
/// The longest id, in bytes.
const ID_MAX: usize = 64;

/// The uploads that are under way, by the ids that their callers gave them.
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

/// A piece of one.
pub(super) struct Piece {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) user: Option<String>,
    /// Where it belongs; at the end of what came before where it does not say.
    pub(super) offset: Option<u64>,
    pub(super) content: Vec<u8>,
    pub(super) create_parents: bool,
    /// Whether it is the last one.
    pub(super) commit: bool,
    /// The permission bits, which count with the last one.
    pub(super) mode: Option<u32>,
}

/// How an upload is after a piece.
pub(super) struct Received {
    /// How many bytes there are.
    pub(super) length: u64,
    /// Whether the file was not there before; `None` where it is not in its place yet.
    pub(super) created: Option<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses an id that is none.
pub(super) fn check_id(id: &str) -> Result<(), ToolError> {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !id.is_empty() && id.len() <= ID_MAX && id.bytes().all(is_letter) {
        return Ok(());
    }
    Err(ToolError::invalid(format!("upload_id has 1 to {ID_MAX} letters, digits, `.`, `_` or `-`")))
}

impl Uploads {
    /// When [`Self::tidy`] finds an upload that nobody went on with after its last piece.
    pub(crate) const TIDY_AFTER: Duration = Duration::from_secs(IDLE_MAX.as_secs() + 1);

    /// Forgets the uploads that nobody went on with.
    pub(crate) fn tidy(&self) {
        // One that is locked is being written.
        let is_wanted = |upload: &Mutex<Upload>| {
            upload.try_lock().map_or(true, |upload| upload.touched.elapsed() < IDLE_MAX)
        };
        lock(&self.all).retain(|_, upload| is_wanted(upload));
    }

    /// Takes a piece; with the last one the file is put in its place.
    pub(super) fn take(&self, piece: &Piece, owner: Owner) -> Result<Received, ToolError> {
        self.tidy();
        let upload = self.find(piece, owner)?;
        let mut upload = lock(&upload);
        let taken = upload.take(piece, owner);
        if piece.commit && taken.is_ok() {
            lock(&self.all).remove(&piece.id);
        }
        taken
    }

    /// The upload that a piece is of; a new one for the first.
    fn find(&self, piece: &Piece, owner: Owner) -> Result<Arc<Mutex<Upload>>, ToolError> {
        if let Some(upload) = lock(&self.all).get(&piece.id) {
            return Ok(upload.clone());
        }
        if piece.offset.unwrap_or(0) > 0 {
            let text = format!("no upload `{}` is under way", piece.id);
            return Err(ToolError::new(ErrorCode::Changed, text)
                .hint("it was committed, or dropped after 10 minutes without a piece or with the agent: begin again at offset 0"));
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
            let text = format!("{UPLOADS_MAX} uploads are under way");
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("commit them first"));
        }
        Ok(all.entry(piece.id.clone()).or_insert(upload).clone())
    }
}

impl Upload {
    fn take(&mut self, piece: &Piece, owner: Owner) -> Result<Received, ToolError> {
        let target = Target::find(&piece.path)?;
        if (target.path(), &piece.user) != (self.path.as_path(), &self.user) {
            let text = format!("upload `{}` is of another path or user", piece.id);
            return Err(ToolError::invalid(text).hint("give each upload an id of its own"));
        }
        let Some(draft) = &self.draft else {
            let text = format!("upload `{}` was committed", piece.id);
            return Err(ToolError::new(ErrorCode::Changed, text));
        };
        let offset = piece.offset.unwrap_or(self.length);
        if offset > self.length {
            let text = format!("a piece at {offset}, and only {} bytes are there", self.length);
            return Err(ToolError::invalid(text).hint("send what is between them first"));
        }
        let end = offset.saturating_add(piece.content.len() as u64);
        if end > UPLOAD_MAX {
            let text = format!("an upload holds at most {UPLOAD_MAX} bytes");
            return Err(ToolError::new(ErrorCode::TooLarge, text));
        }
        let written = (|| {
            // The first piece once more begins anew.
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
            // Another's file, which this user may write.
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

/// Writes a draft over a file.
fn overwrite(draft: &File, path: &Path) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = File::options().write(true).truncate(true).custom_flags(flags).open(path)?;
    let mut source = draft;
    io::Seek::rewind(&mut source)?;
    io::copy(&mut source, &mut file)?;
    sync(&file)
}
