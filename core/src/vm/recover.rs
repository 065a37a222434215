//! The start of the daemon: it adopts running VMs, records the end of VMs that ended meanwhile, and removes half-created things.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::VmId;
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, Reference, ToolError};

use super::actor::{self, DAEMON};
use super::boot::{self, Boot};
use super::checkpoint::{self, Unfinished};
use super::create;
use super::last_words;
use super::network;
use super::policy;
use super::{unknown, waking, warm};
use crate::context::Shared;
use crate::drive::{DISK, Origin};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;
use crate::store::{StoreError, assets, builds, drives, history, images, leases, vms};
use crate::vmm::{Accel, Exit, ShimClient, ShimIdentity, launched_boot, read_exit};

/// Timeout for a VMM to end after it was killed.
const END_MAX: Duration = Duration::from_secs(20);

/// Brings memory, store and disk in line with the real state of the host.
pub(crate) async fn recover(shared: &Arc<Shared>) -> Result<(), ToolError> {
    // Before anything is finished, undone or removed.
    let unknown::Found { kept, is_outdated } = Box::pin(unknown::look(shared)).await?;
    // Before anything looks at drives.
    let unfinished = checkpoint::finish_all(shared).await?;
    let records = shared.store.read(vms::all).await.map_err(crate::op::store_error)?;
    let connected = shared.store.read(leases::connected).await.map_err(crate::op::store_error)?;
    let was_connected = !connected.is_empty() || records.iter().any(network::may_be_connected);
    settle_copies(shared).await?;
    settle_sizes(shared, &records, is_outdated).await?;
    // All at once, so that slow shims are waited for in parallel.
    let taken: Vec<_> =
        records.into_iter().map(|record| take_up(shared, record, &unfinished, is_outdated)).collect();
    for taken in futures::future::join_all(taken).await {
        taken?;
    }
    network::settle(shared, was_connected).await;
    or_later(
        checkpoint::sweep(shared, &kept).await,
        "the disk is full: half-made checkpoints are removed at the next start",
    )?;
    waking::sweep(shared, &kept).await?;
    warm::sweep(shared).await;
    let staged = unfinished.iter().flat_map(|left| &left.rollback.drives).map(|drive| drive.staged.clone());
    or_later(
        sweep(shared, staged.collect(), &kept).await,
        "the disk is full: unused files and rows are removed at the next start",
    )?;
    // Until here an older database is an older one at the next start, too.
    failpoint::reach("recovered");
    unknown::count_on(shared).await;
    Ok(())
}

/// Ignores an error due to a full disk, so that the daemon starts anyway. The work is repeated at the next start.
fn or_later(done: Result<(), ToolError>, later: &str) -> Result<(), ToolError> {
    match done {
        Err(error) if error.code == ErrorCode::DiskFull => {
            tracing::warn!(%error, "{later}");
            Ok(())
        }
        done => done,
    }
}

/// Starts the task of one VM, with its running VMM if there is one. Removes the VM if it is half created.
async fn take_up(
    shared: &Arc<Shared>,
    record: VmRecord,
    unfinished: &[Unfinished],
    is_outdated: bool,
) -> Result<(), ToolError> {
    let id = record.id;
    let drives = shared.store.read(move |db| drives::of_vm(db, id)).await.map_err(crate::op::store_error)?;
    warm::pool::end_stray(shared, &record).await;
    if record.state == VmState::Creating {
        tracing::info!(vm = %record.name, "removing a half-created vm");
        let ids: Vec<_> = drives.iter().map(|d| d.id).collect();
        return or_later(
            create::undo(shared, &record, &ids).await,
            "the disk is full: a half-created vm is removed at the next start",
        );
    }
    let (record, boot) = match record.state.may_run() {
        true => adopt(shared, record, &drives, is_outdated, "while nexusd was down").await?,
        false => (record, None),
    };
    let unfinished = unfinished.iter().find(|left| left.rollback.vm == record.id);
    let why_not = match unfinished {
        Some(left) => Some(checkpoint::not_finished(&left.error)),
        None if is_outdated && boot.is_none() => {
            let stray = unknown::stray_of(&shared.paths, &record).await;
            stray.map(|error| format!("{}; {}", error.message, error.hint.unwrap_or_default()))
        }
        None => None,
    };
    let record = match why_not {
        Some(why) => {
            let state = record.state;
            rewrite(shared, record, state, Some(why)).await?
        }
        None => record,
    };
    actor::spawn(shared, record, drives, boot);
    Ok(())
}

/// Finds the current state of a VM after a panic in its task; `None` if the VM was deleted. A VM that is being created keeps its state: its
/// operation continues, or undoes it.
pub(super) async fn take_up_anew(
    shared: &Arc<Shared>,
    id: VmId,
) -> Result<Option<(VmRecord, Vec<DriveRecord>, Option<Boot>)>, ToolError> {
    let found = shared
        .store
        .read(move |db| -> Result<_, StoreError> {
            Ok((vms::get(db, &Reference::Id(id))?, drives::of_vm(db, id)?))
        })
        .await
        .map_err(crate::op::store_error)?;
    let (Some(record), drives) = found else { return Ok(None) };
    warm::pool::end_stray(shared, &record).await;
    let (record, boot) = match record.state.may_run() {
        true => adopt(shared, record, &drives, false, "while its task was down").await?,
        false => (record, None),
    };
    Ok(Some((record, drives, boot)))
}

/// Handles drives whose copy was not synced when the host crashed. No VM has used them yet. Copies of images are made again; any other
/// such drive is lost, and its use fails with an error that says so.
async fn settle_copies(shared: &Shared) -> Result<(), ToolError> {
    let lost = match shared.drives.settle_all() {
        Ok(lost) => lost,
        Err(error) => {
            tracing::warn!(%error, "cannot check whether all drives were synced");
            return Ok(());
        }
    };
    if lost.is_empty() {
        return Ok(());
    }
    let all = shared.store.read(drives::all).await.map_err(crate::op::store_error)?;
    let images = shared.store.read(images::all).await.map_err(crate::op::store_error)?;
    for drive in all.into_iter().filter(|drive| drive.ready) {
        let directory = shared.paths.drive(drive.id);
        let Some((_, origin)) = lost.iter().find(|(path, _)| *path == directory) else { continue };
        let image = images.iter().find(|image| image.ready && Some(image.id) == drive.image_id);
        let Some(image) = image.filter(|_| *origin == Origin::Image) else {
            tracing::error!(drive = %drive.name, "a drive is lost: the host crashed before its copy was synced");
            continue;
        };
        let master = shared.paths.image(image.id).join(crate::image::ROOTFS);
        let made = shared.drives.clone_again(&master, &directory, drive.size, &Progress::default()).await;
        match made {
            Ok(()) => {
                tracing::info!(drive = %drive.name, image = %image.name, "copied a drive again: the host crashed before it was synced")
            }
            Err(error) => {
                tracing::error!(drive = %drive.name, %error, "cannot copy a lost drive again from its image")
            }
        }
    }
    Ok(())
}

/// Finishes interrupted resizes of drives. A disk file is never shorter than its drive, and never shrinks. Of an older database, nobody knows whether a
/// drive is in use.
async fn settle_sizes(shared: &Shared, vms: &[VmRecord], is_outdated: bool) -> Result<(), ToolError> {
    let all = shared.store.read(drives::all).await.map_err(crate::op::store_error)?;
    for drive in all.into_iter().filter(|drive| drive.ready) {
        let directory = shared.paths.drive(drive.id);
        let Ok(disk) = fs_err::metadata(directory.join(DISK)) else { continue };
        let size = ByteSize::bytes(disk.len());
        if size.as_bytes() <= drive.size.as_bytes().next_multiple_of(4096) {
            continue;
        }
        tracing::info!(drive = %drive.name, from = %drive.size, to = %size, "finishing an interrupted resize of a drive");
        let user = drive.attachment.as_ref().and_then(|to| vms.iter().find(|vm| vm.id == to.vm));
        // The filesystem of a drive in use is grown by its guest. The memory of one that sleeps knows what is on its drive.
        if !is_outdated
            && user.is_none_or(|vm| !vm.state.may_run() && vm.suspended.is_none())
            && let Err(error) = shared.drives.grow(&directory, size, &Progress::default()).await
        {
            tracing::warn!(drive = %drive.name, %error, "cannot grow the drive's filesystem; a guest grows it when it mounts the drive");
        }
        let id = drive.id;
        shared.store.write(move |tx| drives::set_size(tx, id, size)).await.map_err(crate::op::store_error)?;
    }
    Ok(())
}

/// Adopts a VM that was running when the daemon ended. Of an older database, a guest that its row has as not renewed may have been since: it is neither
/// ended nor adopted.
async fn adopt(
    shared: &Arc<Shared>,
    mut record: VmRecord,
    drives: &[DriveRecord],
    is_outdated: bool,
    when: &str,
) -> Result<(VmRecord, Option<Boot>), ToolError> {
    let directory = shared.paths.vm(record.id);
    let known = record.processes.map(|p| ShimIdentity { pid: p.shim_pid, start_time: p.shim_start });
    // The daemon may have ended after the launch but before it wrote the row.
    let identity = known.or_else(|| discover(&directory));
    let mut shim = match identity {
        Some(identity) => match ShimClient::adopt(&directory, identity).await {
            Ok(shim) => shim,
            Err(error) => {
                tracing::warn!(vm = %record.name, %error, "cannot adopt the shim");
                None
            }
        },
        None => None,
    };
    // One of another boot than the row's runs on: nothing here knows how to reach its guest.
    shim = shim.filter(|shim| {
        let boot = shim.boot_id().or_else(|| launched_boot(&directory));
        boot.is_none_or(|boot| record.boot_id == Some(boot))
    });
    if is_outdated && checkpoint::is_unrenewed(shared, &record).await? {
        shim = None;
    }
    if let Some(begun) =
        shim.take_if(|shim| waking::is_unfinished(shared, &record) && shim.silence().is_none())
    {
        tracing::info!(vm = %record.name, "ending a VMM that an earlier daemon began to wake a vm with");
        if let Err(error) = begun.kill().await {
            tracing::error!(vm = %record.name, %error, "cannot end it");
        }
        if tokio::time::timeout(END_MAX, begun.wait()).await.is_err() {
            tracing::error!(vm = %record.name, "the VMM is still running after it was killed");
            // Nothing else may start on its drives until it has ended: it is ended at its deadline, and the VM sleeps on then.
            shim = Some(begun);
        }
    }
    let was_unrenewed = match &shim {
        Some(running) => checkpoint::end_unrenewed(shared, &record, running).await?,
        None => false,
    };
    if was_unrenewed {
        shim = None;
    }
    let (Some(shim), Some(boot_id), Some(token)) = (shim, record.boot_id, record.token.clone()) else {
        // A shim of a boot that the row does not know keeps its sockets and its jail.
        if discover(&directory).is_none() {
            crate::vmm::remove_sockets(&directory);
        }
        // If nothing was launched for this boot, the exit.json is from the boot before.
        let was_launched = record.boot_id.is_some() && launched_boot(&directory) == record.boot_id;
        let exit = was_launched.then(|| read_exit(&directory).unwrap_or_else(Exit::lost));
        // One with a saved memory sleeps on.
        let has_failed = was_unrenewed && record.state != VmState::Stopping && record.suspended.is_none();
        let record = match has_failed {
            true => {
                record.processes = None;
                rewrite(shared, record, VmState::Failed, Some(checkpoint::UNRENEWED.to_owned())).await?
            }
            false => settle(shared, record, exit, &directory, when).await?,
        };
        if network::leased(shared, record.id).await?.is_some_and(|leased| leased.lease.boot.is_some()) {
            network::disconnect(shared, &record).await;
        }
        return Ok((record, None));
    };
    tracing::info!(vm = %record.name, state = %record.state, "adopting a running vm");
    let accel = if record.accel.as_deref() == Some("kvm") { Accel::Kvm } else { Accel::Tcg };
    let silence = shim.silence();
    if let Some(vmm) = shim.vmm() {
        record.processes = Some(crate::store::vms::VmProcesses {
            shim_pid: shim.identity().pid,
            shim_start: shim.identity().start_time,
            vmm_pid: vmm.pid,
        });
    }
    let leased =
        network::leased(shared, record.id).await?.filter(|leased| leased.lease.boot == Some(boot_id));
    let search = network::search(shared, &record, leased.as_ref()).await?;
    let configure = boot::configure(shared, &record, drives, boot_id, &token, leased.as_ref(), search);
    let configured = boot::is_configured(&record);
    let policy = network::of_proxy(&record.spec.network, leased.is_none());
    let egress = shared.egresses.of(record.id, &policy);
    if let Some(leased) = &leased
        && let Err(error) = network::connect(shared, &record, leased, boot_id).await
    {
        tracing::error!(vm = %record.name, %error, "the vm is still running, but changes of its network do not take effect");
    }
    let mut boot = Boot::adopt(shared, shim, accel, &directory, configure, configured, egress)
        .map_err(|e| ToolError::internal(format!("listen for the guest of {}: {e}", record.name)))?;
    boot.has_interface = leased.is_some();
    match silence {
        None => {
            if record.state == VmState::Paused
                && let Err(error) = boot.shim.pause().await
            {
                tracing::error!(vm = %record.name, %error, "cannot pause the vm again");
            }
            // An earlier daemon may have ended when it was about to suspend it. One that is stopping is ended as it is.
            if record.spec.checkpoints
                && !matches!(record.state, VmState::Paused | VmState::Stopping)
                && let Err(error) = boot.shim.resume().await
            {
                tracing::error!(vm = %record.name, %error, "cannot resume a vm that was not suspended");
            }
            // An earlier daemon may have ended within a checkpoint or a copy of drives, which is not gone on with.
            let driver = record.driver.as_deref().unwrap_or_default();
            if policy::pausable(record.name.as_str(), driver).is_ok()
                && let Err(error) = boot.shim.release_guest().await
            {
                tracing::warn!(vm = %record.name, %error, "cannot resume a vm that may be held for a copy of its drives; its shim does it");
            }
            boot.go_on(shared, &record);
        }
        Some(why) => {
            tracing::warn!(vm = %record.name, why, "the vm is still running, but unreachable for now");
            boot.wait_for_shim();
            let to = if record.state == VmState::Ready { VmState::Unreachable } else { record.state };
            record = rewrite(shared, record, to, Some(why)).await?;
        }
    }
    if record.state == VmState::Stopping {
        boot.deadline = Some(std::time::Instant::now());
    }
    Ok((record, Some(boot)))
}

/// Returns the shim that runs in a VM's directory, whatever the rows say.
fn discover(directory: &Path) -> Option<ShimIdentity> {
    ShimClient::discover(directory).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot look for a shim");
        None
    })
}

/// Records the state of a VM that ended while no daemon was watching.
async fn settle(
    shared: &Shared,
    mut record: VmRecord,
    exit: Option<Exit>,
    directory: &Path,
    when: &str,
) -> Result<VmRecord, ToolError> {
    let clean = exit.as_ref().is_some_and(|exit| exit.code == Some(0) && !exit.shim_lost);
    let what = match &exit {
        Some(exit) => format!("{} {when}", exit.message),
        None => "nexusd ended before the VMM was started".to_owned(),
    };
    let was = record.state;
    let (to, reason) = match was {
        _ if policy::falls_asleep(&mut record) => {
            let reason = format!("nexusd ended while it was woken: {what}");
            (VmState::Suspended, (was != VmState::Stopping).then_some(reason))
        }
        VmState::Stopping => (VmState::Stopped, None),
        VmState::Starting if exit.is_none() => (VmState::Failed, Some(what)),
        VmState::Starting => (VmState::Failed, Some(last_words::with_console(what, directory))),
        _ if clean => (VmState::Stopped, Some(format!("it powered off {when}"))),
        _ => (VmState::Crashed, Some(last_words::with_console(what, directory))),
    };
    let from = record.state;
    debug_assert!(policy::is_edge(from, to), "{from} to {to}");
    tracing::info!(vm = %record.name, %from, %to, "vm ended while no daemon was watching");
    record.processes = None;
    rewrite(shared, record, to, reason).await
}

/// Writes the state of a VM as this daemon found it.
async fn rewrite(
    shared: &Shared,
    mut record: VmRecord,
    to: VmState,
    reason: Option<String>,
) -> Result<VmRecord, ToolError> {
    let (from, expected) = (record.state, record.generation);
    record.generation += 1;
    record.state = to;
    record.reason = reason;
    let row = record.clone();
    let why = record.reason.clone().unwrap_or_else(|| "it is down".into());
    shared.events.vm(&record, Some(from), &why);
    let written = shared
        .store
        .write(move |tx| -> Result<(), StoreError> {
            vms::update(tx, &row, expected)?;
            history::insert(tx, row.id, &row.name, Some(from), Some(to), &why, DAEMON, row.boot_id)
        })
        .await;
    if written.as_ref().is_err_and(StoreError::is_disk_full) {
        // The new state holds in memory anyway; the next successful write records it.
        tracing::warn!(vm = %record.name, %to, "the disk is full: cannot record the vm's new state");
        record.generation = expected;
        return Ok(record);
    }
    written.map_err(crate::op::store_error)?;
    Ok(record)
}

/// Removes rows of half-created things, and files without a row, but the drives' copies of the names `staged` and what is unknown and `kept`.
async fn sweep(shared: &Arc<Shared>, staged: Vec<String>, kept: &HashSet<String>) -> Result<(), ToolError> {
    let (mut vm_ids, mut drive_ids, mut image_ids, mut asset_ids, mut build_ids) = shared
        .store
        .write(|tx| -> Result<_, StoreError> {
            while let Some(build) = builds::list(tx, None, Some(BuildStatus::Building), None, 1)?.pop() {
                let error = ToolError::new(ErrorCode::ShuttingDown, "nexusd ended during the build")
                    .hint("call build_start again");
                builds::finish(tx, build.id, BuildStatus::Failed, false, None, Some(&error))?;
                // The image may be complete, but nobody has checked that its source did not change during the build.
                if let Some(image) = build.image_id {
                    images::delete(tx, image)?;
                }
            }
            for image in images::all(tx)?.into_iter().filter(|i| !i.ready) {
                images::delete(tx, image.id)?;
            }
            for drive in drives::all(tx)?.into_iter().filter(|d| !d.ready) {
                drives::delete(tx, drive.id)?;
            }
            let vms: HashSet<String> = vms::all(tx)?.into_iter().map(|r| r.id.to_string()).collect();
            let drives: HashSet<String> = drives::all(tx)?.into_iter().map(|r| r.id.to_string()).collect();
            let images: HashSet<String> = images::all(tx)?.into_iter().map(|r| r.id.to_string()).collect();
            let assets: HashSet<String> = assets::all(tx)?.into_iter().map(|r| r.id.to_string()).collect();
            let builds: HashSet<String> = builds::ids(tx)?.into_iter().map(|id| id.to_string()).collect();
            Ok((vms, drives, images, assets, builds))
        })
        .await
        .map_err(crate::op::store_error)?;
    for ids in [&mut vm_ids, &mut drive_ids, &mut image_ids, &mut asset_ids, &mut build_ids] {
        ids.extend(kept.iter().cloned());
    }
    let paths = shared.paths.clone();
    for name in orphans(&paths.vms(), &vm_ids) {
        let directory = paths.vms().join(&name);
        if let Some(identity) = discover(&directory)
            && let Ok(Some(shim)) = ShimClient::adopt(&directory, identity).await
        {
            tracing::warn!(directory = %directory.display(), "killing a VMM without a vm");
            if let Err(error) = shim.kill().await {
                tracing::error!(%error, "cannot kill it");
            }
            shim.wait().await;
        }
        remove(&directory);
    }
    // What a rollback still needs that is not finished.
    drive_ids.extend(staged);
    if let Err(error) = shared.drives.sweep(&drive_ids) {
        tracing::warn!(%error, "cannot remove half-created drives");
    }
    for name in orphans(&paths.drives(), &drive_ids) {
        if let Err(error) = shared.drives.delete(&paths.drives().join(&name)).await {
            tracing::warn!(drive = name, %error, "cannot remove a drive's file without a row");
        }
    }
    let rest = [(paths.images(), &image_ids), (paths.assets(), &asset_ids), (paths.builds(), &build_ids)];
    for (directory, ids) in rest {
        for name in orphans(&directory, ids) {
            remove(&directory.join(name));
        }
    }
    if let Err(error) = crate::asset::pipeline::sweep(&paths.downloads()) {
        tracing::warn!(%error, "cannot remove old partial downloads");
    }
    shared.provision.link_programs().await?;
    for name in orphans(&paths.scratch(), &HashSet::new()) {
        remove(&paths.scratch().join(name));
    }
    Ok(())
}

/// Returns the entries of a directory that are not known.
pub(super) fn orphans(directory: &Path, known: &HashSet<String>) -> Vec<String> {
    let Ok(entries) = fs_err::read_dir(directory) else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !known.contains(name))
        .collect()
}

fn remove(path: &Path) {
    let removed = match fs_err::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs_err::remove_dir_all(path),
        Ok(_) => fs_err::remove_file(path),
        Err(_) => return,
    };
    match removed {
        Ok(()) => tracing::info!(path = %path.display(), "removed an unused file or directory"),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot remove an unused file or directory")
        }
    }
}
