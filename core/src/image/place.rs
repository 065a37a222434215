//! The place where an image is made: its directory, and a scratch directory in it.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{ImageError, ROOTFS};
use crate::drive::{self, DriveError};
use crate::ext4::Tools;
use crate::os::disk::allocated_bytes;
use crate::os::failpoint;
use crate::progress::Progress;

/// The prefix of scratch directories.
const SCRATCH: &str = ".build-";
/// How much is hashed between two checks for cancellation.
const CHUNK: usize = 1 << 20;

/// Fails if fewer than `needed` bytes are free in `directory`.
pub(crate) fn check_room(directory: &Path, needed: u64) -> Result<(), ImageError> {
    let free = crate::os::disk::free_bytes(directory).map_err(|e| ImageError::write(directory, e))?;
    if free < needed { Err(ImageError::full(directory, needed)) } else { Ok(()) }
}

/// A place for one image. Everything made here is removed when it is dropped, unless it is kept.
#[derive(Debug)]
pub(crate) struct Place {
    into: PathBuf,
    made: bool,
    kept: bool,
    scratch: Option<TempDir>,
}

/// An image's file under its name.
#[derive(Debug)]
pub(crate) struct FinishedFile {
    pub(crate) path: PathBuf,
    pub(crate) size: ByteSize,
    pub(crate) used_bytes: u64,
    pub(crate) sha256: String,
}

impl Place {
    /// Prepares `into`; removes the remains of an interrupted build.
    pub(crate) fn prepare(into: &Path, keep_free: u64) -> Result<Self, ImageError> {
        let made = match drive::create_home(into) {
            Ok(()) => true,
            Err(DriveError::Exists { .. }) => false,
            Err(DriveError::Io { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error.into()),
        };
        // Checked before the place exists, because dropping a place removes what is in it.
        if fs::symlink_metadata(into.join(ROOTFS)).is_ok() {
            return Err(DriveError::Exists { path: into.join(ROOTFS) }.into());
        }
        let mut place = Self { into: into.to_owned(), made, kept: false, scratch: None };
        for entry in fs::read_dir(into).map_err(|e| ImageError::write(into, e))? {
            let entry = entry.map_err(|e| ImageError::write(into, e))?;
            if entry.file_name().as_encoded_bytes().starts_with(SCRATCH.as_bytes()) {
                fs::remove_dir_all(entry.path()).map_err(|e| ImageError::write(&entry.path(), e))?;
            }
        }
        check_room(into, keep_free)?;
        let scratch = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(into);
        place.scratch = Some(scratch.map_err(|e| ImageError::write(into, e))?);
        Ok(place)
    }

    /// The scratch directory.
    pub(crate) fn scratch(&self) -> &Path {
        self.scratch.as_ref().map_or(&self.into, TempDir::path)
    }

    /// Checks a filesystem, syncs it, and gives it its name.
    pub(crate) async fn finish(
        self,
        tools: &Tools,
        file: PathBuf,
        progress: &Progress,
    ) -> Result<(Self, FinishedFile), ImageError> {
        failpoint::reach("image-filled");
        progress.step("checking the filesystem");
        let (hashed, watched) = (file.clone(), progress.clone());
        let hash = tokio::task::spawn_blocking(move || {
            let hash = hash(&hashed, &watched);
            (self, hash)
        });
        let (checked, hashed) = tokio::join!(tools.check(&file, progress), hash);
        let (place, sha256) = hashed.map_err(|_| ImageError::Worker)?;
        checked?;
        let sha256 = sha256?;
        progress.check()?;
        failpoint::reach("image-checked");
        let named = place.into.join(ROOTFS);
        let metadata = || -> std::io::Result<_> {
            let open = fs::File::open(&file)?;
            open.set_permissions(std::fs::Permissions::from_mode(0o444))?;
            open.sync_all()?;
            let size = open.metadata()?.len();
            fs::rename(&file, &named)?;
            for directory in [Some(place.into.as_path()), place.into.parent()].into_iter().flatten() {
                fs::File::open(directory)?.sync_all()?;
            }
            Ok(size)
        };
        let size = metadata().map_err(|e| ImageError::write(&named, e))?;
        let used_bytes = allocated_bytes(&named).map_err(|e| ImageError::write(&named, e))?;
        failpoint::reach("image-named");
        Ok((place, FinishedFile { path: named, size: ByteSize::bytes(size), used_bytes, sha256 }))
    }

    /// Keeps the image.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(scratch) = self.scratch.take() {
            let path = scratch.path().to_owned();
            if let Err(error) = scratch.close() {
                tracing::warn!(path = %path.display(), %error, "scratch directory not removed");
            }
        }
        if self.kept {
            return;
        }
        let named = self.into.join(ROOTFS);
        let removed = if self.made { fs::remove_dir_all(&self.into) } else { fs::remove_file(&named) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.into.display(), %error, "unfinished image not removed");
            }
            _ => {}
        }
    }
}

fn hash(file: &Path, progress: &Progress) -> Result<String, ImageError> {
    let failed = |e| ImageError::source(file, e);
    let mut open = fs::File::open(file).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        progress.check()?;
        let read = open.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok(data_encoding::HEXLOWER.encode(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}
