//! A copy of the database from before a migration, beside it: `nexus.db.before-vN`, where N is the version to which it is migrated. One is
//! kept, that of the last migration. It is for people: the daemon never reads it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, params};

use super::StoreError;

/// What the name of a copy has after that of the database, before the version.
const BEFORE: &str = ".before-v";
/// The same for a copy that is not complete yet.
const PART: &str = ".before-part";

/// Copies the database at `path` before its migration to a version, and syncs the copy; then removes copies of earlier migrations. Blocks.
///
/// # Errors
/// The copy cannot be written or synced. The database is unchanged, and earlier copies are still there.
pub(super) fn write(database: &Connection, path: &Path, version: u32) -> Result<(), StoreError> {
    let copy = beside(path, &format!("{BEFORE}{version}"));
    copy_to(database, path, &copy).map_err(|source| StoreError::Backup { path: copy.clone(), source })?;
    tracing::info!(copy = %copy.display(), "copied the database before its migration");
    for earlier in copies(path).into_iter().filter(|earlier| *earlier != copy) {
        match std::fs::remove_file(&earlier) {
            Ok(()) => tracing::info!(
                removed = %earlier.display(),
                "removed the copy of the database from before an earlier migration"
            ),
            Err(error) => {
                tracing::warn!(%error, copy = %earlier.display(), "cannot remove an earlier copy of the database");
            }
        }
    }
    Ok(())
}

/// Writes a complete copy, which appears under its name only once it is on the disk.
fn copy_to(database: &Connection, path: &Path, copy: &Path) -> io::Result<()> {
    let part = beside(path, PART);
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // SQLite writes into an existing file if that is empty, and keeps its mode.
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    let copied = database
        .execute("VACUUM INTO CAST(?1 AS TEXT)", params![part.as_os_str().as_bytes()])
        .map_err(io::Error::other)
        .and_then(|_| std::fs::File::open(&part)?.sync_all())
        .and_then(|()| std::fs::rename(&part, copy));
    if copied.is_err() {
        // Half a copy helps nobody, and takes room on a disk that may be full.
        let _gone = std::fs::remove_file(&part);
    }
    copied?;
    std::fs::File::open(directory(path))?.sync_all()
}

/// The directory of a file.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The complete copies beside a database.
fn copies(path: &Path) -> Vec<PathBuf> {
    let start = [path.file_name().unwrap_or_default().as_bytes(), BEFORE.as_bytes()].concat();
    let Ok(entries) = std::fs::read_dir(directory(path)) else { return Vec::new() };
    let entries = entries.filter_map(Result::ok);
    entries
        .filter(|entry| {
            // Other names are somebody's own copies.
            let name = entry.file_name();
            let version = name.as_bytes().strip_prefix(&*start);
            version.is_some_and(|version| !version.is_empty() && version.iter().all(u8::is_ascii_digit))
        })
        .map(|entry| entry.path())
        .collect()
}

/// The file beside the database with more after its name.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(more);
    PathBuf::from(name)
}
