//! What others see of a VM: a snapshot that its task publishes after every change.

use nexus_schema::link::PROTOCOL_MIN;
use nexus_schema::tools::vm::{VmDetails, VmDrive, VmGuest, VmImage, VmProcess, VmSummary};
use nexus_schema::{ErrorCode, ToolError};

use super::policy;
use crate::guest::Link;
use crate::os::paths::{Paths, vm_files};
use crate::store::drives::DriveRecord;
use crate::store::vms::VmRecord;

/// A VM as it was at its last change.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Its row.
    pub(crate) record: VmRecord,
    /// Its drives, the root drive first.
    pub(crate) drives: Vec<DriveRecord>,
    /// The link to its guest, while there is one.
    pub(crate) link: Option<Link>,
    /// Whether it was deleted.
    pub(crate) deleted: bool,
}

impl View {
    /// The link, if the guest's tools may be called now.
    pub(crate) fn guest_link(&self) -> Result<&Link, ToolError> {
        let record = &self.record;
        let name = record.name.as_str();
        if record.state.may_run()
            && let Some(guest) = &record.guest
            && guest.protocol < PROTOCOL_MIN
        {
            return Err(outdated(name, guest.protocol));
        }
        policy::guest_call(name, record.state)?;
        self.link.as_ref().ok_or_else(|| {
            ToolError::new(ErrorCode::GuestUnreachable, format!("the agent of {name} does not answer"))
                .hint("try again; vm_inspect shows its state")
        })
    }

    /// The row of a list.
    pub(crate) fn summary(record: &VmRecord) -> VmSummary {
        VmSummary {
            id: record.id,
            name: record.name.clone(),
            state: record.state,
            reason: record.reason.clone(),
            image: record.image_name.clone(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            created_at: record.created_at,
            boot_id: record.boot_id,
            protected: record.protected,
            tags: record.tags.clone(),
        }
    }

    /// Everything about the VM.
    pub(crate) fn details(&self, paths: &Paths, image: VmImage, kernel: String) -> VmDetails {
        let record = &self.record;
        let directory = paths.vm(record.id);
        let show = |name: &str| directory.join(name).display().to_string();
        VmDetails {
            id: record.id,
            name: record.name.clone(),
            state: record.state,
            reason: record.reason.clone(),
            owner: record.owner.clone(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            driver: record.driver.clone().unwrap_or_else(|| "auto".into()),
            driver_version: record.driver_version.clone(),
            accel: record.accel.clone(),
            init: record.spec.init,
            network: record.spec.network,
            network_note: Some(
                "this VM has no network; move files with the guest_file tools or at creation".into(),
            ),
            image,
            kernel,
            drives: self
                .drives
                .iter()
                .map(|drive| VmDrive {
                    id: drive.id,
                    name: drive.name.clone(),
                    root: drive.is_root(),
                    mount: drive.attachment.as_ref().and_then(|a| a.mount.clone()),
                    read_only: drive.read_only,
                    size: drive.size,
                    path: paths.drive(drive.id).join(crate::drive::DISK).display().to_string(),
                })
                .collect(),
            guest: record.guest.as_ref().map(|guest| VmGuest {
                protocol: guest.protocol,
                build: guest.hello.build.clone(),
                kernel: guest.hello.kernel.clone(),
                os: guest.hello.os.clone(),
                image: guest.hello.image.clone(),
                problems: guest.problems.clone(),
            }),
            process: record.processes.filter(|_| record.state.may_run()).map(|processes| VmProcess {
                pid: processes.vmm_pid,
                shim_pid: processes.shim_pid,
                vsock_socket: show(vm_files::VSOCK),
                directory: directory.display().to_string(),
            }),
            boot_id: record.boot_id,
            cid: record.cid,
            console_log: show(vm_files::CONSOLE),
            timings: record.timings,
            protected: record.protected,
            tags: record.tags.clone(),
            created_at: record.created_at,
            started_at: record.started_at,
            generation: record.generation,
        }
    }
}

/// A guest of a generation that this daemon does not speak.
pub(crate) fn outdated(name: &str, protocol: u32) -> ToolError {
    ToolError::new(
        ErrorCode::GuestOutdated,
        format!("the agent of {name} speaks protocol {protocol}, older than {PROTOCOL_MIN} which this daemon understands"),
    )
    .hint("restart the VM with vm_stop and vm_start: it gets the agent of this daemon")
}
