//! Drives.

use nexus_schema::id::{DriveId, DriveKind, ImageId, VmId};
use nexus_schema::{ByteSize, Name, Reference, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

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
    /// The drive that it was cloned from, while that exists.
    pub parent_id: Option<DriveId>,
    /// The VM that it was made for, and with which it is deleted.
    pub made_for: Option<VmId>,
    /// Where it is in use.
    pub attachment: Option<Attachment>,
    /// Whether its file is complete.
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

/// A row of `vm_drives`, from the drive's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The VM that has the drive.
    pub vm: VmId,
    /// Its position among that VM's drives; 0 is the root drive.
    pub position: u32,
    /// Its mount point in the guest; never set for a root drive.
    pub mount: Option<String>,
}

impl DriveRecord {
    /// Whether it is the root drive of a VM.
    pub fn is_root(&self) -> bool {
        self.attachment.as_ref().is_some_and(|a| a.position == 0)
    }
}

const SELECT: &str = "SELECT drives.*, vm_drives.vm_id AS at_vm, vm_drives.position AS at_position,
    vm_drives.mount AS at_mount FROM drives LEFT JOIN vm_drives ON vm_drives.drive_id = drives.id";

fn record(row: &Row<'_>) -> rusqlite::Result<DriveRecord> {
    let attachment = match row.id_opt("at_vm")? {
        Some(vm) => Some(Attachment { vm, position: row.get("at_position")?, mount: row.get("at_mount")? }),
        None => None,
    };
    Ok(DriveRecord {
        parent_id: row.id_opt("parent_id")?,
        made_for: row.id_opt("made_for")?,
        attachment,
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
        "INSERT INTO drives (id, image_id, name, state, size_bytes, read_only, owner, created_at, parent_id, made_for, may_hold_data)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, 0)",
        params![
            drive.id.as_i64(),
            drive.image_id.map(|id| id.as_i64()),
            drive.name.as_str(),
            if drive.ready { "ready" } else { "creating" },
            super::columns::signed(drive.size.as_bytes()),
            drive.read_only,
            drive.owner,
            drive.created_at.as_millis(),
            drive.parent_id.map(|id| id.as_i64()),
            drive.made_for.map(|id| id.as_i64()),
        ],
    )
    .map_err(|e| name_taken(e, "drive", drive.name.as_str(), "drives.name"))?;
    Ok(())
}

/// Records that a drive's file is complete, and what it was made from. A copy of a drive holds what that holds.
pub fn made(tx: &Connection, drive: &DriveRecord) -> Result<(), StoreError> {
    let size = super::columns::signed(drive.size.as_bytes());
    tx.execute(
        "UPDATE drives SET state = 'ready', image_id = ?2, parent_id = ?3, size_bytes = ?4, may_hold_data = may_hold_data OR
            ?3 IS NOT NULL AND coalesce((SELECT may_hold_data FROM drives AS parent WHERE parent.id = ?3), 1)
         WHERE id = ?1",
        params![
            drive.id.as_i64(),
            drive.image_id.map(|id| id.as_i64()),
            drive.parent_id.map(|id| id.as_i64()),
            size
        ],
    )?;
    Ok(())
}

/// Removes a drive.
pub fn delete(tx: &Connection, id: DriveId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM drives WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// Attaches a drive to a VM.
pub fn attach(tx: &Connection, drive: DriveId, to: &Attachment) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO vm_drives (vm_id, drive_id, position, mount) VALUES (?1, ?2, ?3, ?4)",
        params![to.vm.as_i64(), drive.as_i64(), to.position, to.mount],
    )?;
    Ok(())
}

/// Detaches a drive from its VM; it then belongs to no VM.
pub fn detach(tx: &Connection, drive: DriveId) -> Result<(), StoreError> {
    tx.execute("DELETE FROM vm_drives WHERE drive_id = ?1", [drive.as_i64()])?;
    tx.execute("UPDATE drives SET made_for = NULL WHERE id = ?1", [drive.as_i64()])?;
    Ok(())
}

/// Notes that a guest may write to the drives of a VM from now on.
pub(super) fn note_start(tx: &Connection, vm: VmId) -> Result<(), StoreError> {
    tx.prepare_cached(
        "UPDATE drives SET may_hold_data = 1 WHERE NOT may_hold_data AND NOT read_only
         AND id IN (SELECT drive_id FROM vm_drives WHERE vm_id = ?1)",
    )?
    .execute([vm.as_i64()])?;
    Ok(())
}

/// Whether a guest may have written to a drive, by what the daemon did with it: a guest can make its filesystem look unused.
pub fn may_hold_data(db: &Connection, drive: DriveId) -> Result<bool, StoreError> {
    let found = db
        .query_row("SELECT may_hold_data FROM drives WHERE id = ?1", [drive.as_i64()], |row| {
            row.get("may_hold_data")
        })
        .optional()?;
    Ok(found.unwrap_or(false))
}

/// Stores a drive's size.
pub fn set_size(tx: &Connection, drive: DriveId, size: ByteSize) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE drives SET size_bytes = ?2 WHERE id = ?1",
        params![drive.as_i64(), super::columns::signed(size.as_bytes())],
    )?;
    Ok(())
}

/// Notes by how much a caller who did not make a drive had it grown.
pub fn add_growth(tx: &Connection, drive: DriveId, by: &str, bytes: u64) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO drive_growths (drive_id, owner, size_bytes) VALUES (?1, ?2, ?3)
         ON CONFLICT (drive_id, owner) DO UPDATE SET size_bytes = size_bytes + excluded.size_bytes",
        params![drive.as_i64(), by, super::columns::signed(bytes)],
    )?;
    Ok(())
}

/// Takes back what [`add_growth`] noted, if it did.
pub fn take_growth(tx: &Connection, drive: DriveId, by: &str, bytes: u64) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE drive_growths SET size_bytes = max(0, size_bytes - ?3) WHERE drive_id = ?1 AND owner = ?2",
        params![drive.as_i64(), by, super::columns::signed(bytes)],
    )?;
    Ok(())
}

/// Finds a complete drive.
pub fn get(db: &Connection, drive: &Reference<DriveKind>) -> Result<Option<DriveRecord>, StoreError> {
    let (column, value): (_, &dyn rusqlite::ToSql) = match drive {
        Reference::Id(id) => ("id", &id.as_i64()),
        Reference::Name(name) => ("name", &name.as_str()),
    };
    let sql = format!("{SELECT} WHERE drives.{column} = ?1 AND drives.state = 'ready'");
    Ok(db.prepare_cached(&sql)?.query_row([value], record).optional()?)
}

/// The drives of a VM, the root drive first.
pub fn of_vm(db: &Connection, vm: VmId) -> Result<Vec<DriveRecord>, StoreError> {
    let sql = format!("{SELECT} WHERE vm_drives.vm_id = ?1 ORDER BY vm_drives.position");
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map([vm.as_i64()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Every drive, by name.
pub fn all(db: &Connection) -> Result<Vec<DriveRecord>, StoreError> {
    let sql = format!("{SELECT} ORDER BY drives.name");
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Complete drives by name, after `after`.
pub fn list(
    db: &Connection,
    vm: Option<VmId>,
    attached: Option<bool>,
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<DriveRecord>, StoreError> {
    let sql = format!(
        "{SELECT} WHERE drives.state = 'ready' AND (?1 IS NULL OR vm_drives.vm_id = ?1)
         AND (?2 IS NULL OR (vm_drives.vm_id IS NOT NULL) = ?2) AND (?3 IS NULL OR drives.name > ?3)
         ORDER BY drives.name LIMIT ?4"
    );
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map(params![vm.map(|id| id.as_i64()), attached, after, limit], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The drives that were made from an image, by name.
pub fn of_image(db: &Connection, image: ImageId) -> Result<Vec<DriveRecord>, StoreError> {
    let sql = format!("{SELECT} WHERE drives.image_id = ?1 ORDER BY drives.name");
    let mut statement = db.prepare_cached(&sql)?;
    let rows = statement.query_map([image.as_i64()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}
