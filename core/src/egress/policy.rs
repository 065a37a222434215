//! Builds policies from callers' parameters. `nexus-net-policy` decides what they allow.

use nexus_schema::network::{
    GROUPS_MAX, NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, RULES_MAX, Target,
};
use nexus_schema::tools::vm::NetworkParams;

/// Returns the policy of a new VM: its parameters, over the default mode.
pub(crate) fn starting(default: NetworkMode, asked: Option<&NetworkParams>) -> Result<NetworkPolicy, String> {
    let policy = NetworkPolicy { mode: default, ..NetworkPolicy::default() };
    match asked {
        Some(asked) => merge(&policy, asked),
        None => Ok(policy),
    }
}

/// Returns a policy with the given parameters replaced. If the mode was `none`, and a preset or a list is given without a mode, the mode
/// becomes `proxy`.
pub(crate) fn merge(policy: &NetworkPolicy, asked: &NetworkParams) -> Result<NetworkPolicy, String> {
    let NetworkParams { mode, preset, allow, deny, groups, bandwidth } = asked;
    let has_rules = preset.is_some() || allow.is_some() || deny.is_some() || bandwidth.is_some();
    if *mode == Some(NetworkMode::None) && has_rules {
        return Err("network.mode none cannot be combined with preset, allow, deny or bandwidth".to_owned());
    }
    let mode = mode.unwrap_or(match policy.mode {
        NetworkMode::None if has_rules => NetworkMode::Proxy,
        mode => mode,
    });
    if mode != NetworkMode::Nat && groups.as_ref().is_some_and(|groups| !groups.is_empty()) {
        return Err(format!("network.groups need network.mode nat, but the mode is {}", mode.as_str()));
    }
    let merged = NetworkPolicy {
        mode,
        preset: preset.unwrap_or(policy.preset),
        allow: allow.as_ref().unwrap_or(&policy.allow).clone(),
        deny: deny.as_ref().unwrap_or(&policy.deny).clone(),
        groups: groups.as_ref().unwrap_or(&policy.groups).clone(),
        bandwidth: bandwidth.unwrap_or(policy.bandwidth),
        packages: policy.packages.clone(),
    };
    merged.bandwidth.check()?;
    // Stored policies may have such a list: it is only refused where it is asked for.
    let is_list_asked = preset.is_some() || allow.is_some();
    let is_any = |rule: &NetworkRule| *rule.target() == Target::Any;
    if is_list_asked
        && merged.preset == NetworkPreset::Packages
        && !merged.allow.is_empty()
        && !merged.allow.iter().any(is_any)
    {
        return Err("network.allow without `*` leaves out all registries of the preset packages: add `*` to it to allow both, or use the preset \
                    internet to allow only the listed ones"
            .to_owned());
    }
    if merged.groups.len() > GROUPS_MAX {
        return Err(format!(
            "network.groups has {} entries, the maximum is {GROUPS_MAX}",
            merged.groups.len()
        ));
    }
    for (what, rules) in [("allow", &merged.allow), ("deny", &merged.deny)] {
        if rules.len() > RULES_MAX {
            return Err(format!("network.{what} has {} entries, the maximum is {RULES_MAX}", rules.len()));
        }
    }
    if let Some(rule) = merged.deny.iter().find(|rule| rule.to_string() == "*") {
        return Err(format!(
            "`{rule}` in network.deny denies everything: use network.mode none, or list what is allowed in network.allow"
        ));
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use nexus_schema::network::NetworkMode::{Nat, None as NoNetwork, Proxy};
    use nexus_schema::network::NetworkPreset::{Internet, Open, Packages};
    use serde_json::json;

    use super::*;

    fn policy(preset: NetworkPreset, allow: &[&str], deny: &[&str]) -> NetworkPolicy {
        let rules =
            |texts: &[&str]| -> Vec<NetworkRule> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        NetworkPolicy {
            mode: Proxy,
            preset,
            allow: rules(allow),
            deny: rules(deny),
            ..NetworkPolicy::default()
        }
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
            (json!({ "mode": "none", "allow": ["a.example"] }), "cannot be combined"),
            (json!({ "allow": vec!["a.example"; 129] }), "129 entries, the maximum is 128"),
            (json!({ "deny": ["*"] }), "denies everything"),
            (json!({ "groups": ["web"] }), "need network.mode nat, but the mode is proxy"),
            (json!({ "mode": "nat", "groups": vec!["web"; 17] }), "17 entries, the maximum is 16"),
        ] {
            let refused = merge(&with_lists, &asked(json)).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
        let limited = merge(&with_lists, &asked(json!({ "bandwidth": { "rx": "10MiB" } }))).unwrap();
        assert_eq!(serde_json::to_value(limited.bandwidth).unwrap(), json!({ "rx": "10MiB" }));
        assert_eq!(merge(&limited, &asked(json!({ "deny": ["*:25"] }))), Ok(limited.clone()), "it stays");
        assert_eq!(merge(&limited, &asked(json!({ "bandwidth": {} }))), Ok(with_lists.clone()));
        let refused = merge(&with_lists, &asked(json!({ "bandwidth": { "tx": "1KiB" } }))).unwrap_err();
        assert_eq!(refused, "network.bandwidth.tx is 1KiB a second, not 16KiB to 100GiB");
        // Beside registries, a list must say that it means them, too.
        let registries = policy(Packages, &[], &[]);
        for (json, is_taken) in [
            (json!({ "allow": ["a.example"] }), false),
            (json!({ "allow": ["*:443", "a.example"] }), true),
            (json!({ "preset": "internet", "allow": ["a.example"] }), true),
            (json!({ "bandwidth": {} }), true),
        ] {
            let merged = merge(&registries, &asked(json.clone()));
            assert_eq!(merged.is_ok(), is_taken, "{json}: {merged:?}");
        }
        let stored = policy(Packages, &["a.example"], &[]);
        assert!(merge(&stored, &asked(json!({ "deny": ["b.example"] }))).is_ok());
        let refused = merge(&with_lists, &asked(json!({ "preset": "packages" }))).unwrap_err();
        assert!(refused.contains("add `*` to it"), "{refused}");
        let grouped = merge(&with_lists, &asked(json!({ "mode": "nat", "groups": ["web"] }))).unwrap();
        let denied = merge(&grouped, &asked(json!({ "deny": [] }))).unwrap();
        assert_eq!((denied.mode, denied.groups.len()), (Nat, 1), "lists leave the mode");
    }
}
