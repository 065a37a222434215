//! Policies as callers ask for them. What they allow, `nexus-net-policy` decides.

use nexus_schema::network::{GROUPS_MAX, NetworkMode, NetworkPolicy, RULES_MAX};
use nexus_schema::tools::vm::NetworkParams;

/// The policy of a new VM: what is asked for, over the default mode.
pub(crate) fn starting(default: NetworkMode, asked: Option<&NetworkParams>) -> Result<NetworkPolicy, String> {
    let policy = NetworkPolicy { mode: default, ..NetworkPolicy::default() };
    match asked {
        Some(asked) => merge(&policy, asked),
        None => Ok(policy),
    }
}

/// A policy with what is asked for in its place. Whoever has no network and asks for a preset or a list and no mode means the
/// proxy.
pub(crate) fn merge(policy: &NetworkPolicy, asked: &NetworkParams) -> Result<NetworkPolicy, String> {
    let NetworkParams { mode, preset, allow, deny, groups } = asked;
    let has_rules = preset.is_some() || allow.is_some() || deny.is_some();
    if *mode == Some(NetworkMode::None) && has_rules {
        return Err("network.mode none stands alone: without preset, allow and deny".to_owned());
    }
    let mode = mode.unwrap_or(match policy.mode {
        NetworkMode::None if has_rules => NetworkMode::Proxy,
        mode => mode,
    });
    if mode != NetworkMode::Nat && groups.as_ref().is_some_and(|groups| !groups.is_empty()) {
        return Err(format!("network.groups are for network.mode nat, and the mode is {}", mode.as_str()));
    }
    let merged = NetworkPolicy {
        mode,
        preset: preset.unwrap_or(policy.preset),
        allow: allow.as_ref().unwrap_or(&policy.allow).clone(),
        deny: deny.as_ref().unwrap_or(&policy.deny).clone(),
        groups: groups.as_ref().unwrap_or(&policy.groups).clone(),
    };
    if merged.groups.len() > GROUPS_MAX {
        return Err(format!("network.groups has {} entries, more than {GROUPS_MAX}", merged.groups.len()));
    }
    for (what, rules) in [("allow", &merged.allow), ("deny", &merged.deny)] {
        if rules.len() > RULES_MAX {
            return Err(format!("network.{what} has {} entries, more than {RULES_MAX}", rules.len()));
        }
    }
    if let Some(rule) = merged.deny.iter().find(|rule| rule.to_string() == "*") {
        return Err(format!(
            "network.deny has `{rule}`, which allows nothing: give network.mode none, or name in network.allow what is allowed"
        ));
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use nexus_schema::network::NetworkMode::{Nat, None as NoNetwork, Proxy};
    use nexus_schema::network::NetworkPreset::{self, Internet, Open};
    use nexus_schema::network::NetworkRule;
    use serde_json::json;

    use super::*;

    fn policy(preset: NetworkPreset, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
        let rules =
            |texts: &[&str]| -> Vec<NetworkRule> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        NetworkPolicy { mode: Proxy, preset, allow: rules(allow), deny: rules(deny), groups: Vec::new() }
    }

    #[test]
    fn changes_replace_what_they_name() {
        let asked = |json: serde_json::Value| serde_json::from_value::<NetworkParams>(json).unwrap();
        assert_eq!(starting(Proxy, None), Ok(policy(Internet, &[], &[])));
        let lists = asked(json!({ "allow": ["a.example"], "deny": ["*:25"] }));
        let with_lists = policy(Internet, &["a.example"], &["*:25"]);
        assert_eq!(starting(NoNetwork, Some(&lists)), Ok(with_lists.clone()), "lists mean the proxy");
        let opened = merge(&with_lists, &asked(json!({ "preset": "open", "allow": [] })));
        assert_eq!(opened, Ok(policy(Open, &[], &["*:25"])));
        let none = merge(&with_lists, &asked(json!({ "mode": "none" }))).unwrap();
        assert_eq!(none, NetworkPolicy { mode: NoNetwork, ..with_lists.clone() });
        assert_eq!(merge(&none, &asked(json!({ "mode": "proxy" }))), Ok(with_lists.clone()));
        for (json, words) in [
            (json!({ "mode": "none", "allow": ["a.example"] }), "stands alone"),
            (json!({ "allow": vec!["a.example"; 129] }), "129 entries, more than 128"),
            (json!({ "deny": ["*"] }), "which allows nothing"),
            (json!({ "groups": ["web"] }), "are for network.mode nat, and the mode is proxy"),
            (json!({ "mode": "nat", "groups": vec!["web"; 17] }), "17 entries, more than 16"),
        ] {
            let refused = merge(&with_lists, &asked(json)).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
        let grouped = merge(&with_lists, &asked(json!({ "mode": "nat", "groups": ["web"] }))).unwrap();
        let denied = merge(&grouped, &asked(json!({ "deny": [] }))).unwrap();
        assert_eq!((denied.mode, denied.groups.len()), (Nat, 1), "lists leave the mode");
    }
}
