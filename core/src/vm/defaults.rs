//! Settings that a caller may change at run time: the defaults for new VMs, and what is kept of what.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nexus_net_wire::Cidr;
use nexus_schema::network::{NetworkMode, NetworkRule, PACKAGES_MAX, Target, name};
use nexus_schema::{ByteSize, TimeSpan, ToolError};

use super::checkpoint::{Caps, Upkeep};
use super::spec::{self, Defaults};
use crate::net::{SEARCH_MAX, parse_subnet};
use crate::op::store_error;
use crate::store::Store;
use crate::store::settings::{self, DEFAULT_IMAGE, DEFAULT_KERNEL};
use crate::store::vms::TmpPlace;

/// How the keys begin that say what is done with checkpoints by themselves.
pub(crate) const OF_CHECKPOINTS: &str = "checkpoint.";
pub(crate) const CAP_NAMED: &str = "checkpoint.cap_named";
pub(crate) const MAX_AGE: &str = "checkpoint.max_age";
pub(crate) const MAX_BYTES: &str = "checkpoint.max_bytes";
pub(crate) const MAX_COUNT: &str = "checkpoint.max_count";
pub(crate) const PACK_AFTER: &str = "checkpoint.pack_after";
pub(crate) const DEFAULT_VCPUS: &str = "default.vcpus";
pub(crate) const DEFAULT_MEMORY: &str = "default.memory";
pub(crate) const DEFAULT_CHECKPOINTS: &str = "default.checkpoints";
pub(crate) const DEFAULT_DISK: &str = "default.disk";
pub(crate) const DEFAULT_NETWORK: &str = "default.network";
pub(crate) const DEFAULT_TTL: &str = "default.ttl";
pub(crate) const DEFAULT_IDLE_ACTION: &str = "default.idle_action";
pub(crate) const DEFAULT_IDLE_STOP: &str = "default.idle_stop";
pub(crate) const DEFAULT_TMP: &str = "default.tmp";
pub(crate) const DEFAULT_WAIT_FOR_INIT: &str = "default.wait_for_init";
pub(crate) const DEFAULT_WARM_START: &str = "default.warm_start";
pub(crate) const DNS: &str = "dns";
pub(crate) const HISTORY_DAYS: &str = "history.days";
pub(crate) const HISTORY_PER_VM: &str = "history.per_vm";
pub(crate) const NETWORK_DNS: &str = "network.dns";
pub(crate) const FIREWALL: &str = "network.firewall";
pub(crate) const PACKAGES: &str = "network.packages";
pub(crate) const SEARCH: &str = "network.search";
pub(crate) const SUBNET: &str = "network.subnet";
pub(crate) const WARM_POOL: &str = "warm_pool";

/// Maximum number of machines that wait for VMs.
const POOL_MAX: u32 = 16;
/// Maximum number of name servers that resolvers use.
const DNS_MAX: usize = 3;

/// The settings, sorted by key: key, built-in value and description.
pub(crate) const SETTINGS: [(&str, &str, &str); 27] = [
    (
        CAP_NAMED,
        "false",
        "whether checkpoint.max_age, max_bytes and max_count remove checkpoints that were given a name, too: `true` or `false`",
    ),
    (
        MAX_AGE,
        "0",
        "how long after it was taken a checkpoint without a given name is deleted, such as `7d`; 0: never",
    ),
    (
        MAX_BYTES,
        "0",
        "how much of the disk the checkpoints of one VM may occupy before the oldest without a given name are deleted; 0: any amount",
    ),
    (
        MAX_COUNT,
        "0",
        "how many checkpoints one VM may have before the oldest without a given name are deleted; 0: any number",
    ),
    (
        PACK_AFTER,
        "1h",
        "how long after its last use the memory of a checkpoint is compressed, such as `10m`; `off` or 0: never",
    ),
    (
        DEFAULT_CHECKPOINTS,
        "",
        "whether VMs are made so that checkpoints of them can be taken: `true` or `false`; empty: if that costs nothing, as with firecracker",
    ),
    (DEFAULT_DISK, "8GiB", "size of the root drive; at least the size of the image"),
    (
        DEFAULT_IDLE_ACTION,
        "stop",
        "what idle_stop does to VMs that checkpoints can be taken of: `stop`, or `suspend`, after which the next call wakes them",
    ),
    (DEFAULT_IDLE_STOP, "0", "stop a VM after it was idle for so long, such as `30m`; 0: never"),
    (DEFAULT_IMAGE, spec::DEFAULT_IMAGE, "image of root drives: anything that `from` of vm_create accepts"),
    (DEFAULT_KERNEL, spec::DEFAULT_KERNEL, "kernel: anything that `kernel` of vm_create accepts"),
    (DEFAULT_MEMORY, "1GiB", "memory"),
    (
        DEFAULT_NETWORK,
        "proxy",
        "how VMs reach other machines: `proxy` (the internet, through a proxy in the VM), `nat` (a network interface) or `none`",
    ),
    (DEFAULT_TMP, "disk", "where /tmp is: `disk` (the root drive) or `tmpfs` (memory, at most half of it)"),
    (DEFAULT_TTL, "0", "how long after its creation a VM is deleted, such as `12h`; 0 for never"),
    (DEFAULT_VCPUS, "1", "virtual CPUs"),
    (
        DEFAULT_WAIT_FOR_INIT,
        "true",
        "whether a VM with an init system is ready only after its init has started all services: `true` or `false`",
    ),
    (
        DEFAULT_WARM_START,
        "false",
        "whether VMs that checkpoints can be taken of go on from a machine that was booted before them: `true` or `false`",
    ),
    (
        DNS,
        "",
        "name servers for /etc/resolv.conf, up to three addresses, comma-separated; empty: leave the file unchanged",
    ),
    (HISTORY_DAYS, "90", "days for which the history of deleted VMs and ended operations is kept"),
    (HISTORY_PER_VM, "1000", "number of changes that the history of each VM keeps"),
    (
        NETWORK_DNS,
        "",
        "name servers that the resolver of VMs with network `nat` asks, up to three addresses; empty: those of the host",
    ),
    (
        FIREWALL,
        "false",
        "whether to keep rules for VMs with network `nat` in the host's firewall; set by network_firewall",
    ),
    (
        PACKAGES,
        "",
        "names that the network preset `packages` allows besides the host's own registries, comma-separated, each with optional :PORT",
    ),
    (
        SEARCH,
        "",
        "search domains of VMs with network `nat` after that of VMs, up to five, comma-separated; empty: those of the host, unless network.dns is set or an allow list of names decides",
    ),
    (
        SUBNET,
        "",
        "subnet of VMs with network `nat`, such as 10.200.0.0/20; empty: one that the host has no route to",
    ),
    (
        WARM_POOL,
        "",
        "how many machines wait for new VMs of which images, as a JSON object such as {\"debian\": 2}; at most 16 in all, and only with default.warm_start",
    ),
];

/// Limits of the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Number of days.
    pub(crate) days: u32,
    /// Number of changes of each VM.
    pub(crate) per_vm: u32,
}

/// Reads the defaults for new VMs.
pub(crate) async fn read(store: &Store) -> Result<Defaults, ToolError> {
    Ok(values(store).await?.0)
}

/// Reads the limits of the history.
pub(crate) async fn history(store: &Store) -> Result<Kept, ToolError> {
    Ok(values(store).await?.1)
}

/// Reads what is done with checkpoints by themselves.
pub(crate) async fn upkeep(store: &Store) -> Result<Upkeep, ToolError> {
    Ok(values(store).await?.3)
}

/// Settings of the shared network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SharedNetwork {
    /// Whether to keep rules for VMs in the host's own firewall.
    pub(crate) opens_firewall: bool,
    /// Subnet; `None`: chosen automatically.
    pub(crate) subnet: Option<Cidr>,
    /// Name servers that its resolver asks; empty: those of the host.
    pub(crate) dns: Vec<IpAddr>,
    /// What the preset `packages` allows besides the registries that the host's configuration names.
    pub(crate) packages: Vec<NetworkRule>,
    /// Search domains of guests besides that of VMs.
    pub(crate) search: Vec<String>,
}

/// Reads the settings of the shared network.
pub(crate) async fn network(store: &Store) -> Result<SharedNetwork, ToolError> {
    Ok(values(store).await?.2)
}

async fn values(store: &Store) -> Result<Values, ToolError> {
    let rows = store.read(|db| settings::at(db, i64::MAX)).await.map_err(store_error)?;
    let mut values = Values::default();
    for (key, default, _) in SETTINGS {
        let value = rows.get(key).and_then(|row| row.value.as_deref()).unwrap_or(default);
        values.set(key, value)?;
    }
    Ok(values)
}

/// Parsed settings.
pub(crate) struct Values(Defaults, Kept, SharedNetwork, Upkeep);

impl Default for Values {
    fn default() -> Self {
        let caps = Caps { count: 0, age: TimeSpan::seconds(0), bytes: ByteSize::bytes(0), has_named: false };
        let upkeep = Upkeep { pack_after: TimeSpan::seconds(60 * 60), caps };
        Self(Defaults::built_in(), Kept { days: 90, per_vm: 1000 }, SharedNetwork::default(), upkeep)
    }
}

impl Values {
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<(), ToolError> {
        let Self(defaults, kept, network, upkeep) = self;
        match key {
            DEFAULT_IMAGE => value.clone_into(&mut defaults.image),
            DEFAULT_KERNEL => value.clone_into(&mut defaults.kernel),
            DEFAULT_VCPUS => {
                let vcpus =
                    value.parse().map_err(|_| ToolError::invalid(format!("`{value}` is not a number")))?;
                spec::check_vcpus(vcpus).map_err(ToolError::invalid)?;
                defaults.vcpus = vcpus;
            }
            DEFAULT_MEMORY => {
                let memory = size(value)?;
                spec::check_memory(memory).map_err(ToolError::invalid)?;
                defaults.memory = memory;
            }
            DEFAULT_DISK => {
                let disk = size(value)?;
                spec::check_disk(disk).map_err(ToolError::invalid)?;
                defaults.disk = disk;
            }
            DEFAULT_NETWORK => {
                defaults.network = match value {
                    "none" => NetworkMode::None,
                    "proxy" => NetworkMode::Proxy,
                    "nat" => NetworkMode::Nat,
                    other => {
                        return Err(ToolError::invalid(format!(
                            "`{other}` is not one of none, proxy and nat"
                        )));
                    }
                };
            }
            DEFAULT_TMP => {
                defaults.tmp = match value {
                    "disk" => TmpPlace::Disk,
                    "tmpfs" => TmpPlace::Tmpfs,
                    other => return Err(ToolError::invalid(format!("`{other}` is neither disk nor tmpfs"))),
                };
            }
            DEFAULT_CHECKPOINTS => {
                defaults.checkpoints = match value {
                    "" => None,
                    "true" => Some(true),
                    "false" => Some(false),
                    other => {
                        return Err(ToolError::invalid(format!(
                            "`{other}` is neither true nor false nor empty"
                        )));
                    }
                };
            }
            DEFAULT_TTL => defaults.ttl = span(value)?,
            DEFAULT_IDLE_STOP => defaults.idle_stop = span(value)?,
            DEFAULT_IDLE_ACTION => {
                defaults.idle_action = value
                    .parse()
                    .map_err(|()| ToolError::invalid(format!("`{value}` is neither stop nor suspend")))?;
            }
            DEFAULT_WAIT_FOR_INIT => defaults.wait_for_init = truth(value)?,
            DEFAULT_WARM_START => defaults.warm_start = truth(value)?,
            WARM_POOL => defaults.warm_pool = pool(value)?,
            DNS => defaults.dns = addresses(value)?,
            NETWORK_DNS => network.dns = addresses(value)?,
            FIREWALL => network.opens_firewall = truth(value)?,
            PACKAGES => network.packages = rules(value)?,
            SEARCH => network.search = domains(value)?,
            SUBNET => {
                network.subnet = match value {
                    "" => None,
                    subnet => Some(parse_subnet(subnet).map_err(ToolError::invalid)?),
                };
            }
            CAP_NAMED => upkeep.caps.has_named = truth(value)?,
            MAX_AGE => upkeep.caps.age = span(value)?,
            MAX_BYTES => upkeep.caps.bytes = size(value)?,
            MAX_COUNT => {
                upkeep.caps.count = if value == "0" { 0 } else { between(value, 2, 100_000)? };
            }
            PACK_AFTER => {
                upkeep.pack_after = if value == "off" { TimeSpan::seconds(0) } else { span(value)? };
            }
            HISTORY_DAYS => kept.days = between(value, 1, 36_500)?,
            HISTORY_PER_VM => kept.per_vm = between(value, 20, 100_000)?,
            _ => return Err(ToolError::internal(format!("unknown setting {key}"))),
        }
        Ok(())
    }
}

fn truth(value: &str) -> Result<bool, ToolError> {
    value.parse().map_err(|_| ToolError::invalid(format!("`{value}` is neither true nor false")))
}

fn between(value: &str, least: u32, most: u32) -> Result<u32, ToolError> {
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| ToolError::invalid(format!("`{value}` is not a number from {least} to {most}")))
}

/// Parses how many machines wait for VMs of which images.
fn pool(value: &str) -> Result<BTreeMap<String, u32>, ToolError> {
    if value.is_empty() {
        return Ok(BTreeMap::new());
    }
    let pool: BTreeMap<String, u32> = serde_json::from_str(value)
        .map_err(|_| ToolError::invalid(format!("`{value}` is not a JSON object of images with numbers")))?;
    let all = pool.values().fold(0_u32, |all, count| all.saturating_add(*count));
    if all > POOL_MAX {
        return Err(ToolError::invalid(format!("at most {POOL_MAX} machines wait, got {all}")));
    }
    Ok(pool)
}

fn span(value: &str) -> Result<TimeSpan, ToolError> {
    value.parse().map_err(|e| ToolError::invalid(format!("{e}")))
}

fn size(value: &str) -> Result<ByteSize, ToolError> {
    value.parse().map_err(|e| ToolError::invalid(format!("{e}")))
}

/// Parses names and addresses, comma-separated.
fn rules(value: &str) -> Result<Vec<NetworkRule>, ToolError> {
    let parts = value.split(',').map(str::trim).filter(|part| !part.is_empty());
    let rules: Vec<NetworkRule> = parts
        .map(|part| match part.parse::<NetworkRule>() {
            Ok(rule) if *rule.target() == Target::Any => {
                Err(ToolError::invalid(format!("`{part}` names everything: use the preset internet")))
            }
            rule => rule.map_err(|error| ToolError::invalid(error.to_string())),
        })
        .collect::<Result<_, _>>()?;
    if rules.len() > PACKAGES_MAX {
        return Err(ToolError::invalid(format!("at most {PACKAGES_MAX} names, got {}", rules.len())));
    }
    Ok(rules)
}

/// Parses names of domains, comma-separated.
fn domains(value: &str) -> Result<Vec<String>, ToolError> {
    let parts = value.split(',').map(str::trim).filter(|part| !part.is_empty());
    let domains: Vec<String> = parts
        .map(|part| name(part).map_err(|why| ToolError::invalid(format!("`{part}` is not a domain: {why}"))))
        .collect::<Result<_, _>>()?;
    if domains.len() > SEARCH_MAX {
        return Err(ToolError::invalid(format!(
            "at most {SEARCH_MAX} search domains, got {}",
            domains.len()
        )));
    }
    Ok(domains)
}

fn addresses(value: &str) -> Result<Vec<IpAddr>, ToolError> {
    let addresses: Vec<IpAddr> = value
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| ToolError::invalid(format!("`{part}` is not an IP address"))))
        .collect::<Result<_, _>>()?;
    if addresses.len() > DNS_MAX {
        return Err(ToolError::invalid(format!("at most {DNS_MAX} name servers, got {}", addresses.len())));
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of a cell of a table: `0: without limit` has three.
    fn words(cell: &str) -> impl Iterator<Item = &str> {
        let is_of_a_word = |c: char| c.is_alphanumeric() || c == '.' || c == '_';
        cell.split(move |c| !is_of_a_word(c)).filter(|word| !word.is_empty())
    }

    #[test]
    fn the_page_of_configuration_has_every_setting_with_its_value_and_no_others() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let page = std::fs::read_to_string(page).unwrap();
        let section = page.split("\n## ").find(|section| section.starts_with("Settings\n")).unwrap();
        let rows = section.lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
        let rows: Vec<(Vec<&str>, &str)> = cells.map(|row| (words(row[0]).collect(), row[1])).collect();
        for (key, value, _) in SETTINGS {
            let row = rows.iter().find(|(keys, _)| keys.contains(&key));
            let (_, said) = row.unwrap_or_else(|| panic!("docs/configuration.md does not have {key}"));
            let value = if value.is_empty() { "empty" } else { value };
            assert!(words(said).any(|word| word == value), "{key} is {value}, and not {said}");
        }
        for key in rows.iter().flat_map(|(keys, _)| keys) {
            assert!(SETTINGS.iter().any(|(known, ..)| known == key), "there is no setting {key}");
        }
    }

    #[test]
    fn built_in_values_are_what_their_settings_say() {
        let mut values = Values::default();
        for (key, default, _) in SETTINGS {
            values.set(key, default).unwrap();
        }
        let Values(built_in, kept, network, upkeep) = Values::default();
        assert_eq!((values.0, values.1, values.2, values.3), (built_in, kept, network, upkeep));
        assert!(SETTINGS.is_sorted_by_key(|(key, ..)| *key));
    }

    #[test]
    fn values_are_checked() {
        for (key, value) in [
            (DEFAULT_VCPUS, "0"),
            (DEFAULT_VCPUS, "many"),
            (DEFAULT_VCPUS, "33"),
            (DEFAULT_MEMORY, "1MiB"),
            (DEFAULT_MEMORY, "1.5GiB"),
            (DEFAULT_DISK, "1"),
            (DEFAULT_NETWORK, "lan"),
            (SUBNET, "8.8.8.0/24"),
            (NETWORK_DNS, "dns.example"),
            (SEARCH, "a.example, b c"),
            (SEARCH, "10.0.0.1"),
            (SEARCH, "a,b,c,d,e,f"),
            (PACKAGES, "a.example, *:443"),
            (PACKAGES, "https://a.example"),
            (PACKAGES, vec!["a.example"; 65].join(",").as_str()),
            (DEFAULT_TMP, "memory"),
            (DEFAULT_WAIT_FOR_INIT, "yes"),
            (DEFAULT_WARM_START, "on"),
            (WARM_POOL, "debian=2"),
            (WARM_POOL, r#"{"debian": -1}"#),
            (WARM_POOL, r#"{"debian": 10, "busybox": 7}"#),
            (DEFAULT_TTL, "1 week"),
            (DEFAULT_IDLE_ACTION, "pause"),
            (DEFAULT_IDLE_STOP, ""),
            (DEFAULT_CHECKPOINTS, "yes"),
            (CAP_NAMED, "yes"),
            (MAX_AGE, "soon"),
            (MAX_BYTES, "1.5GiB"),
            (MAX_COUNT, "1"),
            (PACK_AFTER, "never"),
            (HISTORY_DAYS, "0"),
            (HISTORY_PER_VM, "19"),
            (HISTORY_PER_VM, "many"),
            (DNS, "example.org"),
            (DNS, "1.1.1.1,1.1.1.2,1.1.1.3,1.1.1.4"),
        ] {
            assert!(Values::default().set(key, value).is_err(), "{key} {value}");
        }
        let mut values = Values::default();
        values.set(DNS, "9.9.9.9, 2620:fe::fe").unwrap();
        assert_eq!(values.0.dns.len(), 2);
        for (value, checkpoints) in [("true", Some(true)), ("false", Some(false)), ("", None)] {
            values.set(DEFAULT_CHECKPOINTS, value).unwrap();
            assert_eq!(values.0.checkpoints, checkpoints);
        }
        values.set(WARM_POOL, r#"{"debian": 10, "busybox": 6}"#).unwrap();
        assert_eq!(values.0.warm_pool["busybox"], 6);
        for (value, seconds) in [("10m", 600), ("off", 0), ("0", 0)] {
            values.set(PACK_AFTER, value).unwrap();
            assert_eq!(values.3.pack_after, TimeSpan::seconds(seconds));
        }
        values.set(PACKAGES, "a.example:443, *.b.example").unwrap();
        assert_eq!(values.2.packages.len(), 2);
        values.set(SEARCH, "Corp.example., lab.example").unwrap();
        assert_eq!(values.2.search, ["corp.example", "lab.example"]);
    }
}
