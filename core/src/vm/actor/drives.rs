//! The drives of a VM: attached and detached while the VM is stopped.

use std::path::Path;

use nexus_schema::id::{BootId, DriveId};
use nexus_schema::{ByteSize, ErrorCode, ToolError};

use super::Actor;
use crate::context::Attach;
use crate::drive::Locked;
use crate::progress::Progress;
use crate::store::drives::{self, Attachment, DriveRecord};
use crate::vm::{policy, unknown};

/// Maximum number of drives of a VM, including the root drive. The kernel's modules are on one more.
pub(crate) const DRIVES_MAX: usize = 7;

impl Actor {
    pub(super) async fn attach(&mut self, attach: Attach) -> Result<(), ToolError> {
        let Attach { mut drive, root, mount, if_boot } = attach;
        self.same_boot(if_boot)?;
        self.check_alone().await?;
        self.finish_rollback().await?;
        let name = &self.record.name;
        policy::change_drives(name.as_str(), self.record.state)?;
        if self.drives.len() >= DRIVES_MAX {
            return Err(ToolError::invalid(format!("{name} already has {DRIVES_MAX} drives, the maximum")));
        }
        let has_root = self.drives.iter().any(DriveRecord::is_root);
        let (position, mount) = match root {
            true if has_root => {
                return Err(ToolError::new(ErrorCode::InUse, format!("{name} already has a root drive"))
                    .hint("call drive_detach for it first, or attach this one with root: false"));
            }
            true if mount.is_some() => {
                return Err(ToolError::invalid("a root drive takes no mount: it is always at /"));
            }
            true => (0, None),
            false => {
                let path = mount.unwrap_or_else(|| format!("/mnt/{}", drive.name));
                check_mount(&path)?;
                let taken = self.drives.iter().find(|d| mount_of(d) == Some(path.as_str()));
                if let Some(other) = taken {
                    return Err(ToolError::new(
                        ErrorCode::InUse,
                        format!("the drive {} is already mounted at {path}", other.name),
                    )
                    .hint("choose another mount"));
                }
                (self.free_position(), Some(path))
            }
        };
        let attachment = Attachment { vm: self.record.id, position, mount };
        let (id, row) = (drive.id, attachment.clone());
        self.shared
            .store
            .write(move |tx| drives::attach(tx, id, &row))
            .await
            .map_err(crate::op::store_error)?;
        drive.attachment = Some(attachment);
        self.drives.push(drive);
        self.drives.sort_by_key(|d| d.attachment.as_ref().map(|a| a.position));
        self.publish();
        Ok(())
    }

    pub(super) async fn detach(&mut self, drive: DriveId, if_boot: Option<BootId>) -> Result<(), ToolError> {
        if !self.drives.iter().any(|d| d.id == drive) {
            return Ok(());
        }
        self.same_boot(if_boot)?;
        policy::change_drives(self.record.name.as_str(), self.record.state)?;
        self.check_alone().await?;
        self.finish_rollback().await?;
        if self.drives.iter().any(|known| known.id == drive && known.is_root()) {
            self.give_up_warm().await?;
        }
        self.shared.store.write(move |tx| drives::detach(tx, drive)).await.map_err(crate::op::store_error)?;
        self.drives.retain(|d| d.id != drive);
        self.publish();
        Ok(())
    }

    /// Updates a drive's size in memory; its row has the new size already.
    pub(super) fn resized(&mut self, drive: DriveId, size: ByteSize) {
        for known in self.drives.iter_mut().filter(|d| d.id == drive) {
            known.size = size;
        }
        self.publish();
    }

    /// Fails if a process that is not of a boot of this task still runs on the VM's disk. It may be of a boot that the database does not know.
    pub(super) async fn check_alone(&self) -> Result<(), ToolError> {
        let has_waiting = self.waiting.is_some() || self.shared.warming.claim_of(self.record.id).is_some();
        if self.boot.is_some() || has_waiting {
            return Ok(());
        }
        match unknown::stray_of(&self.shared.paths, &self.record).await {
            Some(error) => {
                let message = format!("{}: {}", self.record.name, error.message);
                Err(ToolError { message, ..error })
            }
            None => Ok(()),
        }
    }

    /// Locks this VM's drives.
    pub(super) async fn lock_drives(&self) -> Result<Locked, ToolError> {
        let ids: Vec<DriveId> = self.drives.iter().map(|d| d.id).collect();
        self.shared.drive_locks.take(&ids).await.map_err(|busy| {
            let name = self.drives.iter().find(|d| d.id == busy).map(|d| d.name.to_string());
            busy_drive(&name.unwrap_or_else(|| busy.to_string()))
        })
    }

    /// Fails unless the VM has a root drive and the files of all its drives exist.
    pub(super) fn check_drives(&self) -> Result<(), ToolError> {
        let name = &self.record.name;
        if !self.drives.iter().any(DriveRecord::is_root) {
            return Err(ToolError::new(ErrorCode::DriveNotFound, format!("{name} has no root drive"))
                .hint("attach one: drive_attach with root: true"));
        }
        for drive in &self.drives {
            let path = self.shared.paths.drive(drive.id).join(crate::drive::DISK);
            if let Err(error) = fs_err::metadata(&path) {
                return Err(ToolError::new(
                    ErrorCode::DriveNotFound,
                    format!("drive {}: {error}", drive.name),
                )
                .hint("its file is missing: delete the VM and create it again"));
            }
        }
        Ok(())
    }

    /// Syncs the VM's drives before a guest uses them: a crash of the host must not lose a copied drive together with the guest's writes.
    pub(super) async fn settle_drives(&self) -> Result<(), ToolError> {
        for drive in &self.drives {
            let settled = self.shared.drives.settle(&self.shared.paths.drive(drive.id)).await;
            settled.map_err(crate::context::drive_error)?;
        }
        Ok(())
    }

    /// Labels the data drives of a forked VM, which have the labels of the drives that they are copies of: its guest finds them by their own.
    pub(super) async fn label_forked(&self) -> Result<(), ToolError> {
        let is_copy = |drive: &&DriveRecord| {
            !drive.is_root()
                && drive.made_for == Some(self.record.id)
                && self.record.lineage.checkpoint.is_some()
        };
        for drive in self.drives.iter().filter(is_copy) {
            let (path, label) = (self.shared.paths.drive(drive.id), drive.id.to_string());
            let labelled = self.shared.drives.label(&path, &label, &Progress::default()).await;
            labelled.map_err(crate::context::drive_error)?;
        }
        Ok(())
    }

    fn free_position(&self) -> u32 {
        let taken = self.drives.iter().filter_map(|d| d.attachment.as_ref()).map(|a| a.position);
        taken.max().unwrap_or(0) + 1
    }
}

/// Returns the error for a drive that another operation is using.
pub(crate) fn busy_drive(name: &str) -> ToolError {
    ToolError::new(
        ErrorCode::Busy,
        format!("the drive {name} is in use by a clone, a resize or the start of a VM"),
    )
    .hint("try again in a moment; op_list shows running operations")
}

fn mount_of(drive: &DriveRecord) -> Option<&str> {
    drive.attachment.as_ref()?.mount.as_deref()
}

/// Fails for a path at which a data drive cannot be mounted, or would break the guest.
fn check_mount(path: &str) -> Result<(), ToolError> {
    /// Paths at or below which nothing can be mounted.
    const OWN: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];
    /// Paths that the guest needs to work.
    const NEEDED: [&str; 7] = ["/bin", "/boot", "/etc", "/lib", "/lib64", "/sbin", "/usr"];
    let is_plain = path.starts_with('/')
        && path.len() <= 255
        && !path.contains(char::is_control)
        && path[1..].split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !is_plain {
        return Err(ToolError::invalid(format!(
            "mount `{}` is not an absolute path such as /data",
            path.escape_debug()
        )));
    }
    let own = OWN.iter().any(|place| Path::new(path).starts_with(place));
    if own || NEEDED.contains(&path) {
        return Err(ToolError::invalid(format!("mount must not be {path}: the guest's system uses it"))
            .hint("use a path such as /data or /mnt/data"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_the_system_and_of_nobody_are_refused() {
        for path in ["/data", "/mnt/a b", "/usr/local", "/home", "/var/lib/docker"] {
            check_mount(path).unwrap();
        }
        for path in
            ["", "/", "data", "/a/../b", "/a//b", "/a/", "/proc", "/sys/fs", "/dev/shm", "/usr", "/a\nb"]
        {
            check_mount(path).unwrap_err();
        }
    }
}
