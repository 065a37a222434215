//! The file that follows the database's epoch. Each start of the daemon counts on, each stop in order, and each minute in which a row was written:
//! the database first, durably, then the file. So the file's number is greater than the database's only if the database is an older copy.

use std::io;
use std::path::Path;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::context::Shared;
use crate::os::regular;
use crate::store::{StoreError, epoch, now};
use crate::vmm::write_atomic;

/// The greatest number that is taken for an epoch.
const EPOCH_MAX: u64 = 1 << 53;
/// The most bytes of the file that are read.
const FILE_MAX: u64 = 64;

/// Held while the epoch is counted on: the file never goes back.
static COUNTING: Mutex<()> = Mutex::const_new(());

/// Returns the number in the file; `None` if there is no file, say because an earlier version of the daemon had none. Blocks.
///
/// # Errors
/// The file cannot be read, or has no epoch in it.
pub(super) fn read(file: &Path) -> io::Result<Option<u64>> {
    let opened = match regular::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let text = io::read_to_string(io::Read::take(opened, FILE_MAX))?;
    let epoch = text.trim_end().parse::<u64>().ok().filter(|epoch| *epoch <= EPOCH_MAX);
    epoch.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "there is no epoch in it"))
}

/// Counts on. A failure is logged and costs nothing now: a copy of the database from before that is put back may be taken for the newest. Returns the
/// [`changes`](crate::store::Store::changes) that are counted.
pub(crate) async fn count_on(shared: &Shared) -> Option<u64> {
    let _one = COUNTING.lock().await;
    let file = shared.paths.epoch();
    let counted = async {
        let seen = {
            let file = file.clone();
            // One that cannot be read is replaced: the start of the daemon has kept what there was.
            spawn_blocking(move || read(&file).ok().flatten().unwrap_or(0)).await?
        };
        let (epoch, changes) = shared
            .store
            .write(move |tx| -> Result<_, StoreError> {
                Ok((epoch::advance(tx, seen, now())?, tx.total_changes()))
            })
            .await
            .map_err(|error| io::Error::other(error.to_string()))?;
        spawn_blocking(move || write_atomic(&file, format!("{epoch}\n").as_bytes(), true)).await??;
        io::Result::Ok(changes)
    };
    match counted.await {
        Ok(changes) => Some(changes),
        Err(error) => {
            let file = shared.paths.epoch();
            tracing::warn!(%error, file = %file.display(), "cannot count on the epoch of the database");
            None
        }
    }
}

/// Counts on if something was written since the last time, whose changes are in `counted`.
pub(crate) async fn count_work(shared: &Shared, counted: &mut Option<u64>) {
    match shared.store.changes().await {
        Ok(now) if *counted == Some(now) => {}
        Ok(_) => *counted = count_on(shared).await,
        Err(error) => tracing::warn!(%error, "cannot look whether something was done"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_epoch_or_there_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("epoch");
        assert_eq!(read(&file).unwrap(), None);
        for epoch in [0, 7, EPOCH_MAX] {
            write_atomic(&file, format!("{epoch}\n").as_bytes(), true).unwrap();
            assert_eq!(read(&file).unwrap(), Some(epoch));
        }
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 1, "it is replaced in one step");
        let long = "1".repeat(100);
        for garbage in ["", "seven", "-1", "7 8", "9007199254740993", "99999999999999999999", "\0\0", &long] {
            std::fs::write(&file, garbage).unwrap();
            assert!(read(&file).is_err(), "{garbage:?}");
        }
        std::fs::write(&file, [0xff, 0xfe]).unwrap();
        assert!(read(&file).is_err());
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(read(&file).is_err());
    }
}
