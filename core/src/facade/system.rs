//! The state of Nexus and its host.

use nexus_schema::ToolError;
use nexus_schema::link::PROTOCOL;
use nexus_schema::tools::system::{DoctorCheck, DoctorStatus, SystemInfoOutput, SystemInfoParams};

use super::{CallContext, Nexus};
use crate::op::store_error;
use crate::store::{SCHEMA_VERSION, StoreError, ops, vms};

/// Free disk space below which nothing new is created, in bytes.
const LITTLE: u64 = 64 << 20;
/// Free disk space below which the database cannot be written, in bytes.
const NOTHING: u64 = 4 << 20;

/// Returns the finding about a disk that is full or almost full.
fn disk_check(free: u64) -> DoctorCheck {
    let status = if free < NOTHING { DoctorStatus::Fail } else { DoctorStatus::Warn };
    DoctorCheck {
        name: "disk".into(),
        status,
        found: format!("the disk of the state directory is full: {} MiB are free", free >> 20),
        fix: Some("call prune, delete VMs, drives or images, or free space on the host".into()),
    }
}

impl Nexus {
    /// The tool `system_info`.
    pub async fn system_info(
        &self,
        ctx: &CallContext,
        _: SystemInfoParams,
    ) -> Result<SystemInfoOutput, ToolError> {
        let shared = &self.shared;
        let host = shared.host(true).await?;
        let (vms, ops_running) = shared
            .store
            .read(|db| -> Result<_, StoreError> { Ok((vms::count_by_state(db)?, ops::count_running(db)?)) })
            .await
            .map_err(store_error)?;
        let disk_free_bytes = crate::os::disk::free_bytes(shared.paths.root())
            .map_err(|e| ToolError::internal(format!("read the free disk space: {e}")))?;
        let mut doctor = host.report();
        if disk_free_bytes < LITTLE {
            doctor.checks.push(disk_check(disk_free_bytes));
        }
        Ok(SystemInfoOutput {
            version: env!("CARGO_PKG_VERSION").into(),
            instance: shared.instance,
            started_at: shared.started_at,
            pid: std::process::id(),
            state_directory: shared.config.state_dir.display().to_string(),
            guest_protocol: PROTOCOL,
            schema_version: SCHEMA_VERSION,
            vms,
            ops_running,
            disk_free_bytes,
            disk: shared.disk_use().await?,
            copy: self.copy_places_of(ctx)?,
            doctor,
        })
    }
}
