//! VMs and the drives that are attached to them.

use std::collections::BTreeMap;

use nexus_schema::id::{AssetId, BootId, CheckpointId, ImageId, VmId, VmKind};
use nexus_schema::link::{Hello, InitMode, Resumed};
use nexus_schema::network::NetworkPolicy;
use nexus_schema::tools::vm::{DriverChoice, IdleAction, VmFile, VmState, VmTimings};
use nexus_schema::{ByteSize, Name, Reference, TimeSpan, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::columns::{Json, RowExt, Text};
use super::suspended::Suspended;
use super::{StoreError, drives, name_taken, now};

/// The request that created a VM, with all defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Size of the root drive.
    pub disk: ByteSize,
    /// Whether the caller gave that size.
    #[serde(default)]
    pub disk_given: bool,
    /// Name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<std::net::IpAddr>,
    /// Which VMM.
    pub driver: DriverChoice,
    /// What is PID 1.
    pub init: InitMode,
    /// What it may connect to.
    pub network: NetworkPolicy,
    /// The hostname inside.
    pub hostname: String,
    /// Environment variables of every command.
    pub env: BTreeMap<String, String>,
    /// The default working directory of commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// The user that the image names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_user: Option<String>,
    /// Where `/tmp` is.
    #[serde(default)]
    pub tmp: TmpPlace,
    /// Whether it becomes ready only once the image's own init has started the system.
    #[serde(default = "yes")]
    pub wait_for_init: bool,
    /// Files to write before it becomes ready for the first time; empty afterwards.
    #[serde(default)]
    pub files: BTreeMap<String, VmFile>,
    /// The image as requested.
    pub from: String,
    /// The kernel as requested.
    pub kernel: String,
    /// Whether it is started right after its creation.
    pub start: bool,
    /// How long it may be idle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_stop: Option<TimeSpan>,
    /// What happens to it then.
    #[serde(default, skip_serializing_if = "is_stop")]
    pub idle_action: IdleAction,
    /// Whether it is made so that checkpoints of it can be taken.
    #[serde(default, skip_serializing_if = "is_false")]
    pub checkpoints: bool,
    /// The only command that it exists for: it is deleted when that has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The prepared machine that its root drive is a copy of, until its guest has gone on from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<CheckpointId>,
}

const fn yes() -> bool {
    true
}

const fn is_false(value: &bool) -> bool {
    !*value
}

const fn is_stop(action: &IdleAction) -> bool {
    matches!(action, IdleAction::Stop)
}

/// Where `/tmp` of a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TmpPlace {
    /// On its root drive.
    #[default]
    Disk,
    /// In its memory.
    Tmpfs,
}

/// What is known of a guest since its hello message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// Its hello message, without the token.
    pub hello: Hello,
    /// The protocol generation in use.
    pub protocol: u32,
    /// Whether it applied its configuration.
    #[serde(default)]
    pub configured: bool,
    /// The parts of its configuration that could not be applied.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What it renewed, if it was restored from a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
}

/// Where a VM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lineage {
    /// The VM that it was forked from; it may be deleted since.
    pub parent: Option<VmId>,
    /// The checkpoint that it goes on from: the last one that was taken of it, or that it was restored from.
    pub checkpoint: Option<CheckpointId>,
}

/// The processes of a running VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmProcesses {
    /// The shim's process id.
    pub shim_pid: u32,
    /// The shim's start time, in clock ticks since the host booted.
    pub shim_start: u64,
    /// The VMM's process id.
    pub vmm_pid: u32,
}

/// One row of `vms`.
#[derive(Debug, Clone, PartialEq)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: Name,
    /// Its state.
    pub state: VmState,
    /// Details about that state, if any.
    pub reason: Option<String>,
    /// Counts every change.
    pub generation: u64,
    /// Who made it.
    pub owner: String,
    /// Its labels.
    pub tags: BTreeMap<String, String>,
    /// Whether deletion is refused.
    pub protected: bool,
    /// The architecture.
    pub arch: String,
    /// The vsock context id.
    pub cid: u32,
    /// The request.
    pub spec: VmSpec,
    /// The image of its root drive, while it exists.
    pub image_id: Option<ImageId>,
    /// The name of that image.
    pub image_name: String,
    /// The kernel, once it is known.
    pub kernel_id: Option<AssetId>,
    /// The VMM that ran it last.
    pub driver: Option<String>,
    /// That VMM's version.
    pub driver_version: Option<String>,
    /// `kvm` or `tcg`.
    pub accel: Option<String>,
    /// The current or last boot.
    pub boot_id: Option<BootId>,
    /// The secret of that boot.
    pub token: Option<String>,
    /// What the guest reported in that boot.
    pub guest: Option<GuestRecord>,
    /// The timings of that boot.
    pub timings: Option<VmTimings>,
    /// The processes of that boot.
    pub processes: Option<VmProcesses>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was started last.
    pub started_at: Option<Timestamp>,
    /// When its life is over.
    pub expires_at: Option<Timestamp>,
    /// Where it comes from.
    pub lineage: Lineage,
    /// Its saved memory, from when that is whole until the VM is ready again.
    pub suspended: Option<Box<Suspended>>,
}

impl VmRecord {
    /// The row of a VM whose creation begins, without what is known only later.
    pub(crate) fn creating(
        id: VmId,
        name: Name,
        owner: String,
        arch: String,
        cid: u32,
        spec: VmSpec,
    ) -> Self {
        Self {
            id,
            name,
            state: VmState::Creating,
            reason: None,
            generation: 1,
            owner,
            tags: BTreeMap::new(),
            protected: false,
            arch,
            cid,
            image_id: None,
            image_name: spec.from.clone(),
            kernel_id: None,
            driver: None,
            driver_version: None,
            accel: None,
            boot_id: None,
            token: None,
            guest: None,
            timings: None,
            processes: None,
            created_at: now(),
            started_at: None,
            expires_at: None,
            lineage: Lineage::default(),
            suspended: None,
            spec,
        }
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
    let shim: Option<u32> = row.get("shim_pid")?;
    let start: Option<i64> = row.get("shim_start")?;
    let vmm: Option<u32> = row.get("vmm_pid")?;
    Ok(VmRecord {
        id: row.id("id")?,
        name: row.text("name")?,
        state: row.text("state")?,
        reason: row.get("reason")?,
        generation: row.unsigned("generation")?,
        owner: row.get("owner")?,
        tags: row.json("tags")?,
        protected: row.get("protected")?,
        arch: row.get("arch")?,
        cid: row.get("cid")?,
        spec: row.json("spec")?,
        image_id: row.id_opt("image_id")?,
        image_name: row.get("image_name")?,
        kernel_id: row.id_opt("kernel_id")?,
        driver: row.get("driver")?,
        driver_version: row.get("driver_version")?,
        accel: row.get("accel")?,
        boot_id: row.id_opt("boot_id")?,
        token: row.get("token")?,
        guest: row.json_opt("guest")?,
        timings: row.json_opt("timings")?,
        processes: match (shim, start, vmm) {
            (Some(shim_pid), Some(start), Some(vmm_pid)) => {
                Some(VmProcesses { shim_pid, shim_start: u64::try_from(start).unwrap_or(0), vmm_pid })
            }
            _ => None,
        },
        created_at: row.time("created_at")?,
        started_at: row.time_opt("started_at")?,
        expires_at: row.time_opt("expires_at")?,
        lineage: Lineage { parent: row.id_opt("parent_id")?, checkpoint: row.id_opt("checkpoint_id")? },
        suspended: row.json_opt("suspended")?,
    })
}

/// The first context id for VMs; 0 to 2 mean the hypervisor, loopback and the host.
pub const CID_FIRST: u32 = 3;

/// The lowest free context id.
pub fn free_cid(tx: &Connection) -> Result<u32, StoreError> {
    let cid: Option<u32> = tx
        .prepare_cached(
            "SELECT coalesce(
                (SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM vms WHERE cid = ?1)),
                (SELECT min(a.cid) + 1 FROM vms a WHERE NOT EXISTS (SELECT 1 FROM vms b WHERE b.cid = a.cid + 1)))",
        )?
        .query_row([CID_FIRST], |row| row.get(0))?;
    cid.filter(|cid| *cid < u32::MAX).ok_or(StoreError::NoCid)
}

/// Adds a VM.
pub fn insert(tx: &Connection, vm: &VmRecord) -> Result<(), StoreError> {
    tx.prepare_cached(
        "INSERT INTO vms (id, name, state, reason, generation, owner, tags, protected, arch, cid, spec, image_id,
            image_name, kernel_id, created_at, expires_at, parent_id, checkpoint_id)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)",
    )?
    .execute(params![
        vm.id.as_i64(),
        vm.name.as_str(),
        vm.state.as_str(),
        vm.reason,
        vm.generation as i64,
        vm.owner,
        Json(&vm.tags),
        vm.protected,
        vm.arch,
        vm.cid,
        Json(&vm.spec),
        vm.image_id.map(|id| id.as_i64()),
        vm.image_name,
        vm.kernel_id.map(|id| id.as_i64()),
        vm.created_at.as_millis(),
        vm.expires_at.map(Timestamp::as_millis),
        vm.lineage.parent.map(|id| id.as_i64()),
        vm.lineage.checkpoint.map(|id| id.as_i64()),
    ])
    .map_err(|e| name_taken(e, "VM", vm.name.as_str(), "vms.name"))?;
    Ok(())
}

/// Updates everything of a VM that can change, if its stored generation is still `expected`. One that may run may write to its drives.
pub fn update(tx: &Connection, vm: &VmRecord, expected: u64) -> Result<(), StoreError> {
    let changed = tx
        .prepare_cached(
            "UPDATE vms SET state = ?3, reason = ?4, generation = ?5, tags = ?6, protected = ?7, image_id = ?8,
                kernel_id = ?9, driver = ?10, driver_version = ?11, accel = ?12, boot_id = ?13, token = ?14, guest = ?15,
                timings = ?16, shim_pid = ?17, shim_start = ?18, vmm_pid = ?19, started_at = ?20, image_name = ?21,
                spec = ?22, name = ?23, expires_at = ?24, checkpoint_id = ?25,
                suspended = ?26, arch = ?27
             WHERE id = ?1 AND generation = ?2",
        )?
        .execute(params![
            vm.id.as_i64(),
            expected as i64,
            vm.state.as_str(),
            vm.reason,
            vm.generation as i64,
            Json(&vm.tags),
            vm.protected,
            vm.image_id.map(|id| id.as_i64()),
            vm.kernel_id.map(|id| id.as_i64()),
            vm.driver,
            vm.driver_version,
            vm.accel,
            vm.boot_id.map(|id| id.as_i64()),
            vm.token,
            vm.guest.as_ref().map(Json),
            vm.timings.as_ref().map(Json),
            vm.processes.map(|p| p.shim_pid),
            vm.processes.map(|p| p.shim_start as i64),
            vm.processes.map(|p| p.vmm_pid),
            vm.started_at.map(Timestamp::as_millis),
            vm.image_name,
            Json(&vm.spec),
            vm.name.as_str(),
            vm.expires_at.map(Timestamp::as_millis),
            vm.lineage.checkpoint.map(|id| id.as_i64()),
            vm.suspended.as_ref().map(Json),
            vm.arch,
        ])
        .map_err(|e| name_taken(e, "VM", vm.name.as_str(), "vms.name"))?;
    if changed != 1 {
        return Err(StoreError::Changed { what: format!("vm {}", vm.name) });
    }
    if vm.state.may_run() { drives::note_start(tx, vm.id) } else { Ok(()) }
}

/// Removes a VM; its history stays. Its checkpoints keep what it might reach.
pub fn delete(tx: &Connection, id: VmId) -> Result<bool, StoreError> {
    tx.execute(
        "UPDATE checkpoints SET network = (SELECT spec -> '$.network' FROM vms WHERE id = ?1) WHERE vm_id = ?1",
        [id.as_i64()],
    )?;
    Ok(tx.execute("DELETE FROM vms WHERE id = ?1", [id.as_i64()])? == 1)
}

/// Finds a VM.
pub fn get(db: &Connection, vm: &Reference<VmKind>) -> Result<Option<VmRecord>, StoreError> {
    Ok(match vm {
        Reference::Id(id) => db
            .prepare_cached("SELECT * FROM vms WHERE id = ?1")?
            .query_row([id.as_i64()], record)
            .optional()?,
        Reference::Name(name) => db
            .prepare_cached("SELECT * FROM vms WHERE name = ?1")?
            .query_row([name.as_str()], record)
            .optional()?,
    })
}

/// Every VM.
pub fn all(db: &Connection) -> Result<Vec<VmRecord>, StoreError> {
    let mut statement = db.prepare_cached("SELECT * FROM vms ORDER BY name")?;
    let rows = statement.query_map([], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A page of at most `limit` VMs by name, after `after`.
pub fn list(
    db: &Connection,
    state: Option<VmState>,
    tags: &BTreeMap<String, String>,
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<VmRecord>, StoreError> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM vms
         WHERE name > ?1 AND (?2 IS NULL OR state = ?2)
           AND NOT EXISTS (
             SELECT 1 FROM json_each(?3) want
             WHERE NOT EXISTS (SELECT 1 FROM json_each(vms.tags) have
                               WHERE have.key = want.key AND have.value = want.value))
         ORDER BY name LIMIT ?4",
    )?;
    let rows = statement
        .query_map(params![after.unwrap_or(""), state.map(VmState::as_str), Json(tags), limit], record)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many VMs there are in each state.
pub fn count_by_state(db: &Connection) -> Result<BTreeMap<String, u64>, StoreError> {
    let mut statement = db.prepare_cached("SELECT state, count(*) AS n FROM vms GROUP BY state")?;
    let rows = statement.query_map([], |row| Ok((row.get("state")?, row.unsigned("n")?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// How many VMs and checkpoints use a kernel.
pub fn count_by_kernel(db: &Connection, kernel: AssetId) -> Result<u64, StoreError> {
    let sql = "SELECT (SELECT count(*) FROM vms WHERE kernel_id = ?1) + (SELECT count(*) FROM checkpoints WHERE kernel_id = ?1) AS n";
    Ok(db.query_row(sql, [kernel.as_i64()], |row| row.unsigned("n"))?)
}

/// Whether a name is in use.
pub fn name_exists(db: &Connection, name: &Name) -> Result<bool, StoreError> {
    Ok(db.prepare_cached("SELECT 1 FROM vms WHERE name = ?1")?.exists(params![Text(name)])?)
}
