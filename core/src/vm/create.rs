//! The creation of a VM: its rows first, then its image, kernel and drives, then the first start.

use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{BootId, DriveId, OpId, VmId};
use nexus_schema::network::NetworkMode;
use nexus_schema::tools::vm::{IdleAction, VmCreateParams, VmDetails, VmState};
use nexus_schema::{Arch, ByteSize, ErrorCode, Name, Reference, Timestamp, ToolError};

use super::actor::{self, DAEMON};
use super::view::details;
use super::wait::{ask, until_down, until_ready};
use super::{defaults, lifetime, network, one_shot, packages, spec, warm};
use crate::access::Charge;
use crate::context::{Command, Decision, Handle, Reserved, Shared, drive_error};
use crate::op::{Begun, caught};
use crate::os::{failpoint, meminfo};
use crate::progress::Progress;
use crate::store::assets::AssetRecord;
use crate::store::drives::{Attachment, DriveRecord};
use crate::store::images::ImageRecord;
use crate::store::tokens::Usage;
use crate::store::vms::{VmRecord, VmSpec};
use crate::store::{StoreError, drives, history, leases, now, random_id, vms};

/// Begins to create a VM and returns the operation's id; the operation runs in the background. Fails on bad arguments before anything changes.
pub(crate) async fn begin(
    shared: &Arc<Shared>,
    owner: &str,
    params: VmCreateParams,
) -> Result<OpId, ToolError> {
    let (shared, owner) = (shared.clone(), owner.to_owned());
    // Also if the caller is gone meanwhile: a row without a task would stay as it is.
    let begun = tokio::spawn(async move { Box::pin(insert(&shared, &owner, params)).await }).await;
    begun.map_err(|e| ToolError::internal(format!("begin to create a VM: {e}")))?
}

async fn insert(shared: &Arc<Shared>, owner: &str, params: VmCreateParams) -> Result<OpId, ToolError> {
    let same = VmCreateParams { idempotency_key: None, dry_run: None, wait_s: None, ..params.clone() };
    let once = crate::op::once(owner, "vm_create", params.idempotency_key.clone(), &same)?;
    if let Some(op) = shared.ops.earlier(once.as_ref()).await? {
        return Ok(op);
    }
    let id: VmId = random_id();
    let name = match &params.name {
        Some(name) => name.clone(),
        None => made_up_name(id)?,
    };
    let mut defaults = defaults::read(&shared.store).await?;
    let from = params.from.as_deref().unwrap_or(&defaults.image);
    if let Some(template) = shared.provision.template_of(from).await? {
        defaults.ttl = template.spec.ttl.unwrap_or(defaults.ttl);
        defaults.idle_stop = template.spec.idle_stop.unwrap_or(defaults.idle_stop);
        defaults.idle_action = template.spec.idle_action.unwrap_or(defaults.idle_action);
    }
    let mut spec = spec::check(&params, &name, &defaults)?;
    check_host_memory(shared, spec.memory).await?;
    packages::fill(shared, &mut spec.network).await?;
    let arch = shared.provision.arch_of_image(&spec.from).await?;
    let choice = shared.choose_driver_for(&spec, arch).await?;
    spec.checkpoints = defaults.allow_checkpoints(params.checkpoints, &choice.caps);
    let asked = defaults.asks_for_checkpoints(params.checkpoints);
    if !spec.checkpoints {
        spec.idle_action = IdleAction::Stop;
    }
    let last_address = match spec.network.mode {
        NetworkMode::Nat => {
            network::check(&*shared.host(false).await?, &choice)?;
            Some(network::addresses(shared).await?.last())
        }
        NetworkMode::None | NetworkMode::Proxy => None,
    };
    shared.provision.check_image(&spec.from).await?;
    if shared.needs_kernel() {
        shared.provision.check_kernel(&spec.kernel).await?;
    }

    let reserved = warm::pool::reserve(shared, &spec);
    let id = reserved.as_ref().and_then(Reserved::vm).unwrap_or(id);
    let op = crate::op::summary("vm_create", owner, Some((id.to_string(), name.to_string())));
    let op_id = op.op_id;
    let owner = owner.to_owned();
    let protected = params.protected.unwrap_or(false);
    let expires_at = lifetime::end_of(params.ttl.unwrap_or(defaults.ttl));
    let charges = shared.tokens.charges(&owner);
    let (tags, charged) = (params.tags.clone(), charges.clone());
    let begun = shared
        .ops
        .begin(op, once, move |tx| {
            let (arch, cid) = (arch.as_str().to_owned(), vms::free_cid(tx)?);
            let record = VmRecord {
                tags,
                protected,
                expires_at,
                ..VmRecord::creating(id, name, owner.clone(), arch, cid, spec)
            };
            let taken = Usage {
                vms: 1,
                vcpus: record.spec.vcpus.into(),
                memory: record.spec.memory.as_bytes(),
                disk: record.spec.disk.as_bytes(),
            };
            charged.iter().try_for_each(|charge| charge.check(tx, taken, None))?;
            vms::insert(tx, &record)?;
            if let Some(last) = last_address {
                leases::take(tx, id, last)?;
            }
            history::insert(tx, id, &record.name, None, Some(VmState::Creating), REQUESTED, &owner, None)?;
            Ok(Box::new(record))
        })
        .await?;

    match begun {
        Begun::Known(op_id) => Ok(op_id),
        Begun::New(record) => {
            if let Some(reserved) = reserved {
                reserved.claim();
            }
            failpoint::reach("create-begun");
            shared.events.vm(&record, None, REQUESTED);
            let handle = actor::spawn(shared, (*record).clone(), Vec::new(), None);
            shared.lifetimes.notify_one();
            let shared = shared.clone();
            shared.clone().ops.run(op_id, move |progress| async move {
                Box::pin(create(&shared, handle, *record, (charges, asked), op_id, progress)).await
            });
            Ok(op_id)
        }
    }
}

/// Fails if a VM would have more memory than the host. With the `process` driver it has none of its own.
pub(crate) async fn check_host_memory(shared: &Shared, memory: ByteSize) -> Result<(), ToolError> {
    if !shared.needs_kernel() {
        return Ok(());
    }
    let read = tokio::task::spawn_blocking(meminfo::read).await;
    match read.map_err(|e| ToolError::internal(format!("read the host's memory: {e}")))? {
        Ok(host) => spec::check_fits(memory, ByteSize::bytes(host.total)),
        // Where it is not known, the VMM says whether there is enough.
        Err(_) => Ok(()),
    }
}

/// Runs the operation. `asked` is whether somebody wants checkpoints. A failure before the VM is `created` removes it; after a later failure the VM
/// stays, as `failed`.
async fn create(
    shared: &Arc<Shared>,
    handle: Handle,
    record: VmRecord,
    (charges, asked): (Vec<Charge>, bool),
    op: OpId,
    progress: Progress,
) -> Result<VmDetails, ToolError> {
    let mut made = Vec::new();
    let prepared = tokio::select! {
        prepared = caught("the creation", prepare(shared, record.clone(), (charges, asked), &mut made, &progress)) => prepared,
        () = progress.cancelled() => Err(cancelled(&record.name)),
    };
    let created = match prepared {
        Ok((record, drives)) => {
            ask(&handle, |reply| Command::Created { record: Box::new(record), drives, reply }).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = created {
        let reason = format!("creation undone: {}", error.message);
        let undone = ask(&handle, |reply| Command::Undo { reason, drives: made, reply }).await;
        if let Err(error) = undone {
            tracing::error!(vm = %record.name, %error, "cannot undo a failed creation; nexusd retries at its next start");
        }
        return Err(error);
    }
    if record.spec.start {
        let who = record.owner.clone();
        let is_cold = handle.view.borrow().record.spec.warm.is_none();
        let started = start_and_wait(&handle, &who, None, &progress).await;
        if started.is_ok() && is_cold {
            let like = handle.view.borrow().record.clone();
            warm::prepare_later(shared, like);
        }
        if let Err(error) = started {
            if error.code == ErrorCode::Cancelled {
                one_shot::delete(&handle, "deleted: its creation was cancelled").await;
            }
            return Err(unless_run(&handle, error).await);
        }
        if let Some(line) = &record.spec.run {
            return one_shot::run(shared, &handle, op, line, &progress).await;
        }
    }
    details(shared, &Reference::Id(record.id)).await
}

/// Goes on with the creation of a VM whose drives are made, or with its start, after a restart of the daemon. Only its creation runs
/// the command that it exists for.
pub(crate) async fn go_on(
    shared: &Arc<Shared>,
    handle: &Handle,
    op: OpId,
    is_creation: bool,
    progress: &Progress,
) -> Result<VmDetails, ToolError> {
    let mut view = handle.view.clone();
    let record = view.borrow().record.clone();
    let has_failed = matches!(record.state, VmState::Failed | VmState::Crashed);
    let started = match record.boot_id.filter(|_| record.state != VmState::Created) {
        // Its warm start ended with the daemon that began it.
        Some(_) if has_failed && record.spec.warm.is_some() => {
            start_and_wait(handle, DAEMON, None, progress).await
        }
        Some(boot) => until_ready(&mut view, boot, progress).await,
        None if record.spec.start => start_and_wait(handle, DAEMON, None, progress).await,
        None => Ok(()),
    };
    match started {
        Err(error) if is_creation => return Err(unless_run(handle, error).await),
        started => started?,
    }
    match &record.spec.run {
        Some(line) if is_creation => one_shot::run(shared, handle, op, line, progress).await,
        _ => details(shared, &Reference::Id(record.id)).await,
    }
}

/// A VM that did not start stays, for a look at it; but not one that exists for one command.
async fn unless_run(handle: &Handle, error: ToolError) -> ToolError {
    if handle.view.borrow().record.spec.run.is_some() {
        one_shot::delete(handle, "deleted: it could not be started for its command").await;
    }
    error
}

/// Fetches and creates all that the VM needs. `made` lists the drives created so far, so that a failed creation can be undone.
async fn prepare(
    shared: &Arc<Shared>,
    mut record: VmRecord,
    (charges, asked): (Vec<Charge>, bool),
    made: &mut Vec<DriveId>,
    progress: &Progress,
) -> Result<(VmRecord, Vec<DriveRecord>), ToolError> {
    let VmSpec { kernel, from, .. } = record.spec.clone();
    let kernel = match shared.needs_kernel() {
        true => {
            let arch = Arch::known(&record.arch)?;
            Some(shared.provision.kernel(&kernel, arch, &record.owner, progress).await?)
        }
        false => None,
    };
    let image = shared.provision.image(&from, &record.owner, progress).await?;
    let kernel = Box::pin(take_arch(shared, (&mut record, asked), kernel, &image, progress)).await?;
    if record.spec.init == nexus_schema::link::InitMode::System && image.has_init == Some(false) {
        return Err(ToolError::invalid(format!(
            "init is `system`, but image {} has no init system (no /sbin/init)",
            image.name
        ))
        .hint("omit `init`, or choose an image with an init system, such as one built with systemd"));
    }
    let disk = disk_of(&record.spec, &image)?;
    record.spec.disk = disk;
    record.kernel_id = kernel.map(|k| k.id);
    record.image_id = Some(image.id);
    record.image_name = image.name.to_string();
    if record.spec.init == nexus_schema::link::InitMode::Agent {
        record.spec.init = image.init;
    }
    if let Some(config) = &image.config {
        spec::take_defaults(&mut record.spec, config);
    }

    let prepared = warm::find(shared, &record).await;
    record.spec.warm = prepared.as_ref().map(warm::Prepared::id);
    // The drive of a machine that waits for this VM is made already.
    let waiting = match shared.warming.claim_of(record.id) {
        Some((machine, drive)) if record.spec.warm == Some(machine) => Some(drive),
        Some(_) => {
            warm::pool::discard_claim(shared, record.id).await;
            None
        }
        None => None,
    };
    progress.step("cloning the root drive");
    let drive = DriveRecord {
        id: waiting.unwrap_or_else(random_id),
        name: root_name(&record.name, record.id)?,
        image_id: Some(image.id),
        parent_id: None,
        made_for: Some(record.id),
        attachment: Some(Attachment { vm: record.id, position: 0, mount: None }),
        ready: false,
        size: disk,
        read_only: false,
        owner: record.owner.clone(),
        created_at: now(),
    };
    made.push(drive.id);
    let row = drive.clone();
    shared
        .store
        .write(move |tx| -> Result<(), StoreError> {
            // The image may be larger than what was asked for.
            let taken = Usage { disk: row.size.as_bytes(), ..Usage::default() };
            charges.iter().try_for_each(|charge| charge.check(tx, taken, row.made_for))?;
            drives::insert(tx, &row)?;
            row.attachment.iter().try_for_each(|to| drives::attach(tx, row.id, to))
        })
        .await
        .map_err(crate::op::store_error)?;
    failpoint::reach("create-drive-begun");
    let copied = match &prepared {
        Some(_) if waiting.is_some() => Ok(()),
        Some(prepared) => warm::copy_drive(shared, prepared, drive.id, progress).await,
        None => clone_of_image(shared, &image, drive.id, disk, progress).await,
    };
    match copied {
        Err(error) if prepared.is_some() && error.code != ErrorCode::Cancelled => {
            tracing::warn!(vm = %record.name, %error, "cannot copy the drive of a prepared machine: starting cold");
            record.spec.warm = None;
            clone_of_image(shared, &image, drive.id, disk, progress).await?;
        }
        copied => copied?,
    }
    failpoint::reach("create-drive-cloned");
    let (ready, row) = (DriveRecord { ready: true, ..drive.clone() }, drive);
    shared.store.write(move |tx| drives::made(tx, &row)).await.map_err(crate::op::store_error)?;
    failpoint::reach("create-drive-ready");
    Ok((record, vec![ready]))
}

/// Makes the VM one of its image's architecture, and returns a kernel of that. Fails if this host has nothing to run it, or no checkpoints of it
/// although they were asked for.
async fn take_arch(
    shared: &Shared,
    (record, asked): (&mut VmRecord, bool),
    kernel: Option<AssetRecord>,
    image: &ImageRecord,
    progress: &Progress,
) -> Result<Option<AssetRecord>, ToolError> {
    let Some(mut kernel) = kernel else { return Ok(None) };
    let arch = Arch::known(&image.arch)?;
    record.arch = arch.as_str().into();
    if kernel.arch != image.arch {
        // Of the distribution's kernels, it is another one.
        kernel = shared.provision.kernel(&record.spec.kernel, arch, &record.owner, progress).await?;
    }
    if kernel.arch != image.arch {
        let (name, other) = (&kernel.name, &kernel.arch);
        let message = format!("kernel {name} is for {other}, and image {} for {arch}", image.name);
        return Err(ToolError::invalid(message)
            .hint(format!("give a kernel for {arch}, such as `debian`, or one from asset_list")));
    }
    if arch != Arch::HOST {
        if !asked {
            // They cost nothing with the driver of the host's own VMs.
            record.spec.checkpoints = false;
            record.spec.idle_action = IdleAction::Stop;
        }
        shared.choose_driver_for(&record.spec, arch).await?;
    }
    Ok(Some(kernel))
}

/// Creates the disk of a drive from an image.
pub(crate) async fn clone_of_image(
    shared: &Shared,
    image: &ImageRecord,
    drive: DriveId,
    size: ByteSize,
    progress: &Progress,
) -> Result<(), ToolError> {
    let master = shared.paths.image(image.id).join(crate::image::ROOTFS);
    if let Err(error) = fs_err::tokio::metadata(&master).await {
        let error = ToolError::new(ErrorCode::ImageFailed, format!("image {}: {error}", image.name));
        return Err(
            error.hint("its file is missing: create the image again with image_create, under another name")
        );
    }
    let made = shared.drives.clone_image(&master, &shared.paths.drive(drive), size, progress).await;
    made.map(drop).map_err(drive_error)
}

/// Returns the size of the root drive: the default, or the image's size if that is larger. Fails if the caller's size is smaller than the image.
pub(crate) fn disk_of(spec: &VmSpec, image: &ImageRecord) -> Result<ByteSize, ToolError> {
    match image.size > spec.disk {
        false => Ok(spec.disk),
        true if !spec.disk_given => Ok(image.size),
        true => Err(ToolError::invalid(format!(
            "disk is {}, smaller than the {} of image {}",
            spec.disk, image.size, image.name
        ))),
    }
}

/// Starts a VM, if `if_boot` is its boot, and waits until it is ready. Fails with the reason if it does not get ready.
pub(crate) async fn start_and_wait(
    handle: &Handle,
    who: &str,
    if_boot: Option<BootId>,
    progress: &Progress,
) -> Result<(), ToolError> {
    let (starter, followed) = (who.to_owned(), progress.clone());
    let boot =
        ask(handle, |reply| Command::Start { who: starter, if_boot, progress: followed, reply }).await?;
    let mut view = handle.view.clone();
    tokio::select! {
        ready = until_ready(&mut view, boot, progress) => ready,
        () = progress.cancelled() => {
            let name = view.borrow().record.name.clone();
            let who = who.to_owned();
            let stopped =
                ask(handle, |reply| Command::Stop { who, force: true, if_boot: None, reply }).await;
            if let Err(error) = stopped {
                tracing::warn!(vm = %name, %error, "cannot stop the vm after its start was cancelled");
            }
            until_down(&mut view, Duration::from_secs(20)).await;
            Err(cancelled(&name))
        }
    }
}

/// How long a VM may take to be down before a stop or restart has failed.
const DOWN_MAX: Duration = Duration::from_secs(120);

/// Stops what runs of a VM, and waits until it is down; whether there was anything to stop.
pub(crate) async fn stop_and_wait(
    handle: &Handle,
    who: &str,
    force: bool,
    if_boot: Option<BootId>,
    progress: &Progress,
) -> Result<Decision, ToolError> {
    let (who, again) = (who.to_owned(), who.to_owned());
    let decision = ask(handle, |reply| Command::Stop { who, force, if_boot, reply }).await?;
    if decision == Decision::Go {
        progress.step("shutting down");
        if !until_down(&mut handle.view.clone(), DOWN_MAX).await {
            let name = handle.view.borrow().record.name.clone();
            return Err(ToolError::new(
                ErrorCode::Timeout,
                format!("{name} is still running after {} s", DOWN_MAX.as_secs()),
            )
            .hint("call vm_stop with force: true"));
        }
        // It was falling asleep or waking: its memory is given up, too.
        if handle.view.borrow().record.state == VmState::Suspended {
            ask(handle, |reply| Command::Stop { who: again, force, if_boot: None, reply }).await?;
        }
    }
    Ok(decision)
}

/// The boot that a restart ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Old {
    /// This one, if there is any.
    Boot(Option<BootId>),
    /// One that was started before, by the clock of the host: for a restart that an earlier daemon began.
    Since(Timestamp),
}

/// Stops a VM that was started before `since`, and starts it. One that was started later has been restarted already.
pub(crate) async fn restart_and_wait(
    handle: &Handle,
    who: &str,
    force: bool,
    if_boot: Option<BootId>,
    old: Old,
    progress: &Progress,
) -> Result<(), ToolError> {
    let is_old = {
        let view = handle.view.borrow();
        match old {
            Old::Boot(boot) => boot.is_some() && view.record.boot_id == boot,
            Old::Since(since) => view.record.started_at.is_some_and(|at| at <= since),
        }
    };
    if is_old {
        stop_and_wait(handle, who, force, if_boot, progress).await?;
        failpoint::reach("restart-down");
    }
    start_and_wait(handle, who, None, progress).await
}

fn cancelled(name: &Name) -> ToolError {
    ToolError::new(ErrorCode::Cancelled, format!("the start of {name} was cancelled"))
}

fn made_up_name(id: VmId) -> Result<Name, ToolError> {
    let text = id.to_string();
    format!("vm-{}", &text[text.len() - 6..]).parse().map_err(|e| ToolError::internal(format!("{e}")))
}

/// Returns the root drive's name: the VM's name, truncated if necessary, and a part of its id.
fn root_name(vm: &Name, id: VmId) -> Result<Name, ToolError> {
    let id = id.to_string();
    let head: String = vm.as_str().chars().take(nexus_schema::name::NAME_MAX - 12).collect();
    format!("{head}-root-{}", &id[id.len() - 6..]).parse().map_err(|e| ToolError::internal(format!("{e}")))
}

/// The first line of a VM's history.
const REQUESTED: &str = "create requested";
/// Reason in the history of a VM whose creation a restart of the daemon interrupted.
pub(super) const UNDONE: &str = "the daemon ended while it was being created";

/// Removes the rows and files of a half-created VM.
pub(super) async fn undo(shared: &Shared, record: &VmRecord, drive_ids: &[DriveId]) -> Result<(), ToolError> {
    actor::remove_rows(shared, record, drive_ids, UNDONE, DAEMON).await?;
    actor::remove_files(shared, record, drive_ids).await;
    Ok(())
}
