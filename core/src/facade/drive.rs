//! The drive tools.

use std::sync::Arc;

use nexus_schema::id::{DriveId, DriveKind};
use nexus_schema::tools::drive::{
    DriveAttachParams, DriveCreateParams, DriveDeleteOutput, DriveDeleteParams, DriveDetachParams,
    DriveDetails, DriveInspectParams, DriveListOutput, DriveListParams, DriveResizeOutput, DriveResizeParams,
    DriveUse,
};
use nexus_schema::tools::plan::Creation;
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, ToolError};

use super::plan::size_of_clone;
use super::source::may_use;
use super::vm::seen_rows;
use super::{CallContext, Nexus, Shared, cut_page, page, patience};
use crate::access::{Caller, Charge, Deed};
use crate::context::{Attach, Command, Handle, Registry, drive_error};
use crate::drive::{DISK, Locked};
use crate::op::{Begun, did_you_mean, once, store_error, summary};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::drives::{Attachment, DriveRecord};
use crate::store::tokens::Usage;
use crate::store::{drives, now, random_id};
use crate::vm::actor::busy_drive;
use crate::vm::create::clone_of_image;
use crate::vm::grow::grow_in_guest;
use crate::vm::policy;
use crate::vm::spec::{DISK_DEFAULT, DISK_MAX, DISK_MIN};
use crate::vm::wait::ask;
use crate::vmm::ShimClient;

/// The source of a new drive.
pub(super) enum From {
    /// An empty filesystem.
    Nothing,
    /// An image, as in the `image` argument of `vm_create`.
    Image(String),
    /// Another drive.
    Drive(Box<DriveRecord>),
}

impl Nexus {
    /// The tool `drive_create`.
    pub async fn drive_create(
        &self,
        ctx: &CallContext,
        params: DriveCreateParams,
    ) -> Result<Creation<DriveDetails>, ToolError> {
        let wait = patience(params.wait_s)?;
        if let Some(size) = params.size {
            check_size(size)?;
        }
        let shared = &self.shared;
        let same = DriveCreateParams { idempotency_key: None, dry_run: None, wait_s: None, ..params.clone() };
        let once = once(&ctx.caller.owner, "drive_create", params.idempotency_key.clone(), &same)?;
        if let Some(op) = shared.ops.earlier(once.as_ref()).await? {
            return shared.ops.wait(ctx, op, wait).await.map(Creation::from);
        }
        let from = match params.from.as_deref() {
            None => From::Nothing,
            Some(text) => match text.strip_prefix("drive:") {
                Some(drive) => From::Drive(Box::new(shared.drive(&ctx.caller, &reference(drive)?).await?)),
                None => {
                    may_use(&ctx.caller, Some(text)).await?;
                    shared.provision.check_image(text).await?;
                    From::Image(text.to_owned())
                }
            },
        };
        if params.dry_run == Some(true) {
            return shared.plan_drive(&params, from).await.map(Creation::from);
        }
        let id: DriveId = random_id();
        let drive = DriveRecord {
            id,
            name: params.name.map_or_else(|| made_up_name(id), Ok)?,
            image_id: None,
            parent_id: None,
            made_for: None,
            attachment: None,
            ready: false,
            size: params.size.unwrap_or(DISK_DEFAULT),
            read_only: params.read_only.unwrap_or(false),
            owner: ctx.caller.owner.to_string(),
            created_at: now(),
        };
        if let From::Drive(source) = &from {
            shared.check_down(source)?;
            check_not_smaller(params.size, source.size, &source.name)?;
        }
        let subject = (drive.id.to_string(), drive.name.to_string());
        let op = summary("drive_create", &drive.owner, Some(subject));
        let op_id = op.op_id;
        let charges = shared.tokens.charges(&ctx.caller.owner);
        let (row, charged) = (drive.clone(), charges.clone());
        let begun = shared.ops.begin(op, once, move |tx| {
            let more = Usage { disk: row.size.as_bytes(), ..Usage::default() };
            charged.iter().try_for_each(|charge| charge.check(tx, more, None))?;
            drives::insert(tx, &row)
        });
        if let Begun::Known(op) = begun.await? {
            return shared.ops.wait(ctx, op, wait).await.map(Creation::from);
        }
        failpoint::reach("drive-begun");
        let (work, caller, size) = (self.shared.clone(), ctx.caller.clone(), params.size);
        shared.ops.run(op_id, move |progress| async move {
            let made = tokio::select! {
                made = work.make_drive(&caller, drive.clone(), from, size, charges, &progress) => made,
                () = progress.cancelled() => {
                    Err(ToolError::new(ErrorCode::Cancelled, format!("creation of {} was cancelled", drive.name)))
                }
            };
            match made {
                Ok(drive) => work.drive_details(drive).await,
                Err(error) => {
                    work.forget_drive(drive.id).await?;
                    Err(error)
                }
            }
        });
        shared.ops.wait(ctx, op_id, wait).await.map(Creation::from)
    }

    /// The tool `drive_list`.
    pub async fn drive_list(
        &self,
        ctx: &CallContext,
        params: DriveListParams,
    ) -> Result<DriveListOutput, ToolError> {
        let limit = page(params.limit)?;
        let vm = params.vm.as_ref().map(|vm| self.shared.vms.resolve(&ctx.caller, vm)).transpose()?;
        let (attached, after) = (params.attached, params.cursor);
        let (caller, vms) = (ctx.caller.clone(), self.shared.vms.clone());
        let rows = self.shared.store.read(move |db| {
            let read = |after: Option<&str>, limit| drives::list(db, vm, attached, after, limit);
            let name = |row: &DriveRecord| row.name.to_string();
            seen_rows(limit + 1, after, name, read, |row| sees_drive(&vms, &caller, row))
        });
        let rows = rows.await.map_err(store_error)?;
        let (rows, next_cursor) = cut_page(rows, limit, |row| row.name.to_string());
        let mut drives = Vec::with_capacity(rows.len());
        for row in rows {
            drives.push(self.shared.drive_details(row).await?);
        }
        Ok(DriveListOutput { drives, next_cursor })
    }

    /// The tool `drive_inspect`.
    pub async fn drive_inspect(
        &self,
        ctx: &CallContext,
        params: DriveInspectParams,
    ) -> Result<DriveDetails, ToolError> {
        self.shared.drive_details(self.shared.drive(&ctx.caller, &params.drive).await?).await
    }

    /// The tool `drive_attach`.
    pub async fn drive_attach(
        &self,
        ctx: &CallContext,
        params: DriveAttachParams,
    ) -> Result<DriveDetails, ToolError> {
        let shared = &self.shared;
        let handle = shared.vms.get(&ctx.caller, &params.vm)?;
        let (drive, _locked) = shared.take_drive(&ctx.caller, &params.drive).await?;
        if let Some(attachment) = &drive.attachment {
            return Err(shared.in_use(&ctx.caller, &drive, attachment, "drive_detach it first"));
        }
        let (name, state, boot, has_root) = {
            let view = handle.view.borrow();
            let has_root = view.drives.iter().any(DriveRecord::is_root);
            (view.record.name.clone(), view.record.state, view.record.boot_id, has_root)
        };
        policy::change_drives(name.as_str(), state)?;
        policy::same_boot(name.as_str(), boot, params.if_boot_id)?;
        let is_root = params.root.unwrap_or(!has_root && params.mount.is_none());
        if !is_root {
            // The guest finds the drive by this label, whatever the order of its devices.
            let path = shared.paths.drive(drive.id);
            let labelled = shared.drives.label(&path, &drive.id.to_string(), &Progress::default()).await;
            labelled.map_err(drive_error)?;
        }
        let (mount, if_boot) = (params.mount.clone(), params.if_boot_id);
        let attach = Box::new(Attach { drive: drive.clone(), root: is_root, mount, if_boot });
        ask(&handle, |reply| Command::Attach { attach, reply }).await?;
        shared.drive_details(shared.any_drive(&Reference::Id(drive.id)).await?).await
    }

    /// The tool `drive_detach`.
    pub async fn drive_detach(
        &self,
        ctx: &CallContext,
        params: DriveDetachParams,
    ) -> Result<DriveDetails, ToolError> {
        let shared = &self.shared;
        let (drive, _locked) = shared.take_drive(&ctx.caller, &params.drive).await?;
        if let Some(handle) = shared.user_of(&drive) {
            let (drive, if_boot) = (drive.id, params.if_boot_id);
            ask(&handle, |reply| Command::Take { drive, if_boot, reply }).await?;
        }
        shared.drive_details(shared.any_drive(&Reference::Id(drive.id)).await?).await
    }

    /// The tool `drive_resize`.
    pub async fn drive_resize(
        &self,
        ctx: &CallContext,
        params: DriveResizeParams,
    ) -> Result<DriveResizeOutput, ToolError> {
        check_size(params.size)?;
        let shared = &self.shared;
        let (drive, _locked) = shared.take_drive(&ctx.caller, &params.drive).await?;
        shared.check_awake(&drive)?;
        check_not_smaller(Some(params.size), drive.size, &drive.name)?;
        let is_claimed = shared.claim_growth(&ctx.caller, &drive, params.size).await?;
        let grown = shared.grow(&drive, params.size).await;
        // What a file has grown by counts, even if the filesystem on it could not follow.
        let disk = shared.paths.drive(drive.id).join(DISK);
        let has_grown = async || match tokio::fs::metadata(&disk).await {
            Ok(file) => file.len() > drive.size.as_bytes(),
            Err(_) => true,
        };
        if grown.is_err() && is_claimed && !has_grown().await {
            let (id, size, by) = (drive.id, drive.size, ctx.caller.owner.to_string());
            let more = params.size.as_bytes().saturating_sub(size.as_bytes());
            let undone = shared.store.write(move |tx| {
                drives::take_growth(tx, id, &by, more)?;
                drives::set_size(tx, id, size)
            });
            if let Err(error) = undone.await {
                tracing::warn!(drive = %drive.name, %error, "a drive counts for its quota as if it had grown");
            }
        }
        let in_effect = grown?;
        let drive = shared.drive_details(shared.any_drive(&Reference::Id(drive.id)).await?).await?;
        Ok(DriveResizeOutput { drive, in_effect })
    }

    /// The tool `drive_delete`.
    pub async fn drive_delete(
        &self,
        ctx: &CallContext,
        params: DriveDeleteParams,
    ) -> Result<DriveDeleteOutput, ToolError> {
        let shared = &self.shared;
        shared.make_room().await;
        let (drive, _locked) = shared.take_drive(&ctx.caller, &params.drive).await?;
        if let Some(attachment) = &drive.attachment {
            return Err(shared.in_use(
                &ctx.caller,
                &drive,
                attachment,
                "drive_detach it first, or vm_delete the VM",
            ));
        }
        let id = drive.id;
        let is_used =
            shared.store.read(move |db| drives::may_hold_data(db, id)).await.map_err(store_error)?;
        // One that is incomplete has nothing to lose.
        let may_hold_data = is_used && shared.drives.problem(&shared.paths.drive(id)).await.is_none();
        let deed = deletion(&ctx.caller, &drive, may_hold_data);
        shared.confirmations.require(&ctx.caller, deed, params.confirm.as_deref())?;
        shared.forget_drive(drive.id).await?;
        Ok(DriveDeleteOutput { id: drive.id, name: drive.name })
    }
}

impl Shared {
    /// A drive that is whole and that a caller sees; one that it may not see does not exist.
    async fn drive(&self, caller: &Caller, drive: &Reference<DriveKind>) -> Result<DriveRecord, ToolError> {
        let wanted = drive.clone();
        let found = self.store.read(move |db| drives::get(db, &wanted)).await.map_err(store_error)?;
        if let Some(found) = found.filter(|found| sees_drive(&self.vms, caller, found)) {
            return Ok(found);
        }
        let mut all = self.store.read(drives::all).await.map_err(store_error)?;
        all.retain(|drive| sees_drive(&self.vms, caller, drive));
        Err(did_you_mean(no_drive(drive), &drive.to_string(), all.iter().map(|drive| drive.name.as_str())))
    }

    /// A drive that is whole, whoever asks.
    async fn any_drive(&self, drive: &Reference<DriveKind>) -> Result<DriveRecord, ToolError> {
        let wanted = drive.clone();
        let found = self.store.read(move |db| drives::get(db, &wanted)).await.map_err(store_error)?;
        found.ok_or_else(|| no_drive(drive))
    }

    /// Locks a drive that a caller sees. Nothing else can change it until the lock is dropped.
    async fn take_drive(
        &self,
        caller: &Caller,
        drive: &Reference<DriveKind>,
    ) -> Result<(DriveRecord, Locked), ToolError> {
        let found = self.drive(caller, drive).await?;
        let locked = self.drive_locks.take(&[found.id]).await.map_err(|_| busy_drive(found.name.as_str()))?;
        // Read again under the lock: the caller may no longer see it.
        Ok((self.drive(caller, &Reference::Id(found.id)).await?, locked))
    }

    /// Returns the task of the VM to which a drive is attached.
    fn user_of(&self, drive: &DriveRecord) -> Option<Handle> {
        let attachment = drive.attachment.as_ref()?;
        self.vms.of_daemon(&Reference::Id(attachment.vm)).ok()
    }

    /// Fails if a running VM may write to a drive.
    pub(super) fn check_down(&self, drive: &DriveRecord) -> Result<(), ToolError> {
        let Some(handle) = self.user_of(drive) else { return Ok(()) };
        self.check_awake(drive)?;
        let view = handle.view.borrow();
        if drive.read_only || !view.record.state.may_run() {
            return Ok(());
        }
        Err(ToolError::new(
            ErrorCode::VmWrongState,
            format!(
                "{} is {}: its drive {} could change while it is copied",
                view.record.name, view.record.state, drive.name
            ),
        )
        .hint(format!("call vm_stop with vm: {} first", view.record.name)))
    }

    /// Fails if a VM has the drive whose memory is saved: that knows what is on it.
    fn check_awake(&self, drive: &DriveRecord) -> Result<(), ToolError> {
        let Some(handle) = self.user_of(drive) else { return Ok(()) };
        let view = handle.view.borrow();
        let record = &view.record;
        if !policy::is_asleep(record) {
            return Ok(());
        }
        let (name, state) = (&record.name, record.state);
        let message = format!("{name} is {state}: its memory knows what is on its drive {}", drive.name);
        Err(ToolError::new(ErrorCode::VmWrongState, message).hint(format!(
            "call vm_start with vm: {name}, which wakes it, or vm_stop, which gives its memory up"
        )))
    }

    fn in_use(&self, caller: &Caller, drive: &DriveRecord, attachment: &Attachment, hint: &str) -> ToolError {
        let vm = self
            .vms
            .get(caller, &Reference::Id(attachment.vm))
            .map(|vm| vm.view.borrow().record.name.to_string());
        let vm = vm.map_or_else(|_| "another VM".to_owned(), |vm| format!("the VM {vm}"));
        ToolError::new(ErrorCode::InUse, format!("{vm} has the drive {}", drive.name)).hint(hint)
    }

    /// Creates the disk of a drive that has a row.
    async fn make_drive(
        self: &Arc<Self>,
        caller: &Caller,
        mut drive: DriveRecord,
        from: From,
        size: Option<ByteSize>,
        charges: Vec<Charge>,
        progress: &Progress,
    ) -> Result<DriveRecord, ToolError> {
        let path = self.paths.drive(drive.id);
        match from {
            From::Nothing => {
                progress.step("creating an empty filesystem");
                let label = drive.id.to_string();
                let made = self.drives.create_formatted(&path, drive.size, &label, progress).await;
                made.map_err(drive_error)?;
            }
            From::Image(from) => {
                let image = self.provision.image(&from, &drive.owner, progress).await?;
                drive.image_id = Some(image.id);
                drive.size = size_of_clone(size, &image)?;
                progress.step("cloning the image");
                clone_of_image(self, &image, drive.id, drive.size, progress).await?;
            }
            From::Drive(source) => {
                let locked = self.drive_locks.take(&[source.id]).await;
                let _locked = locked.map_err(|_| busy_drive(source.name.as_str()))?;
                let source = self.drive(caller, &Reference::Id(source.id)).await?;
                self.check_down(&source)?;
                self.machine_of(&source).await?;
                check_not_smaller(size, source.size, &source.name)?;
                drive.image_id = source.image_id;
                drive.parent_id = Some(source.id);
                drive.size = size.unwrap_or(source.size);
                progress.step("cloning the drive");
                let disk = self.paths.drive(source.id).join(DISK);
                let made = self.drives.clone_image(&disk, &path, drive.size, progress).await;
                made.map_err(drive_error)?;
            }
        }
        failpoint::reach("drive-made");
        drive.ready = true;
        let row = drive.clone();
        let made = self.store.write(move |tx| {
            // What it is made of may be larger than what was asked for.
            drives::made(tx, &row)?;
            charges.iter().try_for_each(|charge| charge.check_held(tx))
        });
        made.await.map_err(store_error)?;
        failpoint::reach("drive-ready");
        Ok(drive)
    }

    /// Deletes a detached drive from the store and from the disk.
    async fn forget_drive(&self, id: DriveId) -> Result<(), ToolError> {
        self.store.write(move |tx| drives::delete(tx, id)).await.map_err(store_error)?;
        failpoint::reach("drive-forgotten");
        self.drives.delete(&self.paths.drive(id)).await.map_err(drive_error)
    }

    /// Returns the running machine that has a drive. Fails if a process has it that the daemon does not know.
    async fn machine_of(&self, drive: &DriveRecord) -> Result<Option<(Handle, Arc<ShimClient>)>, ToolError> {
        let Some(handle) = self.user_of(drive) else { return Ok(None) };
        let shim = ask(&handle, |reply| Command::Machine { reply }).await?;
        Ok(shim.map(|shim| (handle, shim)))
    }

    /// Has a drive grow that nobody else changes; whether all of it can be used now.
    async fn grow(&self, drive: &DriveRecord, size: ByteSize) -> Result<bool, ToolError> {
        let path = self.paths.drive(drive.id);
        match self.machine_of(drive).await? {
            None => {
                self.drives.grow(&path, size, &Progress::default()).await.map_err(drive_error)?;
                failpoint::reach("drive-grown");
                self.note_size(drive, size).await?;
                Ok(true)
            }
            Some((handle, shim)) => {
                self.drives.lengthen(&path, size).await.map_err(drive_error)?;
                failpoint::reach("drive-lengthened-running");
                self.note_size(drive, size).await?;
                Ok(grow_running(&handle, &shim, drive, size).await)
            }
        }
    }

    /// Refuses a growth that a quota does not allow, and counts one that it allows; whether it was counted.
    async fn claim_growth(
        &self,
        caller: &Caller,
        drive: &DriveRecord,
        size: ByteSize,
    ) -> Result<bool, ToolError> {
        let mut charges = self.tokens.charges(&drive.owner);
        // It may be another's drive, or that of a token which no longer works.
        let by = (*caller.owner != *drive.owner).then(|| caller.owner.to_string());
        if let Some(by) = &by {
            charges.extend(self.tokens.charges(by));
        }
        if charges.is_empty() {
            return Ok(false);
        }
        let (more, id) = (size.as_bytes().saturating_sub(drive.size.as_bytes()), drive.id);
        let claimed = self.store.write(move |tx| {
            let taken = Usage { disk: more, ..Usage::default() };
            charges.iter().try_for_each(|charge| charge.check(tx, taken, None))?;
            if let Some(by) = &by {
                drives::add_growth(tx, id, by, more)?;
            }
            drives::set_size(tx, id, size)
        });
        claimed.await.map(|()| true).map_err(store_error)
    }

    async fn note_size(&self, drive: &DriveRecord, size: ByteSize) -> Result<(), ToolError> {
        let id = drive.id;
        self.store.write(move |tx| drives::set_size(tx, id, size)).await.map_err(store_error)?;
        match self.user_of(drive) {
            Some(handle) => ask(&handle, |reply| Command::Resized { drive: id, size, reply }).await,
            None => Ok(()),
        }
    }

    pub(super) async fn drive_details(&self, drive: DriveRecord) -> Result<DriveDetails, ToolError> {
        let directory = self.paths.drive(drive.id);
        // A drive that is being deleted at this moment takes no space.
        let used_bytes = self.drives.allocated_bytes(&directory).await.ok();
        let problem = self.drives.problem(&directory).await;
        let is_root = drive.is_root();
        let attached_to = match (&drive.attachment, self.user_of(&drive)) {
            (Some(attachment), Some(handle)) => Some(DriveUse {
                vm_id: attachment.vm,
                vm_name: handle.view.borrow().record.name.clone(),
                root: is_root,
                mount: attachment.mount.clone(),
            }),
            _ => None,
        };
        Ok(DriveDetails {
            id: drive.id,
            name: drive.name,
            size: drive.size,
            used_bytes,
            problem,
            read_only: drive.read_only,
            deleted_with_vm: attached_to.as_ref().is_some_and(|at| drive.made_for == Some(at.vm_id)),
            attached_to,
            image_id: drive.image_id,
            parent_id: drive.parent_id,
            path: directory.join(DISK).display().to_string(),
            owner: drive.owner,
            created_at: drive.created_at,
        })
    }
}

/// Whether a drive exists for a caller: its own ones do, and those of VMs that it sees.
pub(super) fn sees_drive(vms: &Registry, caller: &Caller, drive: &DriveRecord) -> bool {
    let is_of_seen = || {
        let at = drive.attachment.as_ref();
        at.is_some_and(|at| vms.get(caller, &Reference::Id(at.vm)).is_ok())
    };
    caller.made(&drive.owner) || is_of_seen()
}

/// What of the deletion of a drive needs a confirmation: data of a VM, and a drive that somebody else made.
fn deletion(caller: &Caller, drive: &DriveRecord, may_hold_data: bool) -> Deed {
    let mut why = Vec::new();
    if may_hold_data {
        why.push("may hold data of a VM".to_owned());
    }
    if !caller.is_maker(&drive.owner) {
        why.push(format!("was made by {}", drive.owner));
    }
    let what = format!("delete the drive {} ({}), which {}", drive.name, drive.id, why.join(" and "));
    Deed { tool: "drive_delete", plan: if why.is_empty() { Vec::new() } else { vec![what] } }
}

fn no_drive(drive: &Reference<DriveKind>) -> ToolError {
    ToolError::new(ErrorCode::DriveNotFound, format!("there is no drive {drive}"))
        .hint("call drive_list to see the drives")
}

/// Makes a running VM use the new size of its drive. Returns whether all of it can be used now.
async fn grow_running(handle: &Handle, shim: &ShimClient, drive: &DriveRecord, size: ByteSize) -> bool {
    let (index, link) = {
        let view = handle.view.borrow();
        (view.drives.iter().position(|d| d.id == drive.id), view.link.clone())
    };
    let Some(index) = index else { return false };
    match grow_in_guest(shim, link.as_ref(), index, size).await {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(drive = %drive.name, error, "the VM uses the new size of its drive only after its next start");
            false
        }
    }
}

fn reference(text: &str) -> Result<Reference<DriveKind>, ToolError> {
    text.parse().map_err(|_| {
        ToolError::invalid(format!("`drive:{}` is not a drive's name or id", text.escape_debug()))
    })
}

fn check_size(size: ByteSize) -> Result<(), ToolError> {
    if size < DISK_MIN || size > DISK_MAX {
        return Err(ToolError::invalid(format!("size must be {DISK_MIN} to {DISK_MAX}, got {size}")));
    }
    if !size.as_bytes().is_multiple_of(4096) {
        return Err(ToolError::invalid(format!("size must be a multiple of 4KiB, got {size}")));
    }
    Ok(())
}

pub(super) fn check_not_smaller(size: Option<ByteSize>, least: ByteSize, of: &Name) -> Result<(), ToolError> {
    match size {
        Some(size) if size < least => {
            Err(ToolError::invalid(format!("size is {size}, smaller than the {least} of {of}"))
                .hint("drives only grow"))
        }
        _ => Ok(()),
    }
}

fn made_up_name(id: DriveId) -> Result<Name, ToolError> {
    let text = id.to_string();
    format!("drive-{}", &text[text.len() - 6..]).parse().map_err(|e| ToolError::internal(format!("{e}")))
}
