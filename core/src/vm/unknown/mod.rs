//! Files that the database knows nothing of because it is not the one that they were made with: it is new, say because the old one was moved away, or
//! an older copy of it that was put back. They are of VMs that somebody may still want, so they are kept until somebody removes them.
//!
//! ```text
//! start ─> is it another database? ─> what an older one would undo or remove is forgotten ─> names without a row go into kept.json ─> VMs are taken up ─> count on
//! ```
//! Each step is on the disk before the next begins, so a start that is cut off is made anew with the same outcome: the database is an older one until the
//! last step. Whether it is older is told by its [`epoch`]; what is forgotten is in [`outdated`].

mod epoch;
mod outdated;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::Path;

use nexus_schema::{ErrorCode, ToolError};
use tokio::task::spawn_blocking;

pub(crate) use self::epoch::{count_on, count_work};
pub(super) use self::outdated::stray_of;
use crate::context::Shared;
use crate::drive::HALF_MADE;
use crate::op::store_error;
use crate::os::paths::Paths;
use crate::os::{disk, failpoint};
use crate::store::health::is_unused;
use crate::store::{
    self, Connection, StoreError, assets, builds, checkpoints, drives, images, restores, vms,
};
use crate::vmm::write_atomic;

/// What the start of the daemon found in its state directory.
#[derive(Debug)]
pub(super) struct Found {
    /// The names of entries that are kept although no row names them.
    pub(super) kept: HashSet<String>,
    /// Whether what the rows say may no longer be so, since the database is older than the files.
    pub(super) is_outdated: bool,
}

/// Why the database is not the one that the files were made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Other {
    /// Nothing was ever done with it.
    New,
    /// It is a copy from before, or nobody knows.
    Older,
}

impl Other {
    /// Compares the epoch of the database with the one that was read from the file. `None` for the database that the files were made with.
    fn of(is_unused: bool, database: u64, file: &io::Result<Option<u64>>) -> Option<Self> {
        match file {
            _ if is_unused => Some(Self::New),
            Ok(file) if file.is_none_or(|file| file <= database) => None,
            Ok(_) | Err(_) => Some(Self::Older),
        }
    }
}

/// For the start of the daemon, before it finishes, undoes or removes anything: finds out whether the database is another one than before, and which
/// entries of the state directory are kept.
pub(super) async fn look(shared: &Shared) -> Result<Found, ToolError> {
    let (is_unused, database) = shared
        .store
        .read(|db| -> Result<_, StoreError> { Ok((is_unused(db)?, store::epoch::get(db)?)) })
        .await
        .map_err(store_error)?;
    let path = shared.paths.epoch();
    let file = spawn_blocking(move || epoch::read(&path)).await.map_err(io::Error::other).flatten();
    let other = Other::of(is_unused, database, &file);
    let is_outdated = other == Some(Other::Older);
    if is_outdated {
        let of_file = file.map_or_else(|error| error.to_string(), |file| file.unwrap_or(0).to_string());
        tracing::warn!(
            database,
            file = %of_file,
            "the database is an older copy, or may be one: what it does not know is kept, and nothing that it knows expires within a day"
        );
        outdated::settle(shared).await?;
    }
    let before = read_kept(&shared.paths).await?;
    let kept = match (other, before) {
        (None, Some(before)) => before,
        // A list that is damaged is made anew like that of another database.
        _ => {
            let known = shared.store.read(known).await.map_err(store_error)?;
            let paths = shared.paths.clone();
            let kept = spawn_blocking(move || make_list(&paths, &known));
            kept.await.map_err(io::Error::other).flatten().map_err(|error| unlisted(&shared.paths, &error))?
        }
    };
    if !kept.is_empty() {
        tracing::warn!(
            count = kept.len(),
            list = %shared.paths.kept().display(),
            "the state directory has VMs, disks, images or checkpoints that the database does not know, since it is a new or an older one: they are kept"
        );
    }
    failpoint::reach("unknown-kept");
    Ok(Found { kept, is_outdated })
}

/// The names of all entries of the state directory that rows name.
fn known(db: &Connection) -> Result<HashSet<String>, StoreError> {
    let mut names = HashSet::new();
    for vm in vms::all(db)? {
        names.extend(vm.suspended.map(|memory| memory.manifest.checkpoint.to_string()));
        names.insert(vm.id.to_string());
    }
    names.extend(drives::all(db)?.into_iter().map(|row| row.id.to_string()));
    names.extend(images::all(db)?.into_iter().map(|row| row.id.to_string()));
    names.extend(assets::all(db)?.into_iter().map(|row| row.id.to_string()));
    names.extend(builds::ids(db)?.into_iter().map(|id| id.to_string()));
    names.extend(checkpoints::all(db)?.into_iter().map(|row| row.id.to_string()));
    let rollbacks = restores::rollbacks(db)?;
    names.extend(rollbacks.into_iter().flat_map(|rollback| rollback.drives).map(|drive| drive.staged));
    Ok(names)
}

/// Reads the names that are kept; `None` if the list is damaged, and now also under another name.
async fn read_kept(paths: &Paths) -> Result<Option<HashSet<String>>, ToolError> {
    let list = paths.kept();
    let text = match tokio::fs::read(&list).await {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(HashSet::new())),
        Err(error) => {
            let message = format!("read {}, which lists what is not to be removed: {error}", list.display());
            return Err(ToolError::internal(message).hint("make that file readable; do not remove it"));
        }
    };
    let damage = match serde_json::from_slice(&text) {
        Ok(names) => return Ok(Some(names)),
        Err(damage) => damage,
    };
    let copy = list.with_added_extension("damaged");
    tracing::error!(
        list = %list.display(), copy = %copy.display(), error = %damage,
        "the list of what is not to be removed is damaged: all that the database does not know is kept"
    );
    let copied = spawn_blocking(move || write_atomic(&copy, &text, true)).await;
    copied.map_err(io::Error::other).flatten().map_err(|error| unlisted(paths, &error))?;
    Ok(None)
}

/// The error for a list of names that cannot be made.
fn unlisted(paths: &Paths, error: &io::Error) -> ToolError {
    let code = if disk::is_full(error) { ErrorCode::DiskFull } else { ErrorCode::Internal };
    let list = paths.kept();
    let message = format!("list what is not to be removed in {}: {error}", list.display());
    ToolError::new(code, message).hint(match code {
        ErrorCode::DiskFull => "free space, then start nexusd again; do not remove that file",
        _ => {
            "make the state directory readable and writable, then start nexusd again; do not remove that file"
        }
    })
}

/// Lists all names that are there and not `known` to the database, but those of half-made copies. Blocks.
fn make_list(paths: &Paths, known: &HashSet<String>) -> io::Result<HashSet<String>> {
    let mut kept = BTreeSet::new();
    for directory in [
        paths.vms(),
        paths.drives(),
        paths.images(),
        paths.assets(),
        paths.builds(),
        paths.checkpoints(),
        paths.all_suspended(),
    ] {
        add_names(&directory, known, &mut kept)?;
    }
    let list = paths.kept();
    if !kept.is_empty() || list.exists() {
        write_atomic(&list, &serde_json::to_vec(&kept)?, true)?;
    }
    Ok(kept.into_iter().collect())
}

fn add_names(directory: &Path, known: &HashSet<String>, names: &mut BTreeSet<String>) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name().into_string();
        names.extend(name.ok().filter(|name| !known.contains(name) && !name.starts_with(HALF_MADE)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_another_one_if_it_is_unused_or_behind_its_file() {
        let garbage = || Err(io::Error::from(io::ErrorKind::InvalidData));
        for (is_unused, database, file, other) in [
            (false, 7, Ok(Some(7)), None),
            // The daemon ended before it wrote the file.
            (false, 8, Ok(Some(7)), None),
            (false, 6, Ok(Some(7)), Some(Other::Older)),
            // One of an earlier version, without and with a file of a later one.
            (false, 0, Ok(None), None),
            (false, 0, Ok(Some(1)), Some(Other::Older)),
            (false, 7, Ok(None), None),
            (false, 7, garbage(), Some(Other::Older)),
            (true, 0, Ok(None), Some(Other::New)),
            (true, 0, Ok(Some(7)), Some(Other::New)),
            (true, 3, garbage(), Some(Other::New)),
        ] {
            assert_eq!(Other::of(is_unused, database, &file), other, "{is_unused} {database} {file:?}");
        }
    }

    #[tokio::test]
    async fn what_another_database_does_not_know_is_kept_and_what_came_later_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        let half = format!("{HALF_MADE}1-2-3");
        let places = [
            paths.vms().join("a"),
            paths.checkpoints().join("b"),
            paths.builds().join("log"),
            paths.drives().join("known"),
            paths.drives().join(half),
        ];
        for place in places {
            std::fs::create_dir_all(place).unwrap();
        }
        let names =
            |names: &[&str]| -> HashSet<String> { names.iter().map(|name| (*name).to_owned()).collect() };
        assert_eq!(read_kept(&paths).await.unwrap(), Some(HashSet::new()));
        let kept = names(&["a", "b", "log"]);
        assert_eq!(make_list(&paths, &names(&["known"])).unwrap(), kept);
        std::fs::create_dir_all(paths.images().join("c")).unwrap();
        assert_eq!(read_kept(&paths).await.unwrap(), Some(kept));
        // Another copy that is put back adds to them, and what it knows or is gone is not listed any more.
        std::fs::remove_dir(paths.vms().join("a")).unwrap();
        let kept = names(&["c", "log"]);
        assert_eq!(make_list(&paths, &names(&["known", "b"])).unwrap(), kept);
        assert_eq!(read_kept(&paths).await.unwrap(), Some(kept));
    }

    #[tokio::test]
    async fn a_damaged_list_is_copied_and_one_that_cannot_be_read_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        std::fs::write(paths.kept(), "no list").unwrap();
        for _ in 0..2 {
            assert_eq!(read_kept(&paths).await.unwrap(), None);
            assert_eq!(std::fs::read(directory.path().join("kept.json.damaged")).unwrap(), b"no list");
        }
        assert!(make_list(&paths, &HashSet::new()).unwrap().is_empty());
        assert_eq!(read_kept(&paths).await.unwrap(), Some(HashSet::new()));
        std::fs::remove_file(paths.kept()).unwrap();
        std::fs::create_dir(paths.kept()).unwrap();
        assert_eq!(read_kept(&paths).await.unwrap_err().code, ErrorCode::Internal);
    }

    #[test]
    fn a_full_disk_is_named() {
        let paths = Paths::new(Path::new("/state"));
        for (kind, code) in [
            (io::ErrorKind::StorageFull, ErrorCode::DiskFull),
            (io::ErrorKind::PermissionDenied, ErrorCode::Internal),
        ] {
            assert_eq!(unlisted(&paths, &kind.into()).code, code);
        }
    }
}
