//! The epoch of a database: a number that counts on while the database is used. A file of the state directory follows it, so a copy of the database
//! that was put back later has a smaller one than the file.

use rusqlite::{Connection, params};

use super::StoreError;
use super::columns::{RowExt, signed};

/// The epoch; 0 for a database that no daemon has counted on.
pub fn get(db: &Connection) -> Result<u64, StoreError> {
    let sql = "SELECT coalesce(max(epoch), 0) AS epoch FROM instance";
    Ok(db.query_row(sql, [], |row| row.unsigned("epoch"))?)
}

/// Counts on, to more than `seen` too, and returns the new epoch. The installation must have its id.
pub fn advance(tx: &Connection, seen: u64) -> Result<u64, StoreError> {
    tx.execute("UPDATE instance SET epoch = max(epoch, ?1) + 1", params![signed(seen)])?;
    get(tx)
}

/// A number that changes when operations begin and when VMs change their state.
pub fn work(db: &Connection) -> Result<u64, StoreError> {
    let sql = "SELECT coalesce((SELECT max(seq) FROM ops), 0) + coalesce((SELECT max(seq) FROM vm_history), 0) AS work";
    Ok(db.query_row(sql, [], |row| row.unsigned("work"))?)
}

/// Takes out of an older copy of a database what would have VMs, checkpoints or drives removed that may be wanted by now: ends of lives, forks to be
/// undone, and that no guest has written to a drive.
pub fn spare(tx: &Connection) -> Result<(), StoreError> {
    tx.execute("UPDATE vms SET expires_at = NULL, fork_op = NULL", [])?;
    tx.execute("UPDATE checkpoints SET expires_at = NULL", [])?;
    tx.execute("UPDATE drives SET may_hold_data = 1", [])?;
    Ok(())
}
