//! The names of the preset `packages`: the package registries that the host's own configuration names, and those of the setting
//! `network.packages`. A VM keeps them in its policy, and gets them anew at each start and each change of its network.

use std::collections::BTreeSet;

use nexus_schema::network::{NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, PACKAGES_MAX};
use nexus_schema::{ErrorCode, ToolError};

use super::defaults::{self, PACKAGES};
use crate::asset::registries;
use crate::context::Shared;

/// Fills in the names of a policy with the preset `packages`; any other policy has none.
///
/// # Errors
/// `host_unsuitable` if the host names no registry; `invalid_argument` if the lists become too long.
pub(crate) async fn fill(shared: &Shared, policy: &mut NetworkPolicy) -> Result<(), ToolError> {
    policy.packages = match (policy.preset, policy.mode) {
        (NetworkPreset::Packages, NetworkMode::Proxy | NetworkMode::Nat) => names(shared).await?,
        (NetworkPreset::Packages, NetworkMode::None) | (NetworkPreset::Internet | NetworkPreset::Open, _) => {
            Vec::new()
        }
    };
    if policy.allow.len() + policy.packages.len() > nexus_schema::network::RULES_MAX {
        return Err(ToolError::invalid(format!(
            "network.allow has {} entries, and the preset packages {}: together at most {}",
            policy.allow.len(),
            policy.packages.len(),
            nexus_schema::network::RULES_MAX
        )));
    }
    Ok(())
}

/// Reads the names again before a start. If there are none any more, the VM keeps those that it has.
pub(crate) async fn refill(shared: &Shared, policy: &mut NetworkPolicy) {
    let mut now = policy.clone();
    match fill(shared, &mut now).await {
        Ok(()) => *policy = now,
        Err(error) => tracing::warn!(%error, "a vm keeps its package registries"),
    }
}

async fn names(shared: &Shared) -> Result<Vec<NetworkRule>, ToolError> {
    let added = defaults::network(&shared.store).await?.packages;
    let (root, home) = (shared.config.apt_root.clone(), shared.config.home.clone());
    let found = tokio::task::spawn_blocking(move || registries::registries(&root, home.as_deref())).await;
    let found = found.map_err(|e| ToolError::internal(format!("read the host's package registries: {e}")))?;
    let mut seen = BTreeSet::new();
    let all: Vec<NetworkRule> =
        added.into_iter().chain(found).filter(|rule| seen.insert(rule.to_string())).collect();
    if all.is_empty() {
        let what = "the preset packages allows nothing on this host: neither apt's sources nor the configuration of pip, npm or cargo \
                    name a registry";
        let fix = format!(
            "set {PACKAGES} to the names of registries, comma-separated: nexusctl settings set {PACKAGES}=NAME,NAME"
        );
        return Err(ToolError::new(ErrorCode::HostUnsuitable, what).hint(fix));
    }
    if all.len() > PACKAGES_MAX {
        tracing::warn!(count = all.len(), "the preset packages is limited to {PACKAGES_MAX} names");
    }
    Ok(all.into_iter().take(PACKAGES_MAX).collect())
}
