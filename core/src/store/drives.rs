//! Drives.

use nexus_schema::id::{DriveId, ImageId, VmId};
use nexus_schema::{ByteSize, Name, Timestamp};
use rusqlite::{Connection, Row, params};

use super::columns::RowExt;
use super::{StoreError, name_taken};

/// One row of `drives`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveRecord {
    /// Its id.
    pub id: DriveId,
    /// Its name.
    pub name: Name,
    /// The image that it was cloned from, while that exists.
    pub image_id: Option<ImageId>,
    /// Whether its file is whole.
    pub ready: bool,
    /// Its size.
    pub size: ByteSize,
    /// Whether guests may not write to it.
    pub read_only: bool,
    /// Who made it.
    pub owner: String,
    /// When it was made.
    pub created_at: Timestamp,
}

fn record(row: &Row<'_>) -> rusqlite::Result<DriveRecord> {
    Ok(DriveRecord {
        id: row.id("id")?,
        name: row.text("name")?,
        image_id: row.id_opt("image_id")?,
        ready: row.get::<_, String>("state")? == "ready",
        size: ByteSize::bytes(row.unsigned("size_bytes")?),
        read_only: row.get("read_only")?,
        owner: row.get("owner")?,
        created_at: row.time("created_at")?,
    })
}

/// Adds a drive whose file is being made.
pub fn insert(tx: &Connection, drive: &DriveRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO drives (id, image_id, name, state, size_bytes, read_only, owner, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            drive.id.as_i64(),
            drive.image_id.map(|id| id.as_i64()),
            drive.name.as_str(),
            if drive.ready { "ready" } else { "creating" },
            super::columns::signed(drive.size.as_bytes()),
            drive.read_only,
            drive.owner,
            drive.created_at.as_millis(),
        ],
    )
    .map_err(|e| name_taken(e, "drive", drive.name.as_str(), "drives.name"))?;
    Ok(())
}

/// Says that a drive's file is whole.
pub fn set_ready(tx: &Connection, id: DriveId) -> Result<(), StoreError> {
    tx.execute("UPDATE drives SET state = 'ready' WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// Removes a drive.
pub fn delete(tx: &Connection, id: DriveId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM drives WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// The drives of a VM, the root drive first.
pub fn of_vm(db: &Connection, vm: VmId) -> Result<Vec<DriveRecord>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT drives.* FROM drives JOIN vm_drives ON drive_id = drives.id WHERE vm_id = ?1 ORDER BY position",
    )?;
    let rows = statement.query_map([vm.as_i64()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Every drive.
pub fn all(db: &Connection) -> Result<Vec<DriveRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM drives ORDER BY name")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many drives were made from an image.
pub fn count_by_image(db: &Connection, image: ImageId) -> Result<u64, StoreError> {
    Ok(db.query_row("SELECT count(*) AS n FROM drives WHERE image_id = ?1", [image.as_i64()], |row| {
        row.unsigned("n")
    })?)
}
