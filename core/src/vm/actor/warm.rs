//! The warm start of a new VM: it goes on from a machine that was prepared for such VMs, or starts cold if it cannot.

use nexus_schema::id::{BootId, CheckpointId};
use nexus_schema::link::ResumeKind;
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};

use super::{Actor, DAEMON};
use crate::context::{RestoreFrom, drive_error};
use crate::os::failpoint;
use crate::progress::Progress;
use crate::store::random_id;
use crate::vm::checkpoint::same_card;
use crate::vm::grow::grow_in_guest;
use crate::vm::warm;
use crate::vmm::launched_boot;

impl Actor {
    /// Starts the VM from the prepared machine that its drive is a copy of; cold if that fails. Returns the boot that was begun.
    pub(super) async fn start_warm(
        &mut self,
        from: CheckpointId,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        let has_waited = self.shared.warming.claim_of(self.record.id).is_some();
        match Box::pin(self.go_on_from(from, who, why, progress)).await {
            Ok(boot) => Ok(boot),
            Err(error) => {
                // What is wrong with a machine that waited, with this VM or with the host says nothing of the prepared one.
                let is_suspect = !has_waited
                    && matches!(error.code, ErrorCode::CheckpointNotFound | ErrorCode::BootFailed);
                Box::pin(self.start_cold(&error.message, is_suspect, progress)).await
            }
        }
    }

    async fn go_on_from(
        &mut self,
        from: CheckpointId,
        who: &str,
        why: &str,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        progress.step("checking the prepared machine");
        self.waiting = self.shared.warming.take_claim(self.record.id);
        // One that waited has used the drive, and what it remembers of that is gone.
        if self.waiting.is_none() && launched_boot(&self.shared.paths.vm(self.record.id)).is_some() {
            return Err(ToolError::new(ErrorCode::Changed, "the machine that waited for the VM is gone"));
        }
        // The memory of one that waited was checked when it was restored.
        let (prepared, used) = warm::take(&self.shared, from, self.waiting.is_none()).await?;
        self.prepared = Some(used);
        self.prepared_disk = Some(prepared.disk);
        if self.waiting.is_some() && self.drives.len() != 1 {
            return Err(ToolError::new(
                ErrorCode::Changed,
                "the VM has other drives than the machine that waited",
            ));
        }
        same_card(&prepared.manifest, self.record.spec.network.mode)?;
        failpoint::reach("warm-checked");
        let from = RestoreFrom {
            who: who.to_owned(),
            kind: ResumeKind::Warm,
            directory: self.shared.paths.prepared(from),
            manifest: prepared.manifest,
            token: prepared.token,
            drives: Vec::new(),
            if_boot: None,
            progress: progress.clone(),
        };
        let what = if self.waiting.is_some() { "a machine that waited" } else { "a prepared machine" };
        self.launch_from(Some(&from), who, &format!("{why}: warm, from {what}"), progress).await
    }

    /// After the end of the VMM: starts the VM cold, if it was being started warm. Returns whether it was.
    pub(super) async fn cold_instead(&mut self, why: &str) -> bool {
        let is_starting = matches!(self.record.state, VmState::Starting | VmState::Running);
        if !is_starting || self.record.spec.warm.is_none() {
            return false;
        }
        Box::pin(self.start_cold(why, true, &Progress::default())).await.ok();
        true
    }

    /// Starts a VM cold whose warm start failed. A prepared machine that may be why is not used again.
    async fn start_cold(
        &mut self,
        why_not: &str,
        is_suspect: bool,
        progress: &Progress,
    ) -> Result<BootId, ToolError> {
        tracing::warn!(vm = %self.record.name, why_not, "a warm start failed: starting cold");
        self.end_waiting().await;
        drop(self.prepared.take());
        if let Some(machine) = self.record.spec.warm.filter(|_| is_suspect) {
            // Another VM that is being started from it removes it when that fails.
            warm::remove(&self.shared, machine).await;
        }
        self.had_mishap = false;
        let why = format!("the warm start failed: {why_not}; starting cold");
        let launched = self.launch(DAEMON, &why, progress).await;
        if let Err(error) = &launched
            && matches!(self.record.state, VmState::Starting | VmState::Running)
        {
            let reason = format!("{why}: {}", error.message);
            self.settle(VmState::Failed, Some(reason), "it did not come up").await;
        }
        launched
    }

    /// Ends the machine that waited for this VM, if there is one.
    pub(super) async fn end_waiting(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            warm::pool::end_vmm(&waiting.shim).await;
        }
        match self.record.state {
            VmState::Creating => warm::pool::discard_claim(&self.shared, self.record.id).await,
            _ => warm::pool::end_claim(&self.shared, self.record.id).await,
        }
    }

    /// Before a cold start: a drive that is a copy of a prepared machine's, and that no guest has made its own, becomes one of the image. Returns the
    /// machine that the row names until it is written again, if it names one.
    pub(super) async fn leave_prepared(&mut self) -> Result<Option<CheckpointId>, ToolError> {
        if self.record.spec.warm.is_none() {
            return Ok(None);
        }
        let (_, root) = warm::root_of(&self.drives)?;
        let Some(image) = self.record.image_id else {
            return Err(ToolError::internal(format!("{} has no image", self.record.name)));
        };
        let root = root.clone();
        // Never one that may be somebody's.
        if root.made_for == Some(self.record.id) {
            self.forget_machine().await?;
            let master = self.shared.paths.image(image).join(crate::image::ROOTFS);
            let path = self.shared.paths.drive(root.id);
            let made = self.shared.drives.clone_again(&master, &path, root.size, &Progress::default()).await;
            made.map_err(drive_error)?;
        }
        drop(self.prepared.take());
        let in_row = self.record.spec.warm.take();
        failpoint::reach("warm-replaced");
        Ok(in_row)
    }

    /// Records that no start goes on from the prepared machine any more, before its drive is replaced: its memory would go on with another disk than it
    /// knows. The row names a machine that there is not, so a start is a cold one, and replaces the drive again.
    async fn forget_machine(&mut self) -> Result<(), ToolError> {
        let machine = self.record.spec.warm.replace(random_id());
        if let Err(error) = self.write(None).await {
            self.record.spec.warm = machine;
            self.publish();
            return Err(error);
        }
        Ok(())
    }

    /// Once the guest of a warm start is linked: gives it the disk that it is to have. Returns whether the VM can become ready; if not, it starts cold.
    pub(super) async fn finish_warm(&mut self) -> bool {
        if self.record.spec.warm.is_none() {
            return true;
        }
        let finished = match self.grow_root().await {
            Ok(()) => self.keep_root().await,
            Err(error) => Err(error),
        };
        if let Err(error) = finished {
            match self.kill_boot().await {
                Ok(()) => {
                    self.cold_instead(&error.message).await;
                }
                Err(error) => self.still_runs(&error).await,
            }
            return false;
        }
        true
    }

    /// Records that the root drive is the VM's own, before anybody can use it: as long as the row says otherwise, a cold start replaces it.
    async fn keep_root(&mut self) -> Result<(), ToolError> {
        let warm = self.record.spec.warm.take();
        // They are not needed for another start any more.
        let files = std::mem::take(&mut self.record.spec.files);
        if let Err(error) = self.write(None).await {
            (self.record.spec.warm, self.record.spec.files) = (warm, files);
            self.publish();
            return Err(error);
        }
        drop(self.prepared.take());
        Ok(())
    }

    /// Before the root drive leaves the VM: makes it one of the image, if it is a copy of a prepared machine's. No later start replaces the VM's root
    /// drive then, which may be any. The caller has locked the drive.
    pub(super) async fn give_up_warm(&mut self) -> Result<(), ToolError> {
        if self.record.spec.warm.is_none() {
            return Ok(());
        }
        self.end_waiting().await;
        let in_row = self.leave_prepared().await?;
        if let Err(error) = self.write(None).await {
            self.record.spec.warm = in_row;
            self.publish();
            return Err(error);
        }
        Ok(())
    }

    async fn grow_root(&mut self) -> Result<(), ToolError> {
        let known = self.prepared_disk.take();
        let (index, root) = warm::root_of(&self.drives)?;
        // Most have the size of the machine's.
        if known == Some(root.size) {
            return Ok(());
        }
        let path = self.shared.paths.drive(root.id);
        self.shared.drives.lengthen(&path, root.size).await.map_err(drive_error)?;
        failpoint::reach("warm-lengthened");
        let Some(boot) = &self.boot else {
            return Err(ToolError::internal(format!("{} runs without a boot", self.record.name)));
        };
        let grown = grow_in_guest(&boot.shim, boot.link.as_ref(), index, root.size).await;
        grown.map_err(|why| ToolError::new(ErrorCode::BootFailed, format!("grow its disk: {why}")))
    }
}
