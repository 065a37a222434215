//! `image_create` from a VM: a copy of its root drive becomes an image.

use nexus_schema::id::{DriveId, ImageKind, VmKind};
use nexus_schema::link::InitMode;
use nexus_schema::tools::image::ImageCreateParams;
use nexus_schema::tools::plan::{Plan, PlanAction, PlanStep, PlanThing};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

use super::Shared;
use super::plan::name_taken;
use crate::access::Caller;
use crate::context::{CopyDrives, Handle};
use crate::drive::{DISK, KEEP_FREE};
use crate::op::store_error;
use crate::os::{disk, failpoint};
use crate::progress::Progress;
use crate::provision::{Copied, step};
use crate::store::drives::DriveRecord;
use crate::store::images::ImageRecord;
use crate::store::{images, random_id};
use crate::vm::copies::copy_drives;
use crate::vm::policy;

/// A VM of whose root drive an image is to be made.
#[derive(Debug)]
pub(super) struct OfVm {
    handle: Handle,
    /// The VM's name.
    pub(super) name: Name,
    root: DriveRecord,
    init: InitMode,
}

impl OfVm {
    /// Refuses a VM whose drives cannot be copied now.
    pub(super) fn check(&self) -> Result<(), ToolError> {
        let view = self.handle.view.borrow();
        policy::copy_drives(&view.record).map(drop)
    }
}

impl Shared {
    /// The VM that `vm:NAME` means, which the caller sees; `None` for any other source.
    pub(super) fn vm_as_source(&self, caller: &Caller, from: &str) -> Result<Option<OfVm>, ToolError> {
        let Some(vm) = from.strip_prefix("vm:") else { return Ok(None) };
        let vm: Reference<VmKind> = vm.parse().map_err(|e| ToolError::invalid(format!("`{from}`: {e}")))?;
        let handle = self.vms.get(caller, &vm)?;
        let (name, root, init) = {
            let view = handle.view.borrow();
            let root = view.drives.iter().find(|drive| drive.is_root()).cloned();
            (view.record.name.clone(), root, view.record.spec.init)
        };
        let Some(root) = root else {
            let message = format!("{name} has no root drive to make an image of");
            return Err(ToolError::new(ErrorCode::DriveNotFound, message)
                .hint("attach one: drive_attach with root: true"));
        };
        Ok(Some(OfVm { handle, name, root, init }))
    }

    /// What `image_create` from a VM would do.
    pub(super) async fn plan_image_of_vm(
        &self,
        of_vm: &OfVm,
        params: &ImageCreateParams,
    ) -> Result<Plan, ToolError> {
        let name = params.name.clone().unwrap_or_else(|| of_vm.name.clone());
        let reference = Reference::Name(name.clone());
        if self.store.read(move |db| images::get(db, &reference)).await.map_err(store_error)?.is_some() {
            return Err(name_taken("image", &name));
        }
        let used = PlanStep {
            name: Some(of_vm.root.name.to_string()),
            size: Some(of_vm.root.size),
            ..step(PlanAction::Use, PlanThing::Drive)
        };
        let build = PlanStep {
            name: Some(name.to_string()),
            source: Some(format!("vm:{}", of_vm.name)),
            ..step(PlanAction::Build, PlanThing::Image)
        };
        self.plan(PlanThing::Image, Some(name), None, vec![used, build])
    }

    /// Makes an image of a VM's root drive. A copy is made first, so the VM stands still only for that. Of an image that was not made, nothing is left.
    pub(super) async fn image_of_vm(
        &self,
        of_vm: OfVm,
        name: Name,
        init: Option<InitMode>,
        owner: &str,
        progress: &Progress,
    ) -> Result<ImageRecord, ToolError> {
        let image = match of_vm.root.image_id {
            Some(id) => {
                let wanted = Reference::Id(id);
                self.store.read(move |db| images::get(db, &wanted)).await.map_err(store_error)?
            }
            None => None,
        };
        let stage = self.provision.scratch().claim(random_id::<ImageKind>());
        let file = stage.path().join(DISK);
        let made = async {
            self.make_stage(of_vm.root.id, stage.path(), owner).await?;
            let copy = CopyDrives { drives: vec![(of_vm.root.id, file.clone())], progress: progress.clone() };
            copy_drives(&of_vm.handle, copy).await?;
            failpoint::reach("image-vm-copied");
            let copied = Copied { vm: of_vm.name.clone(), file: file.clone(), image, init: of_vm.init };
            let init = init.unwrap_or(of_vm.init);
            self.provision.create_image_of_copy(copied, name, init, owner, progress).await
        };
        let made = made.await;
        stage.clear().await;
        made
    }

    /// Makes the directory for the copy of a drive, if there is room for it, and if the owner's quota has room for an image as large as the drive.
    async fn make_stage(
        &self,
        drive: DriveId,
        stage: std::path::PathBuf,
        owner: &str,
    ) -> Result<(), ToolError> {
        let from = self.paths.drive(drive).join(DISK);
        let is_copied = self.drives.backend() == "copy";
        let made = tokio::task::spawn_blocking(move || -> std::io::Result<(u64, u64, u64)> {
            fs_err::create_dir_all(&stage)?;
            let occupied = disk::allocated_bytes(&from)?;
            let needed = if is_copied { occupied } else { 0 };
            Ok((occupied, needed.saturating_add(KEEP_FREE), disk::free_bytes(&stage)?))
        });
        let made = made.await.map_err(|e| ToolError::internal(format!("look at a drive: {e}")))?;
        if let Ok((occupied, ..)) = made {
            // How large the image is, is known once it is made; it has at most the files of the drive.
            self.check_disk_quota(owner, occupied).await?;
        }
        match made {
            Ok((_, needed, free)) if free < needed => {
                let message = format!(
                    "a copy of the drive needs {} MiB, and the disk of the state directory has {} MiB free",
                    needed >> 20,
                    free >> 20
                );
                Err(ToolError::new(ErrorCode::DiskFull, message)
                    .hint("free space on the host, for example with prune; the VM is as it was"))
            }
            Ok(_) => Ok(()),
            Err(error) => {
                let code = if disk::is_full(&error) { ErrorCode::DiskFull } else { ErrorCode::Internal };
                Err(ToolError::new(code, format!("make room for a copy of the drive: {error}")))
            }
        }
    }
}
