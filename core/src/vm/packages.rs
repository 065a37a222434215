//! The names of the preset `packages`: the package registries that the host's own configuration names, and those of the setting
//! `network.packages`. A VM keeps them in its policy, and gets them anew at each start, at each change of its network and when the setting
//! changes. What is no longer named is closed; a VM whose registries are all gone reaches nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use nexus_schema::network::{
    NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, PACKAGES_MAX, RULES_MAX,
};
use nexus_schema::tools::vm::VmState;
use nexus_schema::{ErrorCode, ToolError};
use tokio::time::{Instant, timeout_at};

use super::defaults::{self, PACKAGES};
use super::wait::ask;
use crate::asset::registries;
use crate::context::{Command, Shared};

/// Time for which a change of the setting waits until all VMs have it.
const APPLIED: Duration = Duration::from_secs(20);

/// Whether a policy has names of registries.
pub(super) fn has_registries(policy: &NetworkPolicy) -> bool {
    policy.preset == NetworkPreset::Packages && matches!(policy.mode, NetworkMode::Proxy | NetworkMode::Nat)
}

/// Fills in the names of a policy with the preset `packages`; any other policy has none.
///
/// # Errors
/// `host_unsuitable` if the host names no registry; `invalid_argument` if the lists become too long.
pub(crate) async fn fill(shared: &Shared, policy: &mut NetworkPolicy) -> Result<(), ToolError> {
    policy.packages = Vec::new();
    if !has_registries(policy) {
        return Ok(());
    }
    policy.packages = names(shared).await?;
    if policy.packages.is_empty() {
        let what = "the preset packages allows nothing on this host: neither apt's sources nor the configuration of pip, npm or cargo \
                    name a registry";
        let fix = format!(
            "set {PACKAGES} to the names of registries, comma-separated: nexusctl settings set {PACKAGES}=NAME,NAME"
        );
        return Err(ToolError::new(ErrorCode::HostUnsuitable, what).hint(fix));
    }
    if policy.allow.len() + policy.packages.len() > RULES_MAX {
        return Err(ToolError::invalid(format!(
            "network.allow has {} entries, and the preset packages {}: together at most {RULES_MAX}",
            policy.allow.len(),
            policy.packages.len(),
        )));
    }
    Ok(())
}

/// Reads the names of an existing VM again. The VM keeps those that it has only if they cannot be read.
pub(crate) async fn refill(shared: &Shared, policy: &mut NetworkPolicy) {
    if !has_registries(policy) {
        policy.packages = Vec::new();
        return;
    }
    match names(shared).await {
        Ok(mut names) => {
            if names.is_empty() {
                tracing::warn!(
                    "the host names no package registry any more: a vm with the preset packages reaches nothing"
                );
            }
            names.truncate(RULES_MAX.saturating_sub(policy.allow.len()));
            policy.packages = names;
        }
        Err(error) => tracing::warn!(%error, "a vm keeps its package registries"),
    }
}

/// Has the VMs with the preset read the names again, because the setting has changed. Connections to registries that it no longer names are
/// closed.
///
/// # Errors
/// The first VM's error, with the names of all VMs that do not have the change yet.
pub(crate) async fn refresh(shared: &Shared) -> Result<(), ToolError> {
    let deadline = Instant::now() + APPLIED;
    let mut asked = Vec::new();
    for handle in shared.vms.all() {
        let (name, state, is_meant) = {
            let view = handle.view.borrow();
            let record = &view.record;
            (record.name.clone(), record.state, has_registries(&record.spec.network))
        };
        // Its first start reads them.
        if state == VmState::Creating {
            continue;
        }
        // Asked for in a task of its own: it is done, even if it takes longer than this call waits. VMs whose network is just being changed are
        // asked as well.
        let done = tokio::spawn(async move { ask(&handle, |reply| Command::Packages { reply }).await });
        if is_meant {
            asked.push((name, done));
        }
    }
    let late = || ToolError::new(ErrorCode::Timeout, "it is busy").hint("vm_inspect shows its registries");
    let mut failed: Option<(Vec<String>, ToolError)> = None;
    for (name, done) in asked {
        let error = match timeout_at(deadline, done).await {
            Ok(Ok(Ok(()))) => continue,
            Ok(Ok(Err(error))) if error.code == ErrorCode::VmNotFound => continue,
            Ok(Ok(Err(error))) => error,
            Ok(Err(crashed)) => ToolError::internal(format!("apply the setting: {crashed}")),
            Err(_) => late(),
        };
        failed.get_or_insert_with(|| (Vec::new(), error)).0.push(name.to_string());
    }
    match failed {
        None => Ok(()),
        Some((names, error)) => {
            let message = format!(
                "{PACKAGES} is saved, but not applied yet to {}: {}",
                names.join(", "),
                error.message
            );
            Err(ToolError { message, ..error })
        }
    }
}

/// Returns the names that the host has now; it may have none.
async fn names(shared: &Shared) -> Result<Vec<NetworkRule>, ToolError> {
    let added = defaults::network(&shared.store).await?.packages;
    let (root, home) = (shared.config.apt_root.clone(), shared.config.home.clone());
    let found = tokio::task::spawn_blocking(move || registries::registries(&root, home.as_deref())).await;
    let found = found.map_err(|e| ToolError::internal(format!("read the host's package registries: {e}")))?;
    let mut seen = BTreeSet::new();
    let all: Vec<NetworkRule> =
        added.into_iter().chain(found).filter(|rule| seen.insert(rule.to_string())).collect();
    if all.len() > PACKAGES_MAX {
        tracing::warn!(count = all.len(), "the preset packages is limited to {PACKAGES_MAX} names");
    }
    Ok(all.into_iter().take(PACKAGES_MAX).collect())
}
