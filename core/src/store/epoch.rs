//! The epoch of a database: a number that counts on while the database is used. A file of the state directory follows it, so a copy of the database
//! that was put back later has a smaller one than the file.

use nexus_schema::Timestamp;
use rusqlite::{Connection, params};

use super::StoreError;
use super::columns::{RowExt, signed};

/// The epoch; 0 for a database that no daemon has counted on.
pub fn get(db: &Connection) -> Result<u64, StoreError> {
    let sql = "SELECT coalesce(max(epoch), 0) AS epoch FROM instance";
    Ok(db.query_row(sql, [], |row| row.unsigned("epoch"))?)
}

/// Counts on, to more than `seen` too, and returns the new epoch. It is not less than `now` in seconds, so that of a new database is greater than those of
/// older ones although nobody has seen them. The installation must have its id.
pub fn advance(tx: &Connection, seen: u64, now: Timestamp) -> Result<u64, StoreError> {
    let seconds = now.as_millis().max(0) / 1000;
    tx.execute("UPDATE instance SET epoch = max(max(epoch, ?1) + 1, ?2)", params![signed(seen), seconds])?;
    get(tx)
}

/// Takes out of an older copy of a database what would have VMs, checkpoints or drives removed that may be wanted by now: ends of lives before `until`, forks
/// to be undone, and that no guest has written to a drive. Returns the names of what lives until then.
pub fn spare(tx: &Connection, until: Timestamp) -> Result<Vec<String>, StoreError> {
    let until = until.as_millis();
    let sql = "SELECT name FROM vms WHERE expires_at < ?1
        UNION ALL SELECT vm_name || '/' || name FROM checkpoints WHERE expires_at < ?1";
    let names =
        tx.prepare(sql)?.query_map([until], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    tx.execute("UPDATE vms SET expires_at = max(expires_at, ?1), fork_op = NULL", [until])?;
    tx.execute("UPDATE checkpoints SET expires_at = max(expires_at, ?1)", [until])?;
    tx.execute("UPDATE drives SET may_hold_data = 1", [])?;
    Ok(names)
}
