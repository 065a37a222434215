//! The state of Nexus and its host.

use std::collections::BTreeMap;

use nexus_schema::ToolError;
use nexus_schema::access::Scope;
use nexus_schema::link::PROTOCOL;
use nexus_schema::tools::system::{DoctorCheck, DoctorStatus, SystemInfoOutput, SystemInfoParams};

use super::{CallContext, Nexus};
use crate::access::Caller;
use crate::op::store_error;
use crate::store::{SCHEMA_VERSION, StoreError, ops, vms};

/// Free disk space below which nothing new is created, in bytes.
pub(super) const LITTLE: u64 = 64 << 20;
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
        let (vms, ops_running) = self.counts(&ctx.caller).await?;
        let disk_free_bytes = crate::os::disk::free_bytes(shared.paths.root())
            .map_err(|e| ToolError::internal(format!("read the free disk space: {e}")))?;
        let mut doctor = host.report();
        if disk_free_bytes < LITTLE {
            doctor.checks.push(disk_check(disk_free_bytes));
        }
        doctor.checks.extend(self.firewall_check().await);
        // It reads the whole database, which not every token may have done again and again.
        if ctx.caller.has(Scope::Admin) {
            let state = shared.config.state_dir.clone();
            let examined = tokio::task::spawn_blocking(move || {
                super::add_database_check(&mut doctor, &state);
                doctor
            });
            doctor = examined.await.map_err(|e| ToolError::internal(format!("check the database: {e}")))?;
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
            audit_lost: shared.calls.lost(),
            disk_free_bytes,
            // How much others have is none of a token's business.
            disk: match ctx.caller.has(Scope::Admin) {
                true => shared.disk_use().await?,
                false => Vec::new(),
            },
            copy: self.copy_places_of(ctx)?,
            doctor,
        })
    }

    /// Returns a warning if the host's firewall drops packets of VMs with network `nat`.
    async fn firewall_check(&self) -> Option<DoctorCheck> {
        let state = self.shared.nat.state().await.ok().flatten().map(|(_, state)| state)?;
        let closed: Vec<_> = state.firewall.iter().filter(|chain| !chain.open).collect();
        let places = closed.iter().map(|chain| format!("{} {}", chain.table, chain.chain));
        let fix = closed.first()?.problem.clone();
        Some(DoctorCheck {
            name: "firewall".to_owned(),
            status: DoctorStatus::Warn,
            found: format!(
                "chains that may drop packets of VMs with network nat: {}",
                places.collect::<Vec<_>>().join(", ")
            ),
            fix: Some(fix.unwrap_or_else(|| "nexusctl setup-firewall".to_owned())),
        })
    }

    /// VMs by state and operations under way, as far as they exist for a caller.
    async fn counts(&self, caller: &Caller) -> Result<(BTreeMap<String, u64>, u64), ToolError> {
        if caller.has(Scope::Admin) {
            let counts = self.shared.store.read(|db| -> Result<_, StoreError> {
                Ok((vms::count_by_state(db)?, ops::count_running(db)?))
            });
            return counts.await.map_err(store_error);
        }
        let mut vms = BTreeMap::new();
        for handle in self.shared.vms.seen_by(caller) {
            *vms.entry(handle.view.borrow().record.state.as_str().to_owned()).or_default() += 1;
        }
        let running = self.shared.store.read(ops::running).await.map_err(store_error)?;
        let seen = running.iter().filter(|op| self.sees_op(caller, &op.summary)).count();
        Ok((vms, seen as u64))
    }
}
