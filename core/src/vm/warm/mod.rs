//! Warm starts: a new VM goes on from a machine that was booted before it, and saved once it was ready.
//!
//! ```text
//! vm_create, cold ─> ready ─> prepare: a machine of the same sort, without a row, boots on a drive of its own ─> saved ─> prepared/<id>
//! vm_create, warm ─> drive: a copy of the machine's ─> its memory restored ─> renewed, configured ─> disk grown ─> ready
//!                      └─ whatever fails: the drive becomes one of the image, and the VM starts cold
//! ```
//! Nobody's VM is saved for this, and nothing that is set for one VM is in such a machine: its hostname is `localhost`, it has no network, environment or
//! files, and no command ever ran in it. It has no row: a daemon that was killed meanwhile leaves a VMM, a directory and a drive that no VM has, which the
//! next one ends and removes as all such. What is prepared is found by its files alone, in a directory that has its name once it is whole.
//!
//! A VM keeps [`VmSpec::warm`](crate::store::vms::VmSpec) from the copy of the drive until its guest has all that it is to have. As long as that is there, a
//! cold start replaces the drive, and so does its detach: afterwards somebody may have used it.

mod keep;
mod make;
pub(crate) mod pool;

use std::path::Path;
use std::time::Duration;

use nexus_schema::id::{AssetId, CheckpointId, DriveId, ImageId, VmId};
use nexus_schema::link::InitMode;
use nexus_schema::network::NetworkMode;
use nexus_schema::{Arch, ByteSize, ErrorCode, ToolError};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::checkpoint::check_at;
use super::defaults;
use crate::context::{Shared, Used, drive_error};
use crate::os::paths::checkpoint_files;
use crate::os::remove as files;
use crate::progress::Progress;
use crate::store::checkpoints::Manifest;
use crate::store::drives::DriveRecord;
use crate::store::vms::{TmpPlace, VmRecord, VmSpec};
use crate::vmm::ShimClient;

pub(in crate::vm) use keep::sweep;
pub(crate) use keep::{removable, remove, tidy};
pub(in crate::vm) use make::prepare_later;

/// Timeout for a VMM to end after it was killed.
const END_MAX: Duration = Duration::from_secs(20);

/// What VMs have in common that can go on from the same machine: all that a guest's state depends on when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::vm) struct Sort {
    /// The daemon's version, which decides about the kernel's command line and the devices.
    nexus: String,
    image: ImageId,
    kernel: AssetId,
    /// The name of the initramfs, which has its digest and so that of the agent.
    initramfs: String,
    driver: String,
    driver_version: String,
    accel: String,
    vcpus: u32,
    memory: ByteSize,
    tmp: TmpPlace,
}

impl Sort {
    /// The sort as one line.
    fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A machine that new VMs can go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::vm) struct Prepared {
    sort: Sort,
    /// The token of its boot.
    pub(in crate::vm) token: String,
    /// Its drive, whose copy has this name.
    drive: DriveId,
    /// The size of that drive.
    pub(in crate::vm) disk: ByteSize,
    /// What a restore needs to know.
    pub(in crate::vm) manifest: Manifest,
}

impl Prepared {
    /// Its id, and the name of its directory.
    pub(in crate::vm) const fn id(&self) -> CheckpointId {
        self.manifest.checkpoint
    }
}

/// Whether VMs go on from prepared machines here.
async fn is_on(shared: &Shared) -> Result<bool, ToolError> {
    Ok(defaults::read(&shared.store).await?.warm_start)
}

/// Whether VMs like this one can start warm at all.
fn may_start_warm(spec: &VmSpec) -> bool {
    // A network card has addresses that are the VM's own, and an init of the image starts services that remember things.
    let is_plain = spec.init == InitMode::Agent && spec.network.mode != NetworkMode::Nat;
    is_plain && spec.checkpoints && spec.start
}

/// Removes what a machine without a row has on the disk. What cannot be removed is removed at the next start.
async fn remove_files(shared: &Shared, vm: VmId, drive: DriveId) {
    let directory = shared.paths.vm(vm);
    crate::vmm::remove_sockets(&directory);
    files::tree(&directory).await;
    if let Err(error) = shared.drives.delete(&shared.paths.drive(drive)).await {
        tracing::warn!(%error, "cannot remove the drive of a machine without a vm");
    }
}

/// Ends the VMM of a machine. Fails if it is still running after it was killed.
async fn try_end(shim: &ShimClient) -> Result<(), ToolError> {
    if let Err(error) = shim.kill().await {
        tracing::warn!(%error, "cannot kill the VMM of a machine without a vm");
    }
    match timeout(END_MAX, shim.wait()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(ToolError::new(ErrorCode::Timeout, "its VMM is still running after it was killed")),
    }
}

/// The sort of a VM whose image and kernel are known; `None` if such VMs always start cold.
async fn sort_of(shared: &Shared, record: &VmRecord) -> Result<Option<Sort>, ToolError> {
    let spec = &record.spec;
    let (Some(image), Some(kernel)) = (record.image_id, record.kernel_id) else { return Ok(None) };
    if !may_start_warm(spec) || record.arch != Arch::HOST.as_str() {
        return Ok(None);
    }
    let choice = shared.choose_driver_of(record).await?;
    if !choice.caps.fork {
        return Ok(None);
    }
    let files = shared.kernel_files(record).await?;
    let initramfs = shared.initramfs(files.as_ref()).await?;
    Ok(Some(Sort {
        nexus: env!("CARGO_PKG_VERSION").to_owned(),
        image,
        kernel,
        initramfs: initramfs.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        driver: choice.driver.as_str().to_owned(),
        driver_version: choice.version.clone(),
        accel: choice.accel.as_str().to_owned(),
        vcpus: spec.vcpus,
        memory: spec.memory,
        tmp: spec.tmp,
    }))
}

/// Returns the machine that a new VM can go on from, if there is one.
pub(in crate::vm) async fn find(shared: &Shared, record: &VmRecord) -> Option<Prepared> {
    look(shared, record).await.unwrap_or_else(|error| {
        tracing::warn!(vm = %record.name, %error, "cannot look for a prepared machine");
        None
    })
}

async fn look(shared: &Shared, record: &VmRecord) -> Result<Option<Prepared>, ToolError> {
    if !is_on(shared).await? {
        return Ok(None);
    }
    let Some(sort) = sort_of(shared, record).await? else { return Ok(None) };
    let all = keep::all(shared).await?;
    Ok(all.into_iter().find(|prepared| prepared.sort == sort && prepared.disk <= record.spec.disk))
}

/// Makes the drive of a new VM as a copy of that of a prepared machine. It is as long as that one until the guest runs.
pub(in crate::vm) async fn copy_drive(
    shared: &Shared,
    prepared: &Prepared,
    drive: DriveId,
    progress: &Progress,
) -> Result<(), ToolError> {
    let id = prepared.id();
    let _used = begin_use(shared, id).await?;
    let file = shared.paths.prepared(id).join(checkpoint_files::DRIVES).join(copy_name(prepared.drive));
    let path = shared.paths.drive(drive);
    shared.drives.copy_exactly(&file, &path, prepared.disk, progress).await.map_err(drive_error)
}

/// The name of the copy of a drive.
fn copy_name(drive: DriveId) -> String {
    format!("{drive}.ext4")
}

/// Begins to use a prepared machine, which is not removed meanwhile.
async fn begin_use(shared: &Shared, id: CheckpointId) -> Result<Used, ToolError> {
    shared.checkpoints.read(id).await.ok_or_else(|| gone("it is being removed"))
}

fn gone(why: &str) -> ToolError {
    ToolError::new(ErrorCode::CheckpointNotFound, format!("the prepared machine cannot be used: {why}"))
}

/// Begins to use a prepared machine. If it is to be checked, all of its files are as they were written, and this host can restore it.
pub(in crate::vm) async fn take(
    shared: &Shared,
    id: CheckpointId,
    is_checked: bool,
) -> Result<(Prepared, Used), ToolError> {
    let used = begin_use(shared, id).await?;
    let directory = shared.paths.prepared(id);
    let path = directory.clone();
    let read = spawn_blocking(move || {
        let found = read(&path)?;
        keep::touch(&path);
        Some(found)
    });
    let read = read.await.map_err(|e| ToolError::internal(format!("read a prepared machine: {e}")))?;
    let prepared = read.ok_or_else(|| gone("its files are missing or damaged"))?;
    if is_checked {
        let checked = check_at(shared, directory, prepared.manifest.clone()).await?;
        checked.map_err(|error| gone(&nexus_schema::error::chain(&error)))?;
    }
    Ok((prepared, used))
}

/// Reads what is known of the machine in a directory. Blocks.
fn read(directory: &Path) -> Option<Prepared> {
    let text = std::fs::read(directory.join(checkpoint_files::PREPARED)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Returns the root drive of a VM, and its place among the drives.
pub(in crate::vm) fn root_of(drives: &[DriveRecord]) -> Result<(usize, &DriveRecord), ToolError> {
    let root = drives.iter().enumerate().find(|(_, drive)| drive.is_root());
    root.ok_or_else(|| ToolError::new(ErrorCode::DriveNotFound, "the VM has no root drive"))
}
