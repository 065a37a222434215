//! One entry of an allow or a deny list, as text: `api.example.org`, `*.example.net:443`, `10.0.0.0/8:8000-8999`, `10.0.0.5:53/udp`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The maximum length of a host name, in bytes.
const NAME_MAX: usize = 253;
/// The maximum length of a wrong entry in messages, in characters.
const SHOWN_MAX: usize = 60;

/// An entry of an allow or a deny list.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkRule {
    target: Target,
    /// The first and the last port; `None` means every port.
    ports: Option<(u16, u16)>,
    /// The protocol; `None` means every protocol.
    protocol: Option<RuleProtocol>,
}

/// A protocol that an entry may be limited to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6, which have no ports.
    Icmp,
}

impl RuleProtocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Icmp];

    /// Returns its name in an entry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }

    /// Returns the one with this number in IP headers; `None` for protocols that no entry can name.
    pub const fn of_number(number: u8) -> Option<Self> {
        match number {
            1 | 58 => Some(Self::Icmp),
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// What an entry matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Everything that the preset allows.
    Any,
    /// One name.
    Name(String),
    /// Every name below this one.
    Below(String),
    /// The addresses with this prefix.
    Net(IpAddr, u8),
}

/// Why a text is not an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a name, an address or a CIDR: {why}; write it as api.example.org, *.example.net, 10.0.0.5, 10.0.0.0/8 or \
     [2001:db8::1], and :PORT or :PORT-PORT behind it where only these ports are meant, and /tcp, /udp or /icmp for one protocol"
)]
pub struct ParseRuleError {
    /// The given text, shortened.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl NetworkRule {
    /// Returns what it matches.
    pub const fn target(&self) -> &Target {
        &self.target
    }

    /// Returns the first and the last port that it matches; `None` means every port.
    pub const fn ports(&self) -> Option<(u16, u16)> {
        self.ports
    }

    /// Returns the protocol that it matches; `None` means every protocol.
    pub const fn protocol(&self) -> Option<RuleProtocol> {
        self.protocol
    }

    /// Returns it as it is for this protocol, without saying so; `None` if it is for another one. No protocol stands for all that entries cannot
    /// name.
    pub fn over(&self, protocol: Option<RuleProtocol>) -> Option<Self> {
        let is_its = self.protocol.is_none() || self.protocol == protocol;
        is_its.then(|| Self { protocol: None, ..self.clone() })
    }

    /// Returns an entry that matches nothing: it has no ports. Port 0, which stands for protocols without ports, is none of them either.
    pub(super) fn nothing() -> Self {
        Self { target: Target::Name("invalid".to_owned()), ports: Some((1, 0)), protocol: None }
    }

    /// Creates the entry for one port of a name or an address.
    pub fn exact(host: &str, port: u16) -> Option<Self> {
        let target = match host.parse::<IpAddr>() {
            Ok(address) => Target::Net(address.to_canonical(), length(address.to_canonical())),
            Err(_) => Target::Name(name(host).ok()?),
        };
        Some(Self { target, ports: Some((port, port)), protocol: None })
    }

    /// Returns the entry for everything that the preset allows.
    pub const fn any() -> Self {
        Self { target: Target::Any, ports: None, protocol: None }
    }

    /// Returns the part of it with another entry's ports and protocol; `None` if there is none.
    pub fn within(&self, other: &Self) -> Option<Self> {
        let protocol = match (self.protocol, other.protocol) {
            (Some(own), Some(others)) if own != others => return None,
            (own, others) => own.or(others),
        };
        let common = match (self.ports, other.ports) {
            (own, None) => own,
            (None, some) => some,
            (Some((first, last)), Some((least, most))) => Some((first.max(least), last.min(most))),
        };
        let is_empty =
            common.is_some_and(|(first, last)| first > last || protocol == Some(RuleProtocol::Icmp));
        (!is_empty).then(|| Self { target: self.target.clone(), ports: common, protocol })
    }

    /// Whether it names addresses.
    pub const fn is_address(&self) -> bool {
        matches!(self.target, Target::Net(..))
    }

    /// Returns whether it matches this port.
    fn has(&self, port: u16) -> bool {
        self.ports.is_none_or(|(first, last)| (first..=last).contains(&port))
    }

    /// Returns whether it matches everything that the preset allows, on this port.
    pub fn is_any(&self, port: u16) -> bool {
        self.target == Target::Any && self.has(port)
    }

    /// Returns whether it matches this port of a name, which must be in lower case.
    pub fn names(&self, name: &str, port: u16) -> bool {
        self.has(port)
            && match &self.target {
                Target::Name(own) => own == name,
                Target::Below(above) => name
                    .strip_suffix(above.as_str())
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
                Target::Any | Target::Net(..) => false,
            }
    }

    /// Returns whether it matches this port of an address.
    pub fn covers(&self, address: IpAddr, port: u16) -> bool {
        let Target::Net(net, prefix) = self.target else { return false };
        self.has(port)
            && match (net, address.to_canonical()) {
                (IpAddr::V4(net), IpAddr::V4(address)) => {
                    let kept = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                    (u32::from(net) ^ u32::from(address)) & kept == 0
                }
                (IpAddr::V6(net), IpAddr::V6(address)) => {
                    let kept = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                    (u128::from(net) ^ u128::from(address)) & kept == 0
                }
                (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
            }
    }
}

/// Normalizes a host name: lower case, no dot at the end. Refuses numbers that some resolvers accept as addresses.
pub fn name(text: &str) -> Result<String, &'static str> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > NAME_MAX {
        return Err("names have at most 253 letters");
    }
    for label in text.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err("the parts of a name have 1 to 63 letters");
        }
        if !label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
            return Err("names can only have ASCII letters, digits, - and .");
        }
    }
    let last = text.rsplit('.').next().unwrap_or_default();
    if last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x") || last.starts_with("0X") {
        return Err("it ends in a number, but is not an address");
    }
    Ok(text.to_ascii_lowercase())
}

/// Returns the full length of an address, in bits.
const fn length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn ports(text: &str) -> Result<(u16, u16), &'static str> {
    let port = |text: &str| {
        let number = text.parse().ok().filter(|port| *port > 0 && text.bytes().all(|b| b.is_ascii_digit()));
        number.ok_or("ports are numbers from 1 to 65535")
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last { Err("the first port is higher than the last one") } else { Ok((first, last)) }
}

/// Parses an address with or without a prefix length; `None` if it is something else.
fn net(text: &str) -> Option<Result<Target, &'static str>> {
    let (address, prefix) =
        text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address = match (address.parse::<IpAddr>(), prefix) {
        (Ok(address), _) => address,
        (Err(_), Some(_)) => return Some(Err("there is no address before the /")),
        (Err(_), None) => return None,
    };
    let Some(prefix) = prefix else {
        let address = address.to_canonical();
        return Some(Ok(Target::Net(address, length(address))));
    };
    let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let Some(prefix) = prefix.parse::<u8>().ok().filter(|prefix| digits && *prefix <= length(address)) else {
        return Some(Err("the length after the / is invalid"));
    };
    let is_rest_zero = match address {
        IpAddr::V4(v4) => u32::from(v4).checked_shl(prefix.into()).unwrap_or(0) == 0,
        IpAddr::V6(v6) => u128::from(v6).checked_shl(prefix.into()).unwrap_or(0) == 0,
    };
    if !is_rest_zero {
        return Some(Err("its address has bits set after the prefix"));
    }
    // ::ffff:10.0.0.0/104 is 10.0.0.0/8.
    Some(Ok(match address.to_canonical() {
        IpAddr::V4(v4) if address.is_ipv6() && prefix >= 96 => Target::Net(v4.into(), prefix - 96),
        _ => Target::Net(address, prefix),
    }))
}

fn parse(text: &str) -> Result<NetworkRule, &'static str> {
    if text.contains("://") {
        return Err("it is a URL: give only the host");
    }
    let behind = text.rsplit_once('/').and_then(|(rest, word)| {
        let named = RuleProtocol::ALL.into_iter().find(|one| word.eq_ignore_ascii_case(one.as_str()));
        Some((rest, named?))
    });
    let Some((rest, protocol)) = behind else { return of_all_protocols(text) };
    let rule = of_all_protocols(rest)?;
    if protocol == RuleProtocol::Icmp && rule.ports.is_some() {
        return Err("icmp has no ports");
    }
    Ok(NetworkRule { protocol: Some(protocol), ..rule })
}

/// Parses an entry without a protocol.
fn of_all_protocols(text: &str) -> Result<NetworkRule, &'static str> {
    let protocol = None;
    if let Some(rest) = text.strip_prefix('[') {
        let (inner, behind) = rest.split_once(']').ok_or("a ] is missing")?;
        let (length, given) = match behind.split_once(':') {
            Some((length, given)) => (length, Some(given)),
            None => (behind, None),
        };
        let whole = format!("{inner}{length}");
        let target = net(&whole).ok_or("there is no address between [ and ]")??;
        return Ok(NetworkRule { target, ports: given.map(ports).transpose()?, protocol });
    }
    if let Some(target) = net(text) {
        let looks_v4 = text.split(['/', ':']).next().is_some_and(|first| first.parse::<Ipv4Addr>().is_ok());
        match target {
            Ok(target) => return Ok(NetworkRule { target, ports: None, protocol }),
            Err(why) if !(looks_v4 && text.contains(':')) => return Err(why),
            Err(_) => {}
        }
    }
    let (host, given) = match text.rsplit_once(':') {
        Some((host, given)) => (host, Some(given)),
        None => (text, None),
    };
    if host.contains(':') {
        return Err("an IPv6 address with a port must be in [ and ]");
    }
    let target = match (host, net(host)) {
        ("*", _) => Target::Any,
        (_, Some(target)) => target?,
        (host, None) => match host.strip_prefix("*.") {
            Some(above) => Target::Below(name(above)?),
            None => Target::Name(name(host)?),
        },
    };
    Ok(NetworkRule { target, ports: given.map(ports).transpose()?, protocol })
}

impl FromStr for NetworkRule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, ParseRuleError> {
        parse(text.trim()).map_err(|why| ParseRuleError {
            text: text.chars().take(SHOWN_MAX).flat_map(char::escape_debug).collect(),
            why,
        })
    }
}

impl fmt::Display for NetworkRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Any => f.write_str("*")?,
            Target::Name(name) => f.write_str(name)?,
            Target::Below(above) => write!(f, "*.{above}")?,
            Target::Net(address, prefix) => {
                let is_bracketed = address.is_ipv6() && self.ports.is_some();
                let (open, close) = if is_bracketed { ("[", "]") } else { ("", "") };
                write!(f, "{open}{address}")?;
                if *prefix < length(*address) {
                    write!(f, "/{prefix}")?;
                }
                f.write_str(close)?;
            }
        }
        match self.ports {
            None => {}
            Some((first, last)) if first == last => write!(f, ":{first}")?,
            Some((first, last)) => write!(f, ":{first}-{last}")?,
        }
        match self.protocol {
            None => Ok(()),
            Some(protocol) => write!(f, "/{}", protocol.as_str()),
        }
    }
}

impl Serialize for NetworkRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NetworkRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for NetworkRule {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "network_rule".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "examples": ["api.example.org", "*.example.net:443", "10.0.0.0/8:8000-8999"] })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(text: &str) -> NetworkRule {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn entries_are_names_addresses_and_cidrs_with_ports() {
        for (text, shown) in [
            ("*", "*"),
            ("*:443", "*:443"),
            ("API.Example.org.", "api.example.org"),
            ("api.example.org:443", "api.example.org:443"),
            ("*.example.net:8000-8999", "*.example.net:8000-8999"),
            ("localhost:80-80", "localhost:80"),
            ("a_b.example", "a_b.example"),
            ("10.0.0.5", "10.0.0.5"),
            ("10.0.0.5:80", "10.0.0.5:80"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.0/8:1-1024", "10.0.0.0/8:1-1024"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.0.0.5/32", "10.0.0.5"),
            ("::1", "::1"),
            ("::/0", "::/0"),
            ("[::1]", "::1"),
            ("[::1]:80", "[::1]:80"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
            ("[2001:db8::]/32:443", "[2001:db8::/32]:443"),
            ("::ffff:10.0.0.5", "10.0.0.5"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("*/UDP", "*/udp"),
            ("api.example.org:443/tcp", "api.example.org:443/tcp"),
            ("10.0.0.0/8/icmp", "10.0.0.0/8/icmp"),
            ("10.0.0.5:53/udp", "10.0.0.5:53/udp"),
            ("[2001:db8::/32]:443/tcp", "[2001:db8::/32]:443/tcp"),
            ("2001:db8::1/icmp", "2001:db8::1/icmp"),
        ] {
            assert_eq!(rule(text).to_string(), shown, "{text}");
            assert_eq!(rule(shown), rule(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_entry_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "it is empty"),
            ("a b", "ASCII letters"),
            ("https://example.org", "give only the host"),
            ("example.org/path", "no address before the /"),
            ("exämple.org", "ASCII letters"),
            ("a..b", "1 to 63 letters"),
            ("*.", "it is empty"),
            ("*x.example", "ASCII letters"),
            ("a.*.example", "ASCII letters"),
            ("10.0.0", "ends in a number"),
            ("10.0.0.256", "ends in a number"),
            ("2130706433", "ends in a number"),
            ("0x7f.0x1", "ends in a number"),
            ("10.0.0.5/8", "bits set after the prefix"),
            ("10.0.0.0/33", "the length after the /"),
            ("10.0.0.0/", "the length after the /"),
            ("10.0.0.0/+8", "the length after the /"),
            ("::/129", "the length after the /"),
            ("::1:80:x", "must be in [ and ]"),
            ("[::1", "a ] is missing"),
            ("[x]:80", "no address between"),
            ("example.org:", "ports are numbers"),
            ("example.org:0", "ports are numbers"),
            ("example.org:65536", "ports are numbers"),
            ("example.org:+80", "ports are numbers"),
            ("example.org:http", "ports are numbers"),
            ("example.org:90-80", "higher than the last one"),
            ("/tcp", "it is empty"),
            ("example.org/sctp", "no address before the /"),
            ("example.org/tcp/udp", "no address before the /"),
            ("example.org:80/icmp", "icmp has no ports"),
        ] {
            let error = text.parse::<NetworkRule>().unwrap_err();
            assert!(error.why.contains(why), "{text}: {}", error.why);
            assert!(error.to_string().contains("write it as api.example.org"), "{error}");
        }
        let long = format!("{}.example", "a".repeat(250)).parse::<NetworkRule>().unwrap_err();
        assert!(long.to_string().len() < 400, "{long}");
    }

    #[test]
    fn names_match_whole_labels_and_ports() {
        let below = rule("*.example.net:443");
        for (name, port, is_named) in [
            ("a.example.net", 443, true),
            ("a.b.example.net", 443, true),
            ("a.example.net", 80, false),
            ("example.net", 443, false),
            ("notexample.net", 443, false),
            (".example.net", 443, false),
        ] {
            assert_eq!(below.names(name, port), is_named, "{name}:{port}");
        }
        assert!(
            rule("example.net").names("example.net", 1) && !rule("example.net").names("a.example.net", 1)
        );
        assert!(!rule("*").names("example.net", 1) && rule("*:80").is_any(80) && !rule("*:80").is_any(81));
    }

    #[test]
    fn an_entry_of_one_protocol_is_none_of_another() {
        let over = |text: &str, protocol| rule(text).over(protocol).map(|rule| rule.to_string());
        assert_eq!(over("10.0.0.5:53/udp", Some(RuleProtocol::Udp)).as_deref(), Some("10.0.0.5:53"));
        for other in [Some(RuleProtocol::Tcp), Some(RuleProtocol::Icmp), None] {
            assert_eq!(over("10.0.0.5:53/udp", other), None);
            assert_eq!(over("10.0.0.5:53", other).as_deref(), Some("10.0.0.5:53"));
        }
        let within = |one: &str, other: &str| rule(one).within(&rule(other)).map(|rule| rule.to_string());
        assert_eq!(within("a.example:443", "*/tcp").as_deref(), Some("a.example:443/tcp"));
        assert_eq!(within("a.example/tcp", "*:443").as_deref(), Some("a.example:443/tcp"));
        assert_eq!(within("a.example/tcp", "*/udp"), None);
        assert_eq!(within("a.example:443", "*/icmp"), None);
    }

    #[test]
    fn addresses_match_by_prefix_whatever_their_form() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for (text, given, port, is_covered) in [
            ("10.0.0.0/8", "10.255.0.1", 1, true),
            ("10.0.0.0/8", "::ffff:10.0.0.1", 1, true),
            ("10.0.0.0/8", "11.0.0.1", 1, false),
            ("0.0.0.0/0", "8.8.8.8", 1, true),
            ("0.0.0.0/0", "2001:db8::1", 1, false),
            ("::/0", "2001:db8::1", 1, true),
            ("::/0", "::ffff:10.0.0.1", 1, false),
            ("127.0.0.1:80", "127.0.0.1", 80, true),
            ("127.0.0.1:80", "127.0.0.1", 81, false),
            ("127.0.0.1:80", "127.0.0.2", 80, false),
            ("fd00::/8", "fdff::1", 9, true),
            ("*", "10.0.0.1", 9, false),
        ] {
            assert_eq!(rule(text).covers(address(given), port), is_covered, "{text} {given}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,80}") {
            if let Ok(rule) = text.parse::<NetworkRule>() {
                prop_assert_eq!(rule.to_string().parse::<NetworkRule>(), Ok(rule));
            }
        }

        #[test]
        fn what_looks_like_an_entry_is_its_own_text(text in "(\\*\\.)?[a-z0-9.:/\\[\\]-]{0,30}(:[0-9]{1,5})?") {
            if let Ok(rule) = text.parse::<NetworkRule>() {
                prop_assert_eq!(rule.to_string().parse::<NetworkRule>(), Ok(rule));
            }
        }

        #[test]
        fn a_net_covers_what_shares_its_prefix(bits: u32, other: u32, prefix in 0_u8..=32) {
            let kept = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            let rule: NetworkRule = format!("{}/{prefix}", Ipv4Addr::from(bits & kept)).parse().unwrap();
            let address = IpAddr::from(Ipv4Addr::from(other));
            prop_assert_eq!(rule.covers(address, 1), other & kept == bits & kept);
        }
    }
}
