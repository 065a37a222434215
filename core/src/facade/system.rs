//! The state of Nexus and its host.

use nexus_schema::ToolError;
use nexus_schema::link::PROTOCOL;
use nexus_schema::tools::system::{SystemInfoOutput, SystemInfoParams};

use super::{CallContext, Nexus};
use crate::op::store_error;
use crate::store::{SCHEMA_VERSION, StoreError, ops, vms};

impl Nexus {
    /// The tool `system_info`.
    pub async fn system_info(
        &self,
        _: &CallContext,
        _: SystemInfoParams,
    ) -> Result<SystemInfoOutput, ToolError> {
        let shared = &self.shared;
        let host = shared.host(true).await?;
        let (vms, ops_running) = shared
            .store
            .read(|db| -> Result<_, StoreError> { Ok((vms::count_by_state(db)?, ops::count_running(db)?)) })
            .await
            .map_err(store_error)?;
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
            disk_free_bytes: crate::os::disk::free_bytes(shared.paths.root())
                .map_err(|e| ToolError::internal(format!("look at the free disk: {e}")))?,
            disk: shared.disk_use().await?,
            doctor: host.report(),
        })
    }
}
