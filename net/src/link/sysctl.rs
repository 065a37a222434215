//! Kernel settings that the VMs' network needs. Settings of the whole namespace are not
//! reverted, since other programs may rely on them, except forwarding ([`crate::forwarding`]).

use std::io;
use std::path::PathBuf;

const ROOT: &str = "/proc/sys/net";

/// Why a setting could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("set net/{name} to {value}")]
pub(crate) struct SysctlError {
    pub(crate) name: String,
    pub(crate) value: &'static str,
    #[source]
    pub(crate) source: io::Error,
}

/// Returns the desired settings, for an existing bridge.
pub(crate) fn wanted(bridge: &str, has_v6: bool) -> Vec<(String, &'static str)> {
    let v4 = |name: &str| format!("ipv4/conf/{bridge}/{name}");
    let v6 = |name: &str| format!("ipv6/conf/{bridge}/{name}");
    let mut all = vec![
        // Two VMs of a group are behind the same interface. After a redirect they would try to reach each other directly, but their ports
        // are isolated.
        ("ipv4/conf/all/send_redirects".to_owned(), "0"),
        (v4("send_redirects"), "0"),
        (v4("accept_redirects"), "0"),
        // A source route would name a destination that no rule sees. Hosts that route may allow them for all interfaces.
        (v4("accept_source_route"), "0"),
        (v4("rp_filter"), "1"),
        (v4("route_localnet"), "0"),
        ("ipv4/ip_forward".to_owned(), "1"),
    ];
    if has_v6 {
        all.extend([
            (v6("disable_ipv6"), "0"),
            (v6("accept_ra"), "0"),
            (v6("accept_redirects"), "0"),
            // Without a VM the bridge has no carrier, and duplicate address detection would keep its address unusable until there is one.
            (v6("accept_dad"), "0"),
        ]);
        all.extend(keeping_router_advertisements(bridge).into_iter().map(|name| (name, "2")));
        all.push(("ipv6/conf/all/forwarding".to_owned(), "1"));
    } else {
        all.push((v6("disable_ipv6"), "1"));
    }
    all
}

/// Returns settings that keep router advertisements enabled on interfaces that use them: a forwarding host ignores them by default.
fn keeping_router_advertisements(bridge: &str) -> Vec<String> {
    let forwards = read("ipv6/conf/all/forwarding").is_ok_and(|value| value == "1");
    let Ok(interfaces) = std::fs::read_dir(PathBuf::from(ROOT).join("ipv6/conf")) else { return Vec::new() };
    let names = interfaces.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter(|interface| ![bridge, "all", "default", "lo"].contains(&interface.as_str()))
        .map(|interface| format!("ipv6/conf/{interface}/accept_ra"))
        .filter(|name| !forwards && read(name).is_ok_and(|value| value == "1"))
        .collect()
}

/// Changes the settings that differ; returns their number.
pub(crate) fn apply(wanted: &[(String, &'static str)]) -> Result<u64, SysctlError> {
    let mut changes = 0;
    for (name, value) in wanted {
        let set = match read(name) {
            Ok(now) if now == *value => continue,
            Ok(_) => std::fs::write(PathBuf::from(ROOT).join(name), value),
            // This kernel does not have the setting, for example without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(error),
        };
        tracing::debug!(name, value, "changing a setting");
        set.map_err(|source| SysctlError { name: name.clone(), value, source })?;
        changes += 1;
    }
    Ok(changes)
}

/// Reads a setting that is a number.
pub(crate) fn number(name: &str) -> Option<u64> {
    read(name).ok()?.parse().ok()
}

fn read(name: &str) -> io::Result<String> {
    Ok(std::fs::read_to_string(PathBuf::from(ROOT).join(name))?.trim().to_owned())
}
