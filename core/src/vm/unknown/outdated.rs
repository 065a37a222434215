//! What an older database says is under way or half made: since then it was finished, and may be in use. So the daemon forgets the rows instead of
//! finishing or undoing anything, and the files are kept like all that the database does not know. What is about to expire lives for a day.

use std::io;

use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::op::OpState;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, Timestamp, ToolError};
use tokio::task::spawn_blocking;

use crate::context::Shared;
use crate::op::store_error;
use crate::os::paths::Paths;
use crate::store::vms::VmRecord;
use crate::store::{
    Connection, StoreError, builds, checkpoints, drives, epoch, history, images, now, ops, vms,
};
use crate::vm::actor::DAEMON;
use crate::vmm::{launched_boot, shim_that_stays};

/// Reason in the history of a VM that was being created when the copy was made.
const FORGOTTEN: &str = "forgotten: the database is older than its files, and had this VM as half created";

/// For how long nothing of an older database expires, in milliseconds: its times to live may have been extended since.
const GRACE_MS: i64 = 24 * 60 * 60 * 1000;

/// Makes the rows of an older database such that nothing is undone or removed by them. Can be repeated.
pub(super) async fn settle(shared: &Shared) -> Result<(), ToolError> {
    let paths = shared.paths.clone();
    let until = Timestamp::from_millis(now().as_millis().saturating_add(GRACE_MS));
    let spared = shared.store.write(move |tx| forget(tx, &paths, until)).await.map_err(store_error)?;
    if !spared.is_empty() {
        tracing::warn!(
            ?spared,
            "these VMs and checkpoints would expire within a day, and live for a day from now"
        );
    }
    Ok(())
}

/// Returns the names of what lives until `until`, but no longer.
fn forget(tx: &Connection, paths: &Paths, until: Timestamp) -> Result<Vec<String>, StoreError> {
    end_work(tx)?;
    for vm in vms::all(tx)? {
        if vm.state == VmState::Creating {
            forget_vm(tx, &vm)?;
        } else {
            has_started(tx, paths, vm)?;
        }
    }
    for drive in drives::all(tx)?.into_iter().filter(|drive| !drive.ready) {
        drives::delete(tx, drive.id)?;
    }
    for image in images::all(tx)?.into_iter().filter(|image| !image.ready) {
        images::delete(tx, image.id)?;
    }
    for checkpoint in checkpoints::all(tx)?.into_iter().filter(|checkpoint| !checkpoint.ready) {
        checkpoints::delete(tx, checkpoint.id)?;
    }
    epoch::spare(tx, until)
}

/// Ends operations and builds. The image of such a build stays.
fn end_work(tx: &Connection) -> Result<(), StoreError> {
    let error = || {
        let message = "nexusd was started with an older copy of its database, which had this as running";
        ToolError::new(ErrorCode::ShuttingDown, message).hint("check what there is, then call it again")
    };
    while let Some(build) = builds::list(tx, None, Some(BuildStatus::Building), None, 1)?.pop() {
        builds::finish(tx, build.id, BuildStatus::Failed, false, None, Some(&error()))?;
    }
    for op in ops::running(tx)? {
        let (id, progress) = (op.summary.op_id, &op.summary.progress);
        ops::finish(tx, id, OpState::Failed, progress, None, Some(&error()))?;
    }
    Ok(())
}

/// Forgets a VM that was being created, but not its whole drives.
fn forget_vm(tx: &Connection, vm: &VmRecord) -> Result<(), StoreError> {
    for drive in drives::of_vm(tx, vm.id)? {
        drives::detach(tx, drive.id)?;
    }
    vms::delete(tx, vm.id)?;
    history::insert(tx, vm.id, &vm.name, Some(vm.state), None, FORGOTTEN, DAEMON, vm.boot_id)
}

/// Takes from a VM what is for its first start only, which may be over by now: it would replace its root drive, or files on it.
fn has_started(tx: &Connection, paths: &Paths, vm: VmRecord) -> Result<(), StoreError> {
    let launched = launched_boot(&paths.vm(vm.id));
    let mut spec = vm.spec.clone();
    spec.warm = None;
    if launched.is_some() && launched != vm.boot_id {
        spec.files.clear();
    }
    if spec == vm.spec {
        return Ok(());
    }
    let before = vm.generation;
    vms::update(tx, &VmRecord { spec, generation: before + 1, ..vm }, before)
}

/// The error for a VM on whose disk a process still runs: say one of a boot that came after the copy of the database that the daemon has. The caller has
/// no boot of the VM that runs. Waits for up to a second for a process that is about to end.
pub(in crate::vm) async fn stray_of(paths: &Paths, vm: &VmRecord) -> Option<ToolError> {
    let (directory, known) = (paths.vm(vm.id), vm.boot_id);
    let found = spawn_blocking(move || -> io::Result<_> {
        let Some(shim) = shim_that_stays(&directory)? else { return Ok(None) };
        let is_unknown = launched_boot(&directory).is_some_and(|launched| Some(launched) != known);
        Ok(Some((shim.pid, is_unknown)))
    });
    let found = found.await.map_err(io::Error::other).flatten().unwrap_or_else(|error| {
        tracing::warn!(vm = %vm.name, %error, "cannot look for a shim");
        None
    });
    let (pid, is_unknown) = found?;
    let why = if is_unknown { ": the database does not know its boot" } else { "" };
    let message = format!("process {pid} still runs on its disk{why}");
    Some(ToolError::new(ErrorCode::VmWrongState, message).hint(format!("end process {pid} first")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nexus_schema::ByteSize;
    use nexus_schema::id::{BootId, OpId};
    use nexus_schema::tools::vm::VmFile;

    use super::*;
    use crate::op::summary;
    use crate::os::paths::vm_files;
    use crate::store::drives::{Attachment, DriveRecord};
    use crate::store::tests::vm;
    use crate::store::{Store, random_id};

    fn drive(of: &VmRecord, name: &str, position: u32) -> DriveRecord {
        DriveRecord {
            id: random_id(),
            name: name.parse().unwrap(),
            image_id: None,
            parent_id: None,
            made_for: Some(of.id),
            attachment: Some(Attachment { vm: of.id, position, mount: None }),
            ready: false,
            size: ByteSize::mib(16),
            read_only: false,
            owner: "uid:0".into(),
            created_at: Timestamp::from_millis(1),
        }
    }

    fn launch(paths: &Paths, vm: &VmRecord, boot: BootId) {
        let directory = paths.vm(vm.id);
        std::fs::create_dir_all(&directory).unwrap();
        let plan = serde_json::json!({ "plan": { "boot_id": boot } });
        std::fs::write(directory.join(vm_files::PLAN), plan.to_string()).unwrap();
    }

    async fn in_a_store(
        directory: &Path,
        work: impl FnOnce(&Connection) -> Result<(), StoreError> + Send + 'static,
    ) {
        let store = Store::open(&directory.join("nexus.db")).unwrap();
        store.write(|tx| work(tx)).await.unwrap();
    }

    #[tokio::test]
    async fn what_was_half_made_is_forgotten_and_whole_drives_stay() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        in_a_store(directory.path(), move |tx| {
            let half = VmRecord { state: VmState::Creating, ..vm("half", 3) };
            vms::insert(tx, &half)?;
            let (root, other) = (drive(&half, "root", 0), drive(&half, "other", 1));
            for drive in [&root, &other] {
                drives::insert(tx, drive)?;
                drive.attachment.iter().try_for_each(|to| drives::attach(tx, drive.id, to))?;
            }
            drives::made(tx, &root)?;
            let op = summary("vm_create", "uid:0", None);
            let id: OpId = op.op_id;
            ops::insert(tx, &op)?;

            // Once, or again after a start that was cut off.
            for _ in 0..2 {
                forget(tx, &paths, now())?;
                assert!(vms::all(tx)?.is_empty());
                let left = drives::all(tx)?;
                assert_eq!((left.len(), left[0].id, left[0].made_for), (1, root.id, None));
                assert!(drives::may_hold_data(tx, root.id)?);
                assert_eq!(ops::get(tx, id)?.unwrap().summary.state, OpState::Failed);
            }
            let past = history::list(tx, half.id, None, 10)?;
            assert_eq!((past.len(), past[0].1.reason.as_str()), (1, FORGOTTEN));
            Ok(())
        })
        .await;
    }

    #[tokio::test]
    async fn the_first_start_of_a_vm_is_not_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        in_a_store(directory.path(), move |tx| {
            let [mut never, mut since] = [vm("never", 3), vm("since", 4)];
            for vm in [&mut never, &mut since] {
                vm.spec.files.insert("/etc/motd".into(), VmFile::text("hello\n"));
                vm.spec.warm = Some(random_id());
                vms::insert(tx, vm)?;
            }
            launch(&paths, &since, random_id());
            for _ in 0..2 {
                forget(tx, &paths, now())?;
                let all = vms::all(tx)?;
                let of = |name: &str| all.iter().find(|vm| vm.name.as_str() == name).unwrap();
                assert!(of("never").spec.warm.is_none() && of("since").spec.warm.is_none());
                assert_eq!((of("never").spec.files.len(), of("since").spec.files.len()), (1, 0));
                assert_eq!(of("since").generation, since.generation + 1, "it is changed once");
            }
            Ok(())
        })
        .await;
    }

    #[tokio::test]
    async fn only_a_shim_that_holds_its_lock_still_runs() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path());
        let mut web = vm("web", 3);
        let message = async |web: &VmRecord| stray_of(&paths, web).await.map(|error| error.message);
        assert_eq!(message(&web).await, None);
        std::fs::create_dir_all(paths.vm(web.id)).unwrap();
        let lock = std::fs::File::create(paths.vm(web.id).join(vm_files::SHIM_LOCK)).unwrap();
        std::io::Write::write_all(&mut &lock, br#"{"pid":4711,"start_time":1}"#).unwrap();
        assert_eq!(message(&web).await, None);
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let runs = "process 4711 still runs on its disk";
        assert_eq!(message(&web).await.as_deref(), Some(runs));
        let boot: BootId = random_id();
        launch(&paths, &web, boot);
        let unknown = format!("{runs}: the database does not know its boot");
        assert_eq!(message(&web).await, Some(unknown));
        web.boot_id = Some(boot);
        assert_eq!(message(&web).await.as_deref(), Some(runs));
    }
}
