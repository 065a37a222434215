//! What a change of a VM's network opens: it needs the scope `network`, or a confirmation.

use nexus_schema::ByteSize;
use nexus_schema::network::{NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule, Target};

/// What a policy opens that another one does not, a sentence each.
pub(super) fn openings(before: &NetworkPolicy, after: &NetworkPolicy) -> Vec<String> {
    if after.mode == NetworkMode::None {
        return Vec::new();
    }
    let mut opened = Vec::new();
    if before.mode == NetworkMode::None {
        opened.push("turn the network on".to_owned());
    }
    if after.preset == NetworkPreset::Open && before.preset != NetworkPreset::Open {
        opened.push("open private networks".to_owned());
    }
    if after.preset != NetworkPreset::Packages && before.preset == NetworkPreset::Packages {
        opened.push("allow more than package registries".to_owned());
    }
    if after.allow.is_empty() && !before.allow.is_empty() {
        opened.push("allow all that the preset allows".to_owned());
    }
    let list =
        |rules: Vec<&NetworkRule>| rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    // The first list only restricts, except for addresses of private ranges: each entry is shown. To the preset `packages` each name adds, unless
    // it stands for the registries themselves.
    let added: Vec<_> = after.allow.iter().filter(|rule| !before.allow.contains(rule)).collect();
    let is_narrower = |rule: &&&NetworkRule| {
        !rule.is_address()
            && (before.preset != NetworkPreset::Packages || matches!(rule.target(), Target::Any))
    };
    let restricts = before.allow.is_empty() && added.iter().all(|rule| is_narrower(&rule));
    if !added.is_empty() && !restricts {
        opened.push(format!("allow {}", list(added)));
    }
    // Names do not open private addresses, but a registry that is named by its address is opened wherever it is.
    let is_new = |rule: &&NetworkRule| {
        rule.is_address() && !before.packages.contains(rule) && !before.allow.contains(rule)
    };
    let registries: Vec<_> = after.packages.iter().filter(is_new).collect();
    if !registries.is_empty() {
        opened.push(format!("allow the package registries with the addresses {}", list(registries)));
    }
    let removed: Vec<_> = before.deny.iter().filter(|rule| !after.deny.contains(rule)).collect();
    if !removed.is_empty() {
        opened.push(format!("no longer deny {}", list(removed)));
    }
    // `None` is more than any limit.
    let raised = |before: Option<ByteSize>, after: Option<ByteSize>| match (before, after) {
        (Some(before), Some(after)) => after > before,
        (before, after) => before.is_some() && after.is_none(),
    };
    let (was, is) = (before.bandwidth, after.bandwidth);
    if raised(was.rx, is.rx) || raised(was.tx, is.tx) {
        opened.push("raise the limit of its bandwidth".to_owned());
    }
    let joined: Vec<_> = after.groups.iter().filter(|group| !before.groups.contains(group)).collect();
    if !joined.is_empty() {
        let joined: Vec<_> = joined.iter().map(|group| group.as_str()).collect();
        opened.push(format!("join the groups {}", joined.join(", ")));
    }
    opened
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beside_the_package_registries_are_confirmed() {
        let policy = |preset, allow: &[&str]| NetworkPolicy {
            mode: NetworkMode::Proxy,
            preset,
            allow: allow.iter().map(|rule| rule.parse().unwrap()).collect(),
            ..NetworkPolicy::default()
        };
        let (packages, internet) = (NetworkPreset::Packages, NetworkPreset::Internet);
        for (preset, allow, opens) in [
            (packages, "other.example", true),
            (packages, "*.example", true),
            (packages, "*:443", false),
            (internet, "other.example", false),
            (internet, "10.0.0.0/8", true),
        ] {
            let opened = openings(&policy(preset, &[]), &policy(preset, &[allow]));
            assert_eq!(!opened.is_empty(), opens, "{preset:?} {allow}: {opened:?}");
        }
    }

    #[test]
    fn registries_with_addresses_are_confirmed_like_entries_with_addresses() {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let packages = |names: &[&str]| NetworkPolicy {
            mode: NetworkMode::Proxy,
            preset: NetworkPreset::Packages,
            packages: rules(names),
            ..NetworkPolicy::default()
        };
        let internet = NetworkPolicy { mode: NetworkMode::Proxy, ..NetworkPolicy::default() };
        assert_eq!(
            openings(&internet, &packages(&["a.example:443", "localhost:3141"])),
            [""; 0],
            "names open nothing"
        );
        let opened = openings(&internet, &packages(&["a.example:443", "127.0.0.1:3141", "[fd00::1]:80"]));
        assert_eq!(opened, ["allow the package registries with the addresses 127.0.0.1:3141, [fd00::1]:80"]);
        // Those that it has already.
        let had = packages(&["10.0.0.5:8080"]);
        assert_eq!(openings(&had, &packages(&["a.example", "10.0.0.5:8080"])), [""; 0]);
        assert_eq!(openings(&had, &packages(&["10.0.0.6:8080", "10.0.0.5:8080"])).len(), 1);
        let listed = NetworkPolicy { allow: rules(&["10.0.0.5:8080"]), ..internet };
        let opened = openings(&listed, &had).join("; ");
        assert!(!opened.contains("registries"), "{opened}");
    }
}
