//! Checkpoints, and the copies of drives that belong to them.

use std::collections::BTreeMap;

use nexus_schema::id::{AssetId, BootId, CheckpointId, DriveId, ImageId, OpId, VmId};
use nexus_schema::link::GuestProcess;
use nexus_schema::network::NetworkPolicy;
use nexus_schema::{ByteSize, Name, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::columns::{Json, RowExt, signed};
use super::vms::{GuestRecord, VmSpec};
use super::{StoreError, name_taken};

/// The version of manifests that this build writes, and the only one that it reads.
pub const MANIFEST_VERSION: u32 = 1;

/// All that a restore needs to know, and checks; also a file beside the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] of the build that wrote it.
    pub version: u32,
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// The VM.
    pub vm: VmId,
    /// The boot that was saved.
    pub boot_id: BootId,
    /// The VM's request then.
    pub spec: VmSpec,
    /// Its image, and that image's name.
    pub image_id: Option<ImageId>,
    /// See `image_id`.
    pub image_name: String,
    /// Its kernel.
    pub kernel_id: Option<AssetId>,
    /// Its architecture.
    pub arch: String,
    /// What its guest said of itself.
    pub guest: GuestRecord,
    /// What it ran on.
    pub host: HostFacts,
    /// Whether its memory was mapped from another checkpoint when it was saved, which makes another form of device state.
    pub private: bool,
    /// Whether the machine has a network card.
    #[serde(default)]
    pub interface: bool,
    /// SHA-256 of the file with the devices' state.
    pub state_sha256: String,
    /// Digest of the file with the memory, over its pages that are not all zeros.
    pub ram_sha256: String,
    /// Whether commands stood still and filesystems were synced.
    pub quiesced: bool,
    /// The sizes of the copies of drives, in bytes, in their order.
    pub drive_bytes: Vec<u64>,
    /// The guest's processes, as far as it listed them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<GuestProcess>,
}

/// What a VM ran on: a saved one runs on exactly the same only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The driver.
    pub driver: String,
    /// The VMM's version.
    pub driver_version: String,
    /// SHA-256 of the VMM's binary.
    pub binary_sha256: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Digest of the features of the host's processors.
    pub cpu_sha256: String,
    /// Rate of the host's time stamp counter, if known.
    pub tsc_khz: Option<u32>,
}

/// One row of `checkpoints`.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointRecord {
    /// Its position in the order of creation; 0 before it is stored.
    pub seq: i64,
    /// Its id.
    pub id: CheckpointId,
    /// The VM that it was taken of.
    pub vm: VmId,
    /// That VM's name then.
    pub vm_name: Name,
    /// The checkpoint that this VM went on from then.
    pub parent: Option<CheckpointId>,
    /// Its name.
    pub name: Name,
    /// Who made it.
    pub owner: String,
    /// Its labels.
    pub tags: BTreeMap<String, String>,
    /// Whether its files are whole.
    pub ready: bool,
    /// The token of the boot that was saved.
    pub token: Option<String>,
    /// What a restore needs, once it is ready.
    pub manifest: Option<Manifest>,
    /// What its memory occupies on the disk, in bytes; before it is ready, an estimate.
    pub memory_bytes: u64,
    /// What its drives occupy there, in bytes; before it is ready, an estimate.
    pub disk_bytes: u64,
    /// How long its VM stood still, in milliseconds.
    pub pause_ms: u64,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When it will be deleted.
    pub expires_at: Option<Timestamp>,
}

/// One row of `checkpoint_drives`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointDrive {
    /// Its position among the VM's drives.
    pub position: u32,
    /// The drive that it is a copy of.
    pub drive: DriveId,
    /// That drive's name then.
    pub name: Name,
    /// Where the guest mounted it.
    pub mount: Option<String>,
    /// Its size.
    pub size: ByteSize,
    /// Whether the guest could not write to it.
    pub read_only: bool,
    /// The image that the drive was cloned from.
    pub image_id: Option<ImageId>,
}

fn record(row: &Row<'_>) -> rusqlite::Result<CheckpointRecord> {
    Ok(CheckpointRecord {
        seq: row.get("seq")?,
        id: row.id("id")?,
        vm: row.id("vm_id")?,
        vm_name: row.text("vm_name")?,
        parent: row.id_opt("parent_id")?,
        name: row.text("name")?,
        owner: row.get("owner")?,
        tags: row.json("tags")?,
        ready: row.get::<_, String>("state")? == "ready",
        token: row.get("token")?,
        manifest: row.json_opt("manifest")?,
        memory_bytes: row.unsigned("memory_bytes")?,
        disk_bytes: row.unsigned("disk_bytes")?,
        pause_ms: row.unsigned("pause_ms")?,
        created_at: row.time("created_at")?,
        expires_at: row.time_opt("expires_at")?,
    })
}

fn drive(row: &Row<'_>) -> rusqlite::Result<CheckpointDrive> {
    Ok(CheckpointDrive {
        position: row.get("position")?,
        drive: row.id("drive_id")?,
        name: row.text("name")?,
        mount: row.get("mount")?,
        size: ByteSize::bytes(row.unsigned("size_bytes")?),
        read_only: row.get("read_only")?,
        image_id: row.id_opt("image_id")?,
    })
}

/// Adds a checkpoint that is being made.
pub fn insert(tx: &Connection, checkpoint: &CheckpointRecord) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO checkpoints (id, vm_id, vm_name, parent_id, name, owner, tags, state, memory_bytes, disk_bytes, created_at,
            expires_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'making', ?8, ?9, ?10, ?11)",
        params![
            checkpoint.id.as_i64(),
            checkpoint.vm.as_i64(),
            checkpoint.vm_name.as_str(),
            checkpoint.parent.map(|id| id.as_i64()),
            checkpoint.name.as_str(),
            checkpoint.owner,
            Json(&checkpoint.tags),
            signed(checkpoint.memory_bytes),
            signed(checkpoint.disk_bytes),
            checkpoint.created_at.as_millis(),
            checkpoint.expires_at.map(Timestamp::as_millis),
        ],
    )
    .map_err(|e| name_taken(e, "checkpoint", checkpoint.name.as_str(), "checkpoints.name"))?;
    Ok(())
}

/// Records that a checkpoint's files are whole.
pub fn made(
    tx: &Connection,
    checkpoint: &CheckpointRecord,
    drives: &[CheckpointDrive],
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE checkpoints SET state = 'ready', token = ?2, manifest = ?3, kernel_id = ?4, memory_bytes = ?5, disk_bytes = ?6,
            pause_ms = ?7, parent_id = ?8
         WHERE id = ?1",
        params![
            checkpoint.id.as_i64(),
            checkpoint.token,
            checkpoint.manifest.as_ref().map(Json),
            checkpoint.manifest.as_ref().and_then(|manifest| manifest.kernel_id).map(|id| id.as_i64()),
            signed(checkpoint.memory_bytes),
            signed(checkpoint.disk_bytes),
            signed(checkpoint.pause_ms),
            checkpoint.parent.map(|id| id.as_i64()),
        ],
    )?;
    for drive in drives {
        tx.execute(
            "INSERT INTO checkpoint_drives (checkpoint_id, position, drive_id, name, mount, size_bytes, read_only, image_id)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                checkpoint.id.as_i64(),
                drive.position,
                drive.drive.as_i64(),
                drive.name.as_str(),
                drive.mount,
                signed(drive.size.as_bytes()),
                drive.read_only,
                drive.image_id.map(|id| id.as_i64()),
            ],
        )?;
    }
    Ok(())
}

/// Records what a checkpoint's memory occupies by now, in bytes.
pub fn set_memory_bytes(tx: &Connection, id: CheckpointId, bytes: u64) -> Result<(), StoreError> {
    let sql = "UPDATE checkpoints SET memory_bytes = ?1 WHERE id = ?2";
    tx.execute(sql, params![signed(bytes), id.as_i64()])?;
    Ok(())
}

/// Removes a checkpoint. Those that came after it hang from its parent from then on.
pub fn delete(tx: &Connection, id: CheckpointId) -> Result<(), StoreError> {
    let parent = "(SELECT parent_id FROM checkpoints WHERE id = ?1)";
    tx.execute(&format!("UPDATE checkpoints SET parent_id = {parent} WHERE parent_id = ?1"), [id.as_i64()])?;
    tx.execute(&format!("UPDATE vms SET checkpoint_id = {parent} WHERE checkpoint_id = ?1"), [id.as_i64()])?;
    tx.execute("DELETE FROM checkpoints WHERE id = ?1", [id.as_i64()])?;
    Ok(())
}

/// Finds a checkpoint by its id.
pub fn get(db: &Connection, id: CheckpointId) -> Result<Option<CheckpointRecord>, StoreError> {
    let sql = "SELECT * FROM checkpoints WHERE id = ?1 AND state = 'ready'";
    Ok(db.prepare_cached(sql)?.query_row([id.as_i64()], record).optional()?)
}

/// The checkpoints of this name, oldest first.
pub fn named(db: &Connection, name: &Name) -> Result<Vec<CheckpointRecord>, StoreError> {
    let sql = "SELECT * FROM checkpoints WHERE name = ?1 AND state = 'ready' ORDER BY seq";
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map([name.as_str()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Checkpoints in the order of their creation, after the position `after`.
pub fn list(
    db: &Connection,
    vm: Option<VmId>,
    after: Option<i64>,
    limit: u32,
) -> Result<Vec<CheckpointRecord>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM checkpoints
         WHERE state = 'ready' AND (?1 IS NULL OR vm_id = ?1) AND seq > ?2 ORDER BY seq LIMIT ?3",
    )?;
    let rows = statement.query_map(params![vm.map(|id| id.as_i64()), after.unwrap_or(0), limit], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Every checkpoint, also those that are being made.
pub fn all(db: &Connection) -> Result<Vec<CheckpointRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM checkpoints ORDER BY seq")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The checkpoints whose life is over.
pub fn expired(db: &Connection, now: Timestamp) -> Result<Vec<CheckpointRecord>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM checkpoints WHERE state = 'ready' AND expires_at <= ?1 ORDER BY seq",
    )?;
    let rows = statement.query_map([now.as_millis()], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The copies of drives of a checkpoint, in their order.
pub fn drives_of(db: &Connection, id: CheckpointId) -> Result<Vec<CheckpointDrive>, StoreError> {
    let sql = "SELECT * FROM checkpoint_drives WHERE checkpoint_id = ?1 ORDER BY position";
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map([id.as_i64()], drive)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What the VM of a checkpoint might reach when it was deleted; `None` if it is not known, or if the VM is there.
pub fn last_network(db: &Connection, id: CheckpointId) -> Result<Option<NetworkPolicy>, StoreError> {
    let sql = "SELECT network FROM checkpoints WHERE id = ?1";
    let found = db.prepare_cached(sql)?.query_row([id.as_i64()], |row| row.json_opt("network"));
    Ok(found.optional()?.flatten())
}

/// Whether a VM goes on from a checkpoint.
pub fn is_current(db: &Connection, id: CheckpointId, vm: VmId) -> Result<bool, StoreError> {
    let sql = "SELECT 1 FROM vms WHERE id = ?1 AND checkpoint_id = ?2";
    Ok(db.prepare_cached(sql)?.exists(params![vm.as_i64(), id.as_i64()])?)
}

/// Records that an operation forks a VM: if it does not end well, the VM is removed.
pub fn claim_fork(tx: &Connection, op: OpId, vm: VmId) -> Result<(), StoreError> {
    tx.execute("UPDATE vms SET fork_op = ?1 WHERE id = ?2", params![op.as_i64(), vm.as_i64()])?;
    Ok(())
}

/// Records that all VMs of a fork are made.
pub fn keep_forks(tx: &Connection, op: OpId) -> Result<(), StoreError> {
    tx.execute("UPDATE vms SET fork_op = NULL WHERE fork_op = ?1", [op.as_i64()])?;
    Ok(())
}

/// The VMs that an operation has not finished forking.
pub fn unfinished_forks(db: &Connection) -> Result<Vec<VmId>, StoreError> {
    let mut statement = db.prepare_cached("SELECT id FROM vms WHERE fork_op IS NOT NULL ORDER BY id")?;
    let rows = statement.query_map([], |row| row.id("id"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
