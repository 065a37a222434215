//! Putting a VM to sleep: its memory goes to the disk, and its VMM ends.
//!
//! ```text
//! quiesce ─> save: held, memory and devices written ─> synced, manifest, renamed, the hold renewed ─> paused ─> row: stopping, memory saved
//!                                                                                                                └─> VMM killed ─> suspended
//! ```
//! Until the row says that the memory is saved, whatever fails has the VM go on. From the pause on the guest cannot run, whatever becomes of the daemon:
//! so the memory is that of the VM's end, and a later daemon ends a VMM that this one did not.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_schema::id::{CheckpointId, DriveId};
use nexus_schema::link::Quiesced;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::Actor;
use super::save::{HOLD, RENEW, quiesce, renewed, save_failed, save_held, thaw};
use crate::access::Promised;
use crate::context::{Activity, Decision, Taken, View};
use crate::drive::{DISK, KEEP_FREE};
use crate::os::paths::checkpoint_files;
use crate::os::{disk, failpoint, remove};
use crate::store::checkpoints::{MANIFEST_VERSION, Manifest};
use crate::store::suspended::{DriveMark, Suspended};
use crate::store::vms::VmRecord;
use crate::store::{now, random_id};
use crate::vm::checkpoint::{host_facts, in_background, memory_of, publish};
use crate::vm::policy;
use crate::vm::stop::Rung;
use crate::vmm::{Saved, SavedKind, ShimClient};

/// The work on the files of a memory.
const WRITE: &str = "write a VM's memory";

/// How long the guest stands still at most while its memory is put on the disk.
const WRITE_MAX: Duration = Duration::from_secs(300);

impl Actor {
    /// Saves the memory of the VM and begins to end its VMM; it is suspended once that has ended. If this fails, the VM goes on. With `idle`, it is given
    /// up if something is under way in the VM, or was within that time.
    pub(super) async fn suspend(
        &mut self,
        who: &str,
        why: &str,
        idle: Option<Duration>,
    ) -> Result<Decision, ToolError> {
        let name = self.record.name.clone();
        if policy::suspend(name.as_str(), self.record.state)? == Decision::Already {
            return Ok(Decision::Already);
        }
        policy::suspendable(&self.record)?;
        // Nobody resizes or copies them meanwhile.
        let _locked = self.lock_drives().await?;
        let promised = self.check_space().await?;
        if self.record.state == VmState::Paused {
            self.resume(who).await?;
            policy::suspend(name.as_str(), self.record.state)?;
        }
        let id: CheckpointId = random_id();
        let part = self.shared.paths.suspended_part(id);
        let asleep = match Box::pin(self.save_within(id, &part, promised)).await {
            Ok((memory, _)) if !close(&self.view, &self.activity, &memory, idle) => {
                Err(ToolError::new(ErrorCode::Busy, format!("{name} is in use again"))
                    .hint("it is suspended once it is idle"))
            }
            Ok((memory, promised)) => Box::pin(self.fall_asleep(memory, promised, who, why)).await,
            Err(error) => Err(error),
        };
        if asleep.is_err() {
            self.go_on_awake().await;
            remove::tree(&part).await;
            remove::tree(&self.shared.paths.suspended(id)).await;
        }
        asleep.map(|()| Decision::Go)
    }

    /// Promises the room for the memory in the quota of who made the VM. Fails if that or the disk has none.
    async fn check_space(&self) -> Result<Promised, ToolError> {
        let processes = self.record.processes;
        let root = self.shared.paths.all_suspended();
        let looked = spawn_blocking(move || (processes.map_or(0, memory_of), disk::free_bytes(&root).ok()));
        let (memory, free) =
            looked.await.map_err(|e| ToolError::internal(format!("look at the disk: {e}")))?;
        let promised = self.shared.promise_disk(&self.record.owner, memory).await?;
        let needed = memory.saturating_add(KEEP_FREE);
        let Some(free) = free.filter(|free| *free < needed) else { return Ok(promised) };
        let message = format!(
            "the memory of {} needs up to {} MiB, and the disk of the state directory has {} MiB free",
            self.record.name,
            needed >> 20,
            free >> 20
        );
        Err(ToolError::new(ErrorCode::DiskFull, message)
            .hint("free space, for example with checkpoint_delete or prune; vm_stop needs none"))
    }

    /// Saves the memory, and promises the room for what it takes beyond `promised`: the guest ran on since that was looked at.
    async fn save_within(
        &mut self,
        id: CheckpointId,
        part: &Path,
        promised: Promised,
    ) -> Result<(Suspended, [Promised; 2]), ToolError> {
        let memory = Box::pin(self.save_memory(id, part)).await?;
        let rest = memory.memory_bytes.saturating_sub(promised.bytes());
        let rest = self.shared.promise_disk(&self.record.owner, rest).await?;
        Ok((memory, [promised, rest]))
    }

    /// Saves the memory. Afterwards the guest is paused until it is told to go on.
    async fn save_memory(&mut self, id: CheckpointId, part: &Path) -> Result<Suspended, ToolError> {
        let name = self.record.name.clone();
        let Some(boot) = &mut self.boot else {
            return Err(ToolError::internal(format!("{name} is ready, but has no boot")));
        };
        if boot.bye.is_some() {
            let message = format!("{name} is going down: its guest has said goodbye");
            return Err(ToolError::new(ErrorCode::VmWrongState, message).hint("wait until it is stopped"));
        }
        let made = part.to_owned();
        in_background(WRITE, move || make_directory(&made)).await?;
        let quiesced = match &boot.link {
            Some(link) => quiesce(link).await,
            None => Quiesced::default(),
        };
        failpoint::reach("suspend-quiet");
        boot.hold();
        let (shim, interface) = (boot.shim.clone(), boot.has_interface);
        let (saved, held_until) = save_held(&shim, part).await?;
        failpoint::reach("suspend-saved");
        let memory_of = Memory { id, saved, interface, quiesced: quiesced.frozen && quiesced.synced };
        let (mut memory, held_until) = self.write_memory(&shim, memory_of, held_until, part).await?;
        shim.pause().await.map_err(|error| save_failed(&error))?;
        let (files, saved) = (self.drive_files(), self.shared.paths.suspended(id));
        let drives =
            in_background(WRITE, move || marks_since(&files, &saved.join(checkpoint_files::RAM))).await?;
        // It must not have run between the save and the pause, nor written.
        let Some(drives) = drives.filter(|_| Instant::now() < held_until) else {
            return Err(ToolError::new(ErrorCode::Timeout, "the guest ran on while its memory was written")
                .hint("the host is too busy to suspend a VM: try again later"));
        };
        memory.drives = drives;
        failpoint::reach("suspend-paused");
        Ok(memory)
    }

    /// Syncs the memory and gives it its name, while the guest is held, until then. Also returns until when it is held afterwards.
    async fn write_memory(
        &self,
        shim: &Arc<ShimClient>,
        memory: Memory,
        held_until: Instant,
        part: &Path,
    ) -> Result<(Suspended, Instant), ToolError> {
        let renew = async || shim.hold_guest(HOLD).await.map_err(|error| save_failed(&error));
        // At once, since it began before the answer came. If that is too late, the guest ran on.
        let mut held_until = renewed(renew(), held_until).await?;
        let mut renewals = tokio::time::interval_at((Instant::now() + RENEW).into(), RENEW);
        let mut writing = Box::pin(self.publish_memory(memory, part.to_owned()));
        let deadline = tokio::time::Instant::now() + WRITE_MAX;
        let written = loop {
            tokio::select! {
                written = &mut writing => break written?,
                () = tokio::time::sleep_until(deadline) => {
                    let message = format!("its memory was not on the disk within {} s", WRITE_MAX.as_secs());
                    return Err(ToolError::new(ErrorCode::Timeout, message)
                        .hint("the VM runs on; the disk of the state directory is too slow or too busy: try again later"));
                }
                _ = renewals.tick() => held_until = renewed(renew(), held_until).await?,
            }
        };
        Ok((written, held_until))
    }

    async fn publish_memory(&self, memory: Memory, part: PathBuf) -> Result<Suspended, ToolError> {
        let record = &self.record;
        let Memory { id, saved, interface, quiesced } = memory;
        let (Some(boot_id), Some(token), Some(guest)) =
            (record.boot_id, record.token.clone(), record.guest.clone())
        else {
            return Err(ToolError::internal(format!("{} is ready, but has no boot", record.name)));
        };
        let drives = self.drives.clone();
        let taken = Taken {
            saved,
            record: record.clone(),
            drives,
            interface,
            quiesced,
            processes: Vec::new(),
            pause_ms: 0,
        };
        let host = host_facts(&self.shared, &taken).await?;
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            checkpoint: id,
            vm: record.id,
            boot_id,
            spec: record.spec.clone(),
            image_id: record.image_id,
            image_name: record.image_name.clone(),
            kernel_id: record.kernel_id,
            arch: record.arch.clone(),
            guest,
            host,
            private: taken.saved.kind == SavedKind::Private,
            interface,
            state_sha256: taken.saved.state_sha256.clone(),
            ram_sha256: taken.saved.ram_sha256.clone(),
            quiesced,
            drive_bytes: Vec::new(),
            processes: Vec::new(),
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| ToolError::internal(format!("encode a manifest: {e}")))?;
        let whole = self.shared.paths.suspended(id);
        let memory_bytes = in_background(WRITE, move || publish(&part, &whole, &text)).await?;
        Ok(Suspended { manifest, token, drives: Vec::new(), memory_bytes, at: now() })
    }

    /// The drives of the VM and their files.
    pub(super) fn drive_files(&self) -> Vec<(DriveId, PathBuf)> {
        let file = |id: DriveId| (id, self.shared.paths.drive(id).join(DISK));
        self.drives.iter().map(|drive| file(drive.id)).collect()
    }

    /// Records that the memory is saved, and kills the VMM. If it cannot be recorded, the VM is as before.
    async fn fall_asleep(
        &mut self,
        memory: Suspended,
        promised: [Promised; 2],
        who: &str,
        why: &str,
    ) -> Result<(), ToolError> {
        let before = self.record.clone();
        self.record.suspended = Some(Box::new(memory));
        if let Err(error) = self.transition(VmState::Stopping, None, why, who).await {
            self.record = VmRecord { generation: self.record.generation, ..before };
            self.unwritten = None;
            self.publish();
            return Err(error);
        }
        // The row counts from here on.
        drop(promised);
        failpoint::reach("suspend-recorded");
        self.climb(Rung::Kill).await;
        failpoint::reach("suspend-killed");
        Ok(())
    }

    /// Lets a VM go on that could not be suspended.
    async fn go_on_awake(&mut self) {
        let Some(boot) = &mut self.boot else { return };
        // The pause first: the guest runs once the hold is over, too.
        for resumed in [boot.shim.resume().await, boot.shim.release_guest().await] {
            if let Err(error) = resumed {
                tracing::warn!(vm = %self.record.name, %error, "cannot resume a vm that was not suspended");
            }
        }
        boot.let_go(&self.shared, &self.record);
        if let Some(link) = &boot.link {
            thaw(link).await;
        }
    }
}

/// Has calls that come from here on wait for the wake; what came before is counted as under way. With `idle`, nothing is done if something is under way, or
/// was within that time. Returns whether it was done. Calls look at the view and begin in one step, so that none is between both.
fn close(
    view: &watch::Sender<View>,
    activity: &Activity,
    memory: &Suspended,
    idle: Option<Duration>,
) -> bool {
    view.send_if_modified(|view| {
        let is_idle = |limit: Duration| activity.idle().is_some_and(|idle| idle >= limit);
        if idle.is_some_and(|limit| !is_idle(limit)) {
            return false;
        }
        view.record.state = VmState::Stopping;
        view.record.suspended = Some(Box::new(memory.clone()));
        view.link = None;
        true
    })
}

/// A memory that was saved, and is not whole yet.
struct Memory {
    id: CheckpointId,
    saved: Saved,
    /// Whether the machine has a network card.
    interface: bool,
    /// Whether commands stood still and filesystems were synced.
    quiesced: bool,
}

/// Makes the directory of a memory that is to be saved. Blocks.
fn make_directory(part: &Path) -> std::io::Result<()> {
    let mut directory = std::fs::DirBuilder::new();
    directory.mode(0o700);
    directory.create(part)?;
    // A checkpoint has copies of drives there; those of a suspended VM stay in their place.
    directory.create(part.join(checkpoint_files::DRIVES))
}

/// Returns the marks of drives, unless one was written to after the file with the memory. Blocks.
fn marks_since(files: &[(DriveId, PathBuf)], memory: &Path) -> std::io::Result<Option<Vec<DriveMark>>> {
    let saved = modified_ns(&fs_err::metadata(memory)?);
    let marks = marks(files)?;
    Ok(marks.iter().all(|mark| mark.modified_ns <= saved).then_some(marks))
}

fn modified_ns(file: &std::fs::Metadata) -> i64 {
    file.mtime().saturating_mul(1_000_000_000).saturating_add(file.mtime_nsec())
}

/// Returns the marks of drives. Blocks.
pub(super) fn marks(files: &[(DriveId, PathBuf)]) -> std::io::Result<Vec<DriveMark>> {
    let mark = |(drive, file): &(DriveId, PathBuf)| -> std::io::Result<DriveMark> {
        let found = fs_err::metadata(file)?;
        Ok(DriveMark { drive: *drive, modified_ns: modified_ns(&found), size_bytes: found.len() })
    };
    files.iter().map(mark).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_drive_that_was_written_to_has_another_mark() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("disk");
        std::fs::write(&file, "before").unwrap();
        let old = std::time::SystemTime::now() - Duration::from_secs(5);
        let open = || std::fs::File::options().write(true).open(&file).unwrap();
        open().set_modified(old).unwrap();
        let drive: DriveId = random_id();
        let files = [(drive, file.clone())];
        let before = marks(&files).unwrap();
        assert_eq!(marks(&files).unwrap(), before);
        let memory = root.path().join("ram");
        std::fs::write(&memory, "saved").unwrap();
        assert_eq!(marks_since(&files, &memory).unwrap(), Some(before.clone()));
        std::fs::File::options().write(true).open(&memory).unwrap().set_modified(old).unwrap();
        // As long as before.
        open().write_all(b"after!").unwrap();
        assert_ne!(marks(&files).unwrap(), before);
        assert_eq!(marks_since(&files, &memory).unwrap(), None);
        std::fs::remove_file(&file).unwrap();
        marks(&files).unwrap_err();
    }

    #[test]
    fn a_call_begins_before_its_vm_falls_asleep_or_waits_for_the_wake() {
        let record = crate::store::tests::vm("web", 3);
        let memory = crate::store::tests::suspended(&record);
        let ready = View {
            record: VmRecord { state: VmState::Ready, ..record },
            drives: Vec::new(),
            link: None,
            deleted: false,
        };
        let activity = Activity::new();
        let (sender, view) = watch::channel(ready.clone());
        let busy = activity.begin();
        assert!(!close(&sender, &activity, &memory, Some(Duration::ZERO)));
        assert!(view.borrow().record.state == VmState::Ready && view.borrow().record.suspended.is_none());
        // Whoever asks for it himself does not wait for calls.
        assert!(close(&sender, &activity, &memory, None));
        assert!(policy::is_asleep(&view.borrow().record));
        drop(busy);
        // As a call does it: it looks, and begins, in one step.
        let begin = |view: &watch::Receiver<View>| {
            let view = view.borrow();
            (view.record.state == VmState::Ready).then(|| activity.begin())
        };
        for _ in 0..500 {
            sender.send_replace(ready.clone());
            std::thread::scope(|scope| {
                let call = scope.spawn(|| begin(&view));
                let is_closed = close(&sender, &activity, &memory, Some(Duration::ZERO));
                let call = call.join().unwrap();
                assert!(!(is_closed && call.is_some()), "a call is under way in a VM that sleeps");
            });
        }
    }

    #[test]
    fn the_directory_is_private_and_new() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let part = root.path().join("a.part");
        make_directory(&part).unwrap();
        assert_eq!(std::fs::metadata(&part).unwrap().permissions().mode() & 0o777, 0o700);
        make_directory(&part).unwrap_err();
    }
}
