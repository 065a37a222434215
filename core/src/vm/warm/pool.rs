//! Machines that wait: each is restored for one VM that nobody has asked for yet, and stands still, without a row.
//!
//! ```text
//! prepared machine ─> drive copied, memory restored, paused ─> waits ─> reserved by a vm_create ─> claimed: the VM has its id ─> resumed, renewed, ready
//!                                                                                                    └─ does not fit: ended, and the VM goes on without it
//! ```
//! What a killed daemon leaves of those that wait is ended by the next one as all that has no row, and of those that were claimed before its VM's task is
//! there ([`end_stray`]).

use std::sync::{Arc, Weak};
use std::time::Duration;

use nexus_schema::id::{BootId, DriveId, VmId};
use nexus_schema::link::InitMode;
use nexus_schema::tools::vm::{VmCreateParams, VmState};
use nexus_schema::{Arch, ErrorCode, Name, ToolError};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::make::{MEMORY_LEFT, drive_of, is_busy, prepare};
use super::{Prepared, copy_drive, find, may_start_warm, remove_files, take, try_end};
use crate::context::{Reserved, Shared, Waiting};
use crate::os::paths::checkpoint_files;
use crate::os::{failpoint, meminfo, random};
use crate::progress::Progress;
use crate::store::random_id;
use crate::store::vms::{VmRecord, VmSpec};
use crate::vm::actor::DAEMON;
use crate::vm::checkpoint::choose;
use crate::vm::spec::{self, Defaults};
use crate::vm::{boot, create, defaults};
use crate::vmm::{LaunchPlan, Restore, SavedKind, ShimClient};

/// The interval in which it is looked whether enough machines wait.
const LOOK: Duration = Duration::from_secs(30);
/// The first context id of machines that wait. A machine's user in its jail depends on it.
const CID_FIRST: u32 = 0x7f00_0000;

/// Keeps as many machines waiting as the settings say, as long as the daemon runs.
pub(crate) async fn keep(shared: Weak<Shared>) {
    loop {
        let Some(now) = shared.upgrade() else { return };
        let warming = now.warming.clone();
        let Some(adding) = warming.begin_pool().await else { return };
        if let Err(error) = Box::pin(fill(&now)).await {
            tracing::warn!(%error, "cannot look for machines that wait for new VMs");
        }
        drop(adding);
        drop(now);
        tokio::select! {
            () = warming.changed() => {}
            () = sleep(LOOK) => {}
            () = warming.stop().cancelled() => return,
        }
    }
}

/// Ends machines that are not to wait any more, and adds those that are missing.
async fn fill(shared: &Arc<Shared>) -> Result<(), ToolError> {
    let mut defaults = defaults::read(&shared.store).await?;
    if !defaults.warm_start {
        defaults.warm_pool.clear();
    }
    for (from, count) in &defaults.warm_pool {
        let mut left = *count;
        end_all(shared, |waiting| {
            let is_there = shared.paths.prepared(waiting.machine).join(checkpoint_files::PREPARED).exists();
            let is_kept = waiting.from == *from && is_there && left > 0;
            left -= u32::from(is_kept);
            waiting.from == *from && !is_kept
        })
        .await;
    }
    end_all(shared, |waiting| !defaults.warm_pool.contains_key(&waiting.from)).await;
    for (from, count) in &defaults.warm_pool {
        while shared.warming.count(from) < *count as usize {
            match Box::pin(add(shared, from, &defaults)).await {
                Ok(true) => {}
                Ok(false) => break,
                // Those of other images may be there all the same.
                Err(error) => {
                    tracing::warn!(from, %error, "too few machines wait for new VMs");
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Ends those of the machines that wait.
async fn end_all(shared: &Arc<Shared>, is_surplus: impl FnMut(&Waiting) -> bool) {
    for waiting in shared.warming.take(is_surplus) {
        discard(shared, waiting).await;
    }
}

/// Ends all machines that wait, for the end of the daemon.
pub(crate) async fn end(shared: &Arc<Shared>) {
    let all = shared.warming.take(|_| true);
    futures::future::join_all(all.into_iter().map(|waiting| discard(shared, waiting))).await;
}

/// Adds a machine for VMs of an image. Returns `false` if none can be added now.
async fn add(shared: &Arc<Shared>, from: &str, defaults: &Defaults) -> Result<bool, ToolError> {
    if !shared.needs_kernel() {
        return Ok(false);
    }
    let record = like(shared, from, defaults).await?;
    // Those of another architecture are emulated, and cannot be saved.
    if record.arch != Arch::HOST.as_str() {
        return Ok(false);
    }
    let prepared = match find(shared, &record).await {
        Some(prepared) => prepared,
        None => {
            let Some(making) = shared.warming.begin() else { return Ok(false) };
            let made = Box::pin(prepare(shared, record.clone())).await;
            drop(making);
            if made?.is_none() {
                return Ok(false);
            }
            let Some(prepared) = find(shared, &record).await else { return Ok(false) };
            prepared
        }
    };
    if is_busy(shared) {
        return Ok(false);
    }
    let needed = record.spec.memory.as_bytes().saturating_add(MEMORY_LEFT);
    let memory = spawn_blocking(meminfo::read).await;
    let memory = memory.map_err(|e| ToolError::internal(format!("look at the host: {e}")))?;
    if memory.is_ok_and(|memory| memory.available < needed) || shared.warming.stop().is_cancelled() {
        return Ok(false);
    }
    let choice = choose(shared, &prepared.manifest).await?;
    // Others cannot go on from a pause without a copy of all of the memory.
    if !choice.caps.keeps_connections {
        return Ok(false);
    }
    let waiting = match restore(shared, from, record, &prepared).await {
        Ok(waiting) => waiting,
        Err(error) => {
            if error.code == ErrorCode::CheckpointNotFound {
                // It is damaged, or of another host: the next look prepares another one.
                super::remove(shared, prepared.id()).await;
            }
            return Err(error);
        }
    };
    tracing::info!(machine = %waiting.machine, vm = %waiting.vm, from, "a machine waits for a new vm");
    shared.warming.add(waiting);
    Ok(true)
}

/// A VM of an image, as the defaults are, without a row.
async fn like(shared: &Arc<Shared>, from: &str, defaults: &Defaults) -> Result<VmRecord, ToolError> {
    let name = "waiting".parse::<Name>().map_err(|e| ToolError::internal(format!("{e}")))?;
    let params =
        VmCreateParams { from: Some(from.to_owned()), checkpoints: Some(true), ..VmCreateParams::default() };
    let mut spec = spec::check(&params, &name, defaults)?;
    let progress = Progress::default();
    let kernel = shared.provision.kernel(&spec.kernel, Arch::HOST, DAEMON, &progress).await?;
    let image = shared.provision.image(&spec.from, DAEMON, &progress).await?;
    spec.disk = create::disk_of(&spec, &image)?;
    if spec.init == InitMode::Agent {
        spec.init = image.init;
    }
    let (owner, arch) = (DAEMON.to_owned(), image.arch.clone());
    Ok(VmRecord {
        state: VmState::Created,
        image_id: Some(image.id),
        image_name: image.name.to_string(),
        kernel_id: Some(kernel.id),
        ..VmRecord::creating(random_id(), name, owner, arch, CID_FIRST, spec)
    })
}

/// Restores a machine for one VM, and has it stand still.
async fn restore(
    shared: &Arc<Shared>,
    from: &str,
    like: VmRecord,
    prepared: &Prepared,
) -> Result<Waiting, ToolError> {
    let (prepared, _used) = take(shared, prepared.id(), true).await?;
    let (vm, drive): (VmId, DriveId) = (random_id(), random_id());
    copy_drive(shared, &prepared, drive, &Progress::default()).await?;
    // Different ones for the users of their jails.
    let record = VmRecord { id: vm, cid: CID_FIRST + (vm.as_i64() & 0xf_ffff) as u32, ..like };
    let (boot_id, nonce): (BootId, String) = (random_id(), random::token());
    let launched = launch(shared, &record, &prepared, (drive, boot_id), nonce.clone()).await;
    match launched {
        Ok(shim) => Ok(Waiting {
            vm,
            drive,
            boot_id,
            nonce,
            machine: prepared.id(),
            from: from.to_owned(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            disk: prepared.disk,
            shim,
        }),
        Err(error) => {
            remove_files(shared, vm, drive).await;
            Err(error)
        }
    }
}

async fn launch(
    shared: &Arc<Shared>,
    record: &VmRecord,
    prepared: &Prepared,
    (drive, boot_id): (DriveId, BootId),
    nonce: String,
) -> Result<ShimClient, ToolError> {
    let choice = choose(shared, &prepared.manifest).await?;
    let kernel = shared.kernel_files(record).await?;
    let initramfs = shared.initramfs(kernel.as_ref()).await?;
    let drives = [drive_of(record, drive)];
    let directory = shared.paths.prepared(prepared.id());
    let restore = Restore {
        state: directory.join(checkpoint_files::STATE),
        ram: directory.join(checkpoint_files::RAM),
        kind: if prepared.manifest.private { SavedKind::Private } else { SavedKind::Shared },
        nonce,
    };
    let plan = LaunchPlan {
        restore: Some(restore),
        ..boot::plan(shared, record, &drives, boot_id, &choice, kernel.as_ref(), &initramfs)
    };
    let made = fs_err::create_dir_all(&plan.directory);
    made.map_err(|e| ToolError::internal(format!("make the machine's directory: {e}")))?;
    let launched = ShimClient::launch(&shared.config.shim_binary, &plan).await;
    let shim = launched.map_err(|error| boot::launch_failed(record.name.as_str(), &error))?;
    if let Err(error) = shim.pause().await {
        end_vmm(&shim).await;
        return Err(boot::launch_failed(record.name.as_str(), &error));
    }
    failpoint::reach("pool-restored");
    Ok(shim)
}

/// Reserves a machine that waits for a VM like this one. The VM must have its id.
pub(in crate::vm) fn reserve(shared: &Shared, spec: &VmSpec) -> Option<Reserved> {
    if !may_start_warm(spec) {
        return None;
    }
    shared.warming.reserve(|waiting| {
        waiting.from == spec.from
            && (waiting.vcpus, waiting.memory) == (spec.vcpus, spec.memory)
            && waiting.disk <= spec.disk
    })
}

/// Ends the machine that a VM has claimed, if it does not go on from that after all. Its files stay: they are the VM's.
pub(in crate::vm) async fn end_claim(shared: &Shared, vm: VmId) {
    if let Some(waiting) = shared.warming.take_claim(vm) {
        end_vmm(&waiting.shim).await;
    }
}

/// The same, with its files: the VM gets others.
pub(in crate::vm) async fn discard_claim(shared: &Arc<Shared>, vm: VmId) {
    if let Some(waiting) = shared.warming.take_claim(vm) {
        let shared = shared.clone();
        // To its end, also if nobody waits for that any more.
        tokio::spawn(async move { discard(&shared, waiting).await }).await.ok();
    }
}

async fn discard(shared: &Shared, waiting: Waiting) {
    end_vmm(&waiting.shim).await;
    remove_files(shared, waiting.vm, waiting.drive).await;
}

/// Ends the VMM of a machine that waits.
pub(in crate::vm) async fn end_vmm(shim: &ShimClient) {
    if let Err(error) = try_end(shim).await {
        tracing::error!(%error, "cannot end a machine that waited");
    }
}

/// For the start of the daemon: ends what an earlier one has restored for a VM whose start it did not come to. A VM that is created names the machine that
/// it goes on from: without one, what runs is the VM itself, which an older copy of the database has as not started.
pub(in crate::vm) async fn end_stray(shared: &Shared, record: &VmRecord) {
    let may_have_one = match record.state {
        VmState::Creating => true,
        VmState::Created => record.spec.warm.is_some(),
        _ => false,
    };
    if !may_have_one {
        return;
    }
    let directory = shared.paths.vm(record.id);
    let identity = match ShimClient::discover(&directory) {
        Ok(Some(identity)) => identity,
        Ok(None) => return,
        Err(error) => return tracing::warn!(%error, "cannot look for a shim"),
    };
    match ShimClient::adopt(&directory, identity).await {
        Ok(Some(shim)) => end_vmm(&shim).await,
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "cannot adopt the shim of a machine that waited"),
    }
}
