//! What a VM may reach: modes, presets, the entries of allow and deny lists, and the reasons of refusals.

mod rule;

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::size::ByteSize;
pub use rule::{NetworkRule, ParseRuleError, RuleProtocol, Target, name};

/// The maximum number of entries of an allow or a deny list.
pub const RULES_MAX: usize = 128;
/// The maximum number of names of the preset `packages`.
pub const PACKAGES_MAX: usize = 64;
/// The maximum number of groups of one VM.
pub const GROUPS_MAX: usize = 16;

/// How a VM reaches other machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Not at all: there is only the vsock link to its host.
    #[default]
    None,
    /// Through a proxy in the guest, whose connections its host makes: HTTP, HTTPS and SOCKS5, no network interface.
    Proxy,
    /// Through a network interface with its own addresses, behind its host's address.
    Nat,
}

impl NetworkMode {
    /// Returns the mode as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Proxy => "proxy",
            Self::Nat => "nat",
        }
    }
}

/// What may be reached if no entry says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkPreset {
    /// The internet: no address of the host, no private, link-local, metadata, multicast or reserved range.
    #[default]
    Internet,
    /// Also private networks, and the host's addresses in them; but not its loopback, link-local, metadata, multicast or reserved ranges.
    Open,
    /// Package registries of the host's configuration and the setting `network.packages`.
    Packages,
}

impl NetworkPreset {
    /// Returns the preset as it is on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Internet => "internet",
            Self::Open => "open",
            Self::Packages => "packages",
        }
    }
}

/// What a VM may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    /// How the VM reaches other machines.
    pub mode: NetworkMode,
    /// What it may reach if no entry says otherwise.
    #[serde(default)]
    pub preset: NetworkPreset,
    /// If it is not empty, only what it names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<NetworkRule>,
    /// Never what this names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<NetworkRule>,
    /// Its groups in [`NetworkMode::Nat`]: VMs with a common group may talk to each other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Name>,
    /// Its bandwidth limits.
    #[serde(default, skip_serializing_if = "Bandwidth::is_empty")]
    pub bandwidth: Bandwidth,
    /// What [`NetworkPreset::Packages`] allows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<NetworkRule>,
}

impl NetworkPolicy {
    /// Returns a policy that allows the same without the preset `packages`: its names are in `allow`, in place of each `*` or of an empty list.
    pub fn effective(&self) -> Cow<'_, Self> {
        if self.preset != NetworkPreset::Packages {
            return Cow::Borrowed(self);
        }
        let any = NetworkRule::any();
        let listed = if self.allow.is_empty() { std::slice::from_ref(&any) } else { &self.allow };
        let expand = |rule: &NetworkRule| match rule.target() {
            Target::Any => self.packages.iter().filter_map(|one| one.within(rule)).collect(),
            Target::Name(_) | Target::Below(_) | Target::Net(..) => vec![rule.clone()],
        };
        let allow: Vec<NetworkRule> = listed.iter().flat_map(expand).collect();
        // An empty list would allow everything.
        let mode = if allow.is_empty() { NetworkMode::None } else { self.mode };
        let preset = NetworkPreset::Internet;
        Cow::Owned(Self { mode, preset, allow, packages: Vec::new(), ..self.clone() })
    }

    /// Returns whether any entry is for one protocol only.
    pub fn names_protocols(&self) -> bool {
        let mut all = self.allow.iter().chain(&self.deny).chain(&self.packages);
        all.any(|rule| rule.protocol().is_some())
    }

    /// Returns a policy without protocols that decides about this protocol as the whole policy does. No protocol stands for all that entries
    /// cannot name.
    pub fn over(&self, protocol: Option<RuleProtocol>) -> Cow<'_, Self> {
        if !self.names_protocols() {
            return Cow::Borrowed(self);
        }
        let of = |rules: &[NetworkRule]| -> Vec<NetworkRule> {
            rules.iter().filter_map(|rule| rule.over(protocol)).collect()
        };
        let mut allow = of(&self.allow);
        if allow.is_empty() && !self.allow.is_empty() {
            // An empty list would allow everything.
            allow.push(NetworkRule::nothing());
        }
        Cow::Owned(Self { allow, deny: of(&self.deny), packages: of(&self.packages), ..self.clone() })
    }
}

/// Bandwidth limits of a VM, in bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// Limit of traffic to the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx: Option<ByteSize>,
    /// Limit of traffic from the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx: Option<ByteSize>,
}

impl Bandwidth {
    /// The lowest limit: programs need at least this.
    pub const MIN: ByteSize = ByteSize::bytes(16 << 10);
    /// The highest limit.
    pub const MAX: ByteSize = ByteSize::gib(100);

    /// Returns whether there is no limit.
    pub const fn is_empty(&self) -> bool {
        self.rx.is_none() && self.tx.is_none()
    }

    /// Returns what is wrong with the limits.
    pub fn check(self) -> Result<(), String> {
        for (name, limit) in [("rx", self.rx), ("tx", self.tx)] {
            if let Some(limit) = limit.filter(|limit| !(Self::MIN..=Self::MAX).contains(limit)) {
                let (min, max) = (Self::MIN, Self::MAX);
                return Err(format!("network.bandwidth.{name} is {limit} a second, not {min} to {max}"));
            }
        }
        Ok(())
    }
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DenyReason {
    /// The VM has no network.
    NoNetwork,
    /// There is an allow list without the host's name.
    NameNotAllowed,
    /// There is an allow list without the address.
    AddressNotAllowed,
    /// The deny list contains it.
    Denied,
    /// It is an address of the host itself.
    Host,
    /// It is an address of a private network.
    Private,
    /// It is a link-local address.
    LinkLocal,
    /// It is the address of a cloud's metadata service.
    Metadata,
    /// It is a multicast address.
    Multicast,
    /// It is an address of a reserved range.
    Reserved,
    /// It is another VM, without a common group.
    OtherVm,
    /// The frame had a MAC or IP address that is not the VM's.
    Spoofed,
    /// There is an allow list of names, and QUIC (UDP port 443) would hide the requested name.
    Quic,
    /// There is an allow list, and it contains no resolver other than the host's.
    Resolver,
    /// The VM has too many open connections.
    TooManyConnections,
}

impl DenyReason {
    /// Returns the reason in a few words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NoNetwork => "this VM has no network",
            Self::NameNotAllowed => "name not allowed",
            Self::AddressNotAllowed => "address not allowed",
            Self::Denied => "denied by network.deny",
            Self::Host => "an address of the host",
            Self::Private => "an address of a private network",
            Self::LinkLocal => "a link-local address",
            Self::Metadata => "the address of a metadata service",
            Self::Multicast => "a multicast address",
            Self::Reserved => "an address of a reserved range",
            Self::OtherVm => "another VM without a common group",
            Self::Spoofed => "a sender's address that is not this VM's",
            Self::Quic => "UDP port 443 under an allow list of names",
            Self::Resolver => "another resolver under an allow list",
            Self::TooManyConnections => "too many open connections",
        }
    }

    /// Returns whether an entry in the allow list would help.
    pub const fn is_for_allow(self) -> bool {
        match self {
            Self::NameNotAllowed
            | Self::AddressNotAllowed
            | Self::Host
            | Self::Private
            | Self::LinkLocal
            | Self::Metadata
            | Self::Multicast
            | Self::Reserved => true,
            Self::NoNetwork
            | Self::Denied
            | Self::OtherVm
            | Self::Spoofed
            | Self::Quic
            | Self::Resolver
            | Self::TooManyConnections => false,
        }
    }

    /// Returns what to do next. `allow` is the allow list that would allow the connection; empty if it is too long to show.
    pub fn hint(self, allow: &[String]) -> String {
        match self {
            Self::NoNetwork => r#"ask for vm_update network={"mode":"proxy"}"#.to_owned(),
            Self::Denied => "ask for vm_update network.deny without the entry that names it".to_owned(),
            Self::OtherVm => "ask for vm_update network.groups with one group on both VMs".to_owned(),
            Self::Spoofed => "use the addresses that the network interface was given".to_owned(),
            Self::Quic => "use TCP: HTTP/2 or HTTP/1.1 instead of HTTP/3".to_owned(),
            Self::TooManyConnections => {
                "close connections, or wait until idle ones end; then try again".to_owned()
            }
            Self::Resolver => "use the resolver that /etc/resolv.conf names".to_owned(),
            _ if allow.is_empty() => {
                "ask for vm_update network.allow with an entry for it added to those that vm_inspect shows"
                    .to_owned()
            }
            _ => format!("ask for vm_update network.allow={}", serde_json::json!(allow)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_the_entries_that_they_stand_for() {
        let rules =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<NetworkRule>>();
        let effective = |allow: &[&str], packages: &[&str]| {
            let policy = NetworkPolicy {
                mode: NetworkMode::Proxy,
                preset: NetworkPreset::Packages,
                allow: rules(allow),
                packages: rules(packages),
                ..NetworkPolicy::default()
            };
            let now = policy.effective().into_owned();
            assert_eq!((now.preset, now.packages.len()), (NetworkPreset::Internet, 0));
            (now.mode, now.allow.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let proxy = |text: &str| (NetworkMode::Proxy, text.to_owned());
        let names = ["a.example:443", "b.example", "c.example:8000-9000"];
        assert_eq!(effective(&[], &names), proxy("a.example:443 b.example c.example:8000-9000"));
        assert_eq!(effective(&["x.example"], &names), proxy("x.example"), "a list replaces the preset");
        assert_eq!(
            effective(&["*", "x.example"], &names),
            proxy("a.example:443 b.example c.example:8000-9000 x.example")
        );
        assert_eq!(effective(&["*:443"], &names), proxy("a.example:443 b.example:443"));
        assert_eq!(
            effective(&["*:80-8500"], &names),
            proxy("a.example:443 b.example:80-8500 c.example:8000-8500")
        );
        for (allow, packages) in [(&[][..], &[][..]), (&["*"], &[]), (&["*:25"], &["a.example:443"])] {
            assert_eq!(effective(allow, packages).0, NetworkMode::None, "nothing is not everything");
        }
        let open = NetworkPolicy {
            preset: NetworkPreset::Open,
            packages: rules(&names),
            ..NetworkPolicy::default()
        };
        assert!(matches!(open.effective(), Cow::Borrowed(_)));
    }

    #[test]
    fn a_policy_for_one_protocol_has_the_entries_for_it() {
        let rules =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<NetworkRule>>();
        let policy = NetworkPolicy {
            allow: rules(&["a.example:443/tcp", "b.example"]),
            deny: rules(&["10.0.0.0/8/udp"]),
            ..NetworkPolicy::default()
        };
        let over = |policy: &NetworkPolicy, protocol| {
            let now = policy.over(protocol).into_owned();
            assert!(!now.names_protocols());
            (now.allow, now.deny)
        };
        let (tcp, udp) = (Some(RuleProtocol::Tcp), Some(RuleProtocol::Udp));
        assert_eq!(over(&policy, tcp), (rules(&["a.example:443", "b.example"]), Vec::new()));
        assert_eq!(over(&policy, udp), (rules(&["b.example"]), rules(&["10.0.0.0/8"])));
        assert_eq!(over(&policy, None), (rules(&["b.example"]), Vec::new()));
        let only = NetworkPolicy { allow: rules(&["a.example/tcp"]), ..NetworkPolicy::default() };
        let (allow, _) = over(&only, udp);
        assert_eq!(allow.len(), 1, "a list without entries would allow everything");
        assert!(!allow[0].names("a.example", 443) && !allow[0].is_any(443) && !allow[0].is_address());
        assert!([0, 1].iter().all(|port| !allow[0].names("invalid", *port)), "not even its own name");
        let plain = NetworkPolicy { allow: rules(&["a.example"]), ..NetworkPolicy::default() };
        assert!(matches!(plain.over(udp), Cow::Borrowed(_)));
    }

    #[test]
    fn hints_can_be_followed() {
        let allow = ["*".to_owned(), "10.0.0.5:80".to_owned()];
        assert_eq!(
            DenyReason::Private.hint(&allow),
            r#"ask for vm_update network.allow=["*","10.0.0.5:80"]"#
        );
        assert!(DenyReason::NoNetwork.hint(&[]).contains("proxy"));
        assert!(DenyReason::NameNotAllowed.hint(&[]).contains("vm_inspect"));
    }
}
