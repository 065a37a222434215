//! Restores under way: rollbacks whose drives are being put in place, and boots that go on from a checkpoint.

use nexus_schema::ByteSize;
use nexus_schema::id::{BootId, CheckpointId, DriveId, VmId};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::columns::{Json, RowExt};
use super::{StoreError, drives};

/// One row of `rollbacks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollbackRecord {
    /// The VM.
    pub vm: VmId,
    /// The checkpoint that it is put back to.
    pub checkpoint: CheckpointId,
    /// Its drives, each with a copy that is on the disk.
    pub drives: Vec<StagedDrive>,
}

/// A copy that takes the place of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedDrive {
    /// The drive.
    pub drive: DriveId,
    /// The name of the copy among the drives.
    pub staged: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
}

fn rollback(row: &Row<'_>) -> rusqlite::Result<RollbackRecord> {
    Ok(RollbackRecord {
        vm: row.id("vm_id")?,
        checkpoint: row.id("checkpoint_id")?,
        drives: row.json("drives")?,
    })
}

/// Records that the drives of a VM are being replaced.
pub fn begin_rollback(tx: &Connection, rollback: &RollbackRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO rollbacks (vm_id, checkpoint_id, drives) VALUES (?1, ?2, ?3)",
        params![rollback.vm.as_i64(), rollback.checkpoint.as_i64(), Json(&rollback.drives)],
    )?;
    Ok(())
}

/// Records that all drives are in their places: their sizes, and the checkpoint that the VM goes on from.
pub fn end_rollback(tx: &Connection, rollback: &RollbackRecord) -> Result<(), StoreError> {
    for staged in &rollback.drives {
        drives::set_size(tx, staged.drive, ByteSize::bytes(staged.size_bytes))?;
    }
    tx.execute(
        "UPDATE vms SET checkpoint_id = (SELECT id FROM checkpoints WHERE id = ?2) WHERE id = ?1",
        params![rollback.vm.as_i64(), rollback.checkpoint.as_i64()],
    )?;
    tx.execute("DELETE FROM rollbacks WHERE vm_id = ?1", [rollback.vm.as_i64()])?;
    Ok(())
}

/// The rollback of a VM that is not finished.
pub fn rollback_of(db: &Connection, vm: VmId) -> Result<Option<RollbackRecord>, StoreError> {
    let sql = "SELECT * FROM rollbacks WHERE vm_id = ?1";
    Ok(db.prepare_cached(sql)?.query_row([vm.as_i64()], rollback).optional()?)
}

/// All rollbacks that are not finished.
pub fn rollbacks(db: &Connection) -> Result<Vec<RollbackRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM rollbacks ORDER BY vm_id")?;
    let rows = statement.query_map([], rollback)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Records that a boot of a VM goes on from a checkpoint.
pub fn begin_restore(tx: &Connection, vm: VmId, boot: BootId) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO restores (vm_id, boot_id) VALUES (?1, ?2) ON CONFLICT (vm_id) DO UPDATE SET boot_id = excluded.boot_id",
        params![vm.as_i64(), boot.as_i64()],
    )?;
    Ok(())
}

/// The last boot of a VM that went on from a checkpoint.
pub fn restored_boot(db: &Connection, vm: VmId) -> Result<Option<BootId>, StoreError> {
    let sql = "SELECT boot_id FROM restores WHERE vm_id = ?1";
    Ok(db.prepare_cached(sql)?.query_row([vm.as_i64()], |row| row.id("boot_id")).optional()?)
}
