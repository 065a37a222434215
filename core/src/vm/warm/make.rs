//! The preparation of a machine, in the background: it boots, is saved once it is ready, and ends.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_schema::id::{BootId, CheckpointId, DriveId, VmId};
use nexus_schema::link::{Ack, Configure, Hello, MCP_PORT, PROTOCOL};
use nexus_schema::network::{NetworkMode, NetworkPolicy};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, ToolError};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::{Prepared, Sort, copy_name, find, is_on, remove_files, sort_of, try_end};
use crate::context::{Shared, Taken, drive_error};
use crate::drive::{DISK, KEEP_FREE, copy_file};
use crate::guest::{GuestEvent, HelloServer, Link};
use crate::op::store_error;
use crate::os::paths::checkpoint_files;
use crate::os::{disk, failpoint, meminfo, random, remove};
use crate::progress::Progress;
use crate::store::checkpoints::{MANIFEST_VERSION, Manifest};
use crate::store::drives::{Attachment, DriveRecord};
use crate::store::images::{self, ImageRecord};
use crate::store::vms::{GuestRecord, VmRecord, VmSpec};
use crate::store::{now, random_id};
use crate::vm::actor::{DAEMON, HOLD, quiesce, save_failed};
use crate::vm::boot;
use crate::vm::checkpoint::{host_facts, in_background, publish};
use crate::vm::create::clone_of_image;
use crate::vmm::{Saved, SavedKind, ShimClient};

/// The work on the files of a machine.
const WRITE: &str = "write a prepared machine";
/// The context id of machines that are prepared: VMs have the lowest ones. A machine's user in its jail depends on it.
const CID: u32 = 0x7fff_fffe;
/// Length of the queue of a guest's events.
const EVENTS_MAX: usize = 32;
/// How long the host may be busy before the preparation is given up; the next cold start tries it again.
const QUIET_WAIT: Duration = Duration::from_secs(600);
/// The interval in which that is looked at.
const QUIET_LOOK: Duration = Duration::from_secs(2);
/// Memory of the host that a preparation leaves free.
pub(super) const MEMORY_LEFT: u64 = 256 << 20;
/// Timeout for the link to a guest that is ready.
const LINK_MAX: Duration = Duration::from_secs(20);
/// What a guest that is ready may still be doing: its last answer from the host is on the way, and it writes what its start has changed.
const SETTLE: Duration = Duration::from_secs(1);

/// Prepares a machine for later VMs like this one, which has started cold, unless there is one, it cannot be, or one is being prepared now.
pub(in crate::vm) fn prepare_later(shared: &Arc<Shared>, record: VmRecord) {
    if !record.spec.checkpoints {
        return;
    }
    let Some(making) = shared.warming.begin() else { return };
    let shared = shared.clone();
    tokio::spawn(async move {
        let image = record.image_name.clone();
        let stop = shared.warming.stop().clone();
        match Box::pin(prepare(&shared, record)).await {
            Ok(Some(id)) => {
                tracing::info!(machine = %id, image, "prepared a machine for warm starts");
                super::tidy(&shared).await;
            }
            Ok(None) => {}
            Err(_) if stop.is_cancelled() => {}
            Err(error) => tracing::warn!(image, %error, "cannot prepare a machine for warm starts"),
        }
        drop(making);
    });
}

/// Prepares a machine, and returns its id; `None` if none is to be made.
pub(super) async fn prepare(
    shared: &Arc<Shared>,
    record: VmRecord,
) -> Result<Option<CheckpointId>, ToolError> {
    if !is_on(shared).await? {
        return Ok(None);
    }
    let Some(sort) = sort_of(shared, &record).await? else { return Ok(None) };
    if shared.warming.is_refused(&sort.text()) || find(shared, &record).await.is_some() {
        return Ok(None);
    }
    let stop = shared.warming.stop();
    let is_quiet = tokio::select! {
        is_quiet = until_quiet(shared) => is_quiet,
        () = stop.cancelled() => false,
    };
    if !is_quiet {
        return Ok(None);
    }
    let image = image_of(shared, &sort).await?;
    check_room(shared, &sort, &image).await?;
    let mut machine = Machine::new(record)?;
    let made = tokio::select! {
        made = Box::pin(make(shared, &sort, &image, &mut machine)) => made,
        () = stop.cancelled() => Err(Failure::Now(ToolError::new(ErrorCode::ShuttingDown, "the daemon is shutting down"))),
    };
    machine.end(shared).await;
    match made {
        Ok(()) => {
            // Those that it is used in place of: their disks are larger.
            for other in super::keep::all(shared).await? {
                if other.sort == sort && other.id() != machine.id {
                    super::remove(shared, other.id()).await;
                }
            }
            Ok(Some(machine.id))
        }
        Err(Failure::Now(error)) => Err(error),
        Err(Failure::Always(error)) => {
            shared.warming.refuse(sort.text());
            Err(error)
        }
    }
}

/// Why a machine was not prepared.
enum Failure {
    /// The next try may succeed.
    Now(ToolError),
    /// It is the image: no machine of this sort can be prepared.
    Always(ToolError),
}

impl From<ToolError> for Failure {
    fn from(error: ToolError) -> Self {
        Self::Now(error)
    }
}

/// Waits until no VM is being created or started. Returns whether that came to be in time.
async fn until_quiet(shared: &Shared) -> bool {
    let quiet = async {
        while is_busy(shared) {
            sleep(QUIET_LOOK).await;
        }
    };
    timeout(QUIET_WAIT, quiet).await.is_ok()
}

/// Whether a VM is being created or started. One whose start could not even begin is not: it may stay as it is for long.
pub(super) fn is_busy(shared: &Shared) -> bool {
    let is_booting = |state| matches!(state, VmState::Creating | VmState::Starting | VmState::Running);
    shared.vms.all().iter().any(|vm| is_booting(vm.view.borrow().record.state))
}

async fn image_of(shared: &Shared, sort: &Sort) -> Result<ImageRecord, ToolError> {
    let image = Reference::Id(sort.image);
    let found = shared.store.read(move |db| images::get(db, &image)).await.map_err(store_error)?;
    found.ok_or_else(|| ToolError::new(ErrorCode::ImageNotFound, "the image was deleted meanwhile"))
}

/// Fails if the host has no memory or disk to spare for a machine.
async fn check_room(shared: &Shared, sort: &Sort, image: &ImageRecord) -> Result<(), ToolError> {
    let root = shared.paths.all_prepared();
    let looked = spawn_blocking(move || (meminfo::read().ok(), disk::free_bytes(&root).ok()));
    let (memory, free) = looked.await.map_err(|e| ToolError::internal(format!("look at the host: {e}")))?;
    let memory_needed = sort.memory.as_bytes().saturating_add(MEMORY_LEFT);
    if memory.is_some_and(|memory| memory.available < memory_needed) {
        return Err(ToolError::new(ErrorCode::HostOutOfMemory, "the host has too little free memory for it"));
    }
    // The drive twice, for a moment, and all of the memory at worst.
    let disk_needed = image.used_bytes.saturating_mul(2).saturating_add(sort.memory.as_bytes());
    if free.is_some_and(|free| free < disk_needed.saturating_add(KEEP_FREE)) {
        return Err(ToolError::new(
            ErrorCode::DiskFull,
            "the disk of the state directory has no room for it",
        ));
    }
    Ok(())
}

/// A machine that is being prepared: a VM without a row.
struct Machine {
    id: CheckpointId,
    record: VmRecord,
    drive: DriveRecord,
    shim: Option<Arc<ShimClient>>,
}

impl Machine {
    /// A machine like a VM, without anything that is set for one VM.
    fn new(of: VmRecord) -> Result<Self, ToolError> {
        let (id, vm, drive): (CheckpointId, VmId, DriveId) = (random_id(), random_id(), random_id());
        let text = vm.to_string();
        let made_up = format!("prepared-{}", &text[text.len() - 6..]).parse::<Name>();
        let name: Name = made_up.map_err(|e| ToolError::internal(format!("{e}")))?;
        let spec = VmSpec {
            // A name that is in /etc/hosts already.
            hostname: "localhost".to_owned(),
            network: NetworkPolicy { mode: NetworkMode::None, ..NetworkPolicy::default() },
            dns: Vec::new(),
            env: std::collections::BTreeMap::new(),
            working_dir: None,
            image_user: None,
            files: std::collections::BTreeMap::new(),
            run: None,
            warm: None,
            ..of.spec
        };
        let record = VmRecord {
            state: of.state,
            image_id: of.image_id,
            image_name: of.image_name,
            kernel_id: of.kernel_id,
            ..VmRecord::creating(vm, name, DAEMON.to_owned(), of.arch, CID, spec)
        };
        let drive = drive_of(&record, drive);
        Ok(Self { id, record, drive, shim: None })
    }

    /// Ends what runs of it, and removes its files but those of a machine that is whole. What cannot be removed is removed at the next start.
    async fn end(&mut self, shared: &Shared) {
        if let Some(shim) = self.shim.take()
            && let Err(error) = try_end(&shim).await
        {
            // Its files are in use.
            return tracing::error!(%error, "a machine that was prepared still runs; the next daemon ends it");
        }
        remove_files(shared, self.record.id, self.drive.id).await;
        remove::tree(&shared.paths.prepared_part(self.id)).await;
    }
}

/// The root drive of a machine without a row.
pub(super) fn drive_of(record: &VmRecord, id: DriveId) -> DriveRecord {
    DriveRecord {
        id,
        name: record.name.clone(),
        image_id: record.image_id,
        parent_id: None,
        made_for: Some(record.id),
        attachment: Some(Attachment { vm: record.id, position: 0, mount: None }),
        ready: true,
        size: record.spec.disk,
        read_only: false,
        owner: DAEMON.to_owned(),
        created_at: now(),
    }
}

/// Boots the machine, saves it once it is ready, ends it, and publishes what was saved.
async fn make(
    shared: &Arc<Shared>,
    sort: &Sort,
    image: &ImageRecord,
    machine: &mut Machine,
) -> Result<(), Failure> {
    let size = machine.drive.size;
    clone_of_image(shared, image, machine.drive.id, size, &Progress::default()).await?;
    shared.drives.settle(&shared.paths.drive(machine.drive.id)).await.map_err(drive_error)?;
    let part = shared.paths.prepared_part(machine.id);
    let (made, below) = (part.clone(), part.join(checkpoint_files::DRIVES));
    let directories = move || -> std::io::Result<()> {
        let mut directory = std::fs::DirBuilder::new();
        directory.mode(0o700);
        directory.create(&made)?;
        directory.create(&below)
    };
    in_background(WRITE, directories).await?;
    let (saved, guest) = boot_and_save(shared, machine, &part).await?;
    let from = shared.paths.drive(machine.drive.id).join(DISK);
    let to = part.join(checkpoint_files::DRIVES).join(copy_name(machine.drive.id));
    let copy = to.clone();
    let copied = spawn_blocking(move || copy_file(&from, &copy, &Progress::default())).await;
    copied.map_err(|e| ToolError::internal(format!("copy a drive: {e}")))?.map_err(drive_error)?;
    publish_it(shared, sort, machine, Written { saved, guest, drive: to, disk: size }).await?;
    Ok(())
}

/// Boots the machine and saves its memory. Its VMM has ended then.
async fn boot_and_save(
    shared: &Arc<Shared>,
    machine: &mut Machine,
    part: &Path,
) -> Result<(Saved, GuestRecord), Failure> {
    let choice = shared.choose_driver_of(&machine.record).await?;
    let kernel = shared.kernel_files(&machine.record).await?;
    let initramfs = shared.initramfs(kernel.as_ref()).await?;
    let (boot_id, token): (BootId, String) = (random_id(), random::token());
    let record = &mut machine.record;
    record.boot_id = Some(boot_id);
    record.token = Some(token.clone());
    record.driver = Some(choice.driver.as_str().into());
    record.driver_version = Some(choice.version.clone());
    record.accel = Some(choice.accel.as_str().into());
    let (record, drives) = (&machine.record, std::slice::from_ref(&machine.drive));
    let configured = boot::configure(shared, record, drives, boot_id, &token, None, Vec::new());
    let configure = Configure { template: true, ..configured };
    let plan = boot::plan(shared, record, drives, boot_id, &choice, kernel.as_ref(), &initramfs);
    let directory = plan.directory.clone();
    let made = fs_err::create_dir_all(&directory);
    made.map_err(|e| ToolError::internal(format!("make the machine's directory: {e}")))?;
    let (events, mut heard) = mpsc::channel(EVENTS_MAX);
    let hello = HelloServer::bind(&directory, configure, true, events);
    let _hello = hello.map_err(|e| ToolError::internal(format!("listen for the machine's guest: {e}")))?;
    let launched = ShimClient::launch(&shared.config.shim_binary, &plan).await;
    let shim = Arc::new(launched.map_err(|error| boot::launch_failed(record.name.as_str(), &error))?);
    machine.shim = Some(shim.clone());
    failpoint::reach("prepare-launched");
    let ready = timeout(shared.boot_timeout(choice.accel), until_ready(&mut heard, &shim)).await;
    let (hello, ack) = ready.map_err(|_| failed("its guest was not ready in time"))??;
    if !ack.problems.is_empty() {
        return Err(Failure::Always(failed(&ack.problems.join("; "))));
    }
    let link = Link::start(&directory, MCP_PORT);
    let saved = save(&link, &shim, part).await;
    link.close("the machine is saved");
    let saved = saved?;
    failpoint::reach("prepare-saved");
    let protocol = hello.protocol.min(PROTOCOL);
    let hello = Hello { token: None, resumed: None, ..hello };
    Ok((saved, GuestRecord { hello, protocol, configured: true, problems: Vec::new(), resumed: None }))
}

/// Saves the memory, and ends the VMM before the guest could go on.
async fn save(link: &Link, shim: &Arc<ShimClient>, part: &Path) -> Result<Saved, ToolError> {
    if !link.is_up_within(LINK_MAX).await {
        return Err(failed("there is no link to its guest"));
    }
    sleep(SETTLE).await;
    let quiesced = quiesce(link).await;
    if !quiesced.frozen || !quiesced.synced {
        return Err(failed("its guest does not stand still"));
    }
    let begun = Instant::now();
    let saved = shim.save(part, HOLD).await.map_err(|error| save_failed(&error))?;
    // The hold begins after the state was written.
    let written = Duration::from_millis(saved.state_ms.saturating_add(saved.ram_ms));
    try_end(shim).await?;
    match begun.elapsed().saturating_sub(written) < HOLD {
        true => Ok(saved),
        false => Err(failed("it could not be ended before its guest went on")),
    }
}

/// Waits until the guest is ready, and welcomes it.
async fn until_ready(
    events: &mut mpsc::Receiver<GuestEvent>,
    shim: &ShimClient,
) -> Result<(Hello, Ack), ToolError> {
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            exit = shim.wait() => return Err(failed(&exit.message)),
        };
        match event {
            Some(GuestEvent::Ready { hello, ack, recorded }) => {
                drop(recorded);
                return Ok((hello, ack));
            }
            Some(GuestEvent::Hello(_)) => {}
            Some(GuestEvent::Unrenewed { what } | GuestEvent::Misbehaved { what }) => {
                return Err(failed(&what));
            }
            Some(GuestEvent::Bye { .. } | GuestEvent::Outdated { .. }) | None => {
                return Err(failed("its guest did not become ready"));
            }
        }
    }
}

fn failed(why: &str) -> ToolError {
    ToolError::new(ErrorCode::BootFailed, format!("prepare a machine: {why}"))
}

/// What of a machine is in its files already.
struct Written {
    saved: Saved,
    guest: GuestRecord,
    drive: PathBuf,
    disk: ByteSize,
}

/// Writes what is known of the machine, and gives its directory its name.
async fn publish_it(
    shared: &Arc<Shared>,
    sort: &Sort,
    machine: &Machine,
    written: Written,
) -> Result<(), ToolError> {
    let Written { saved, guest, drive, disk } = written;
    let record = machine.record.clone();
    let (Some(boot_id), Some(token)) = (record.boot_id, record.token.clone()) else {
        return Err(ToolError::internal("a machine was saved without a boot"));
    };
    let drives = vec![machine.drive.clone()];
    let (processes, quiesced) = (Vec::new(), true);
    let taken = Taken { saved, record, drives, interface: false, quiesced, processes, pause_ms: 0 };
    let host = host_facts(shared, &taken).await?;
    let Taken { saved, record, .. } = taken;
    let synced = drive.clone();
    let length = move || -> std::io::Result<u64> {
        let file = fs_err::File::open(&synced)?;
        file.sync_all()?;
        Ok(file.metadata()?.len())
    };
    let drive_bytes = vec![in_background(WRITE, length).await?];
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        checkpoint: machine.id,
        vm: record.id,
        boot_id,
        spec: record.spec,
        image_id: record.image_id,
        image_name: record.image_name,
        kernel_id: record.kernel_id,
        arch: record.arch,
        guest,
        host,
        private: saved.kind == SavedKind::Private,
        interface: false,
        state_sha256: saved.state_sha256,
        ram_sha256: saved.ram_sha256,
        quiesced,
        drive_bytes,
        processes: Vec::new(),
    };
    let encode = |e: serde_json::Error| ToolError::internal(format!("encode a prepared machine: {e}"));
    let text = serde_json::to_vec_pretty(&manifest).map_err(encode)?;
    let prepared = Prepared { sort: sort.clone(), token, drive: machine.drive.id, disk, manifest };
    let known = serde_json::to_vec_pretty(&prepared).map_err(encode)?;
    let (part, whole) = (shared.paths.prepared_part(machine.id), shared.paths.prepared(machine.id));
    let write = move || -> std::io::Result<u64> {
        let mut options = std::fs::OpenOptions::new();
        let path = part.join(checkpoint_files::PREPARED);
        let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&known)?;
        file.sync_all()?;
        publish(&part, &whole, &text)
    };
    in_background(WRITE, write).await.map(drop)
}
