//! The addresses of the shared network: an IPv4 subnet, an IPv6 subnet that is derived from the instance, and a VM's addresses by its number.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_net_policy::{Range, range};
use nexus_net_wire::{Cidr, Subnet};
use nexus_schema::id::InstanceId;

use crate::os::paths::ROUTES;

/// Allowed prefix lengths of a subnet: from 16 million VMs down to 5.
const PREFIXES: std::ops::RangeInclusive<u8> = 8..=29;
/// Range of the automatic choice, and its prefix: subnets for 4,093 VMs each in 10.128.0.0/9, which common container runtimes, clusters and
/// home routers do not use.
const CHOICES: (Ipv4Addr, u8, u8) = (Ipv4Addr::new(10, 128, 0, 0), 9, 20);
/// The host number of the gateway.
const GATEWAY: u32 = 1;

/// The addresses of one instance's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    v4: Cidr,
    v6: Cidr,
}

impl Addresses {
    /// Returns the addresses of an instance with this IPv4 subnet.
    pub(crate) fn new(v4: Cidr, instance: InstanceId) -> Self {
        // RFC 4193: fd, 40 random bits, and 16 bits for the subnet, which is 0.
        let [.., a, b, c, d, e] = instance.as_i64().to_be_bytes();
        let address = Ipv6Addr::from([0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        Self { v4, v6: Cidr::new(address.into(), 64).unwrap_or(v4) }
    }

    /// Returns the largest number that a VM can have.
    pub(crate) fn last(self) -> u32 {
        // The next one is the broadcast address.
        u32::MAX.checked_shr(self.v4.prefix().into()).unwrap_or(0).saturating_sub(1)
    }

    /// Returns the IPv4 address of a number.
    pub(crate) fn ipv4(self, number: u32) -> Ipv4Addr {
        match self.v4.address() {
            IpAddr::V4(first) => (u32::from(first) | number).into(),
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        }
    }

    /// Returns the IPv6 address of a number.
    pub(crate) fn ipv6(self, number: u32) -> Ipv6Addr {
        match self.v6.address() {
            IpAddr::V6(first) => (u128::from(first) | u128::from(number)).into(),
            IpAddr::V4(_) => Ipv6Addr::UNSPECIFIED,
        }
    }

    /// Returns the host's addresses, which are the VMs' gateway and name server.
    pub(crate) fn gateways(self) -> (Ipv4Addr, Ipv6Addr) {
        (self.ipv4(GATEWAY), self.ipv6(GATEWAY))
    }

    /// Returns the subnets in the form of `nexus-net`'s protocol.
    pub(crate) fn subnets(self) -> (Subnet<Ipv4Addr>, Subnet<Ipv6Addr>) {
        let (v4, v6) = self.gateways();
        (Subnet { subnet: self.v4, gateway: v4 }, Subnet { subnet: self.v6, gateway: v6 })
    }
}

/// Parses and checks a configured subnet.
pub(crate) fn parse_subnet(text: &str) -> Result<Cidr, String> {
    let subnet: Cidr = text.parse().map_err(|_| {
        format!("`{text}` is not a subnet such as 10.200.0.0/20, with no bit set after its prefix")
    })?;
    if subnet.address().is_ipv6() {
        return Err(format!(
            "`{text}` is an IPv6 subnet: give an IPv4 one; the IPv6 subnet is derived from this installation"
        ));
    }
    if [subnet.address(), subnet.last()].into_iter().any(|end| range(end) != Range::Private) {
        return Err(format!(
            "`{text}` is not in a private range: 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10"
        ));
    }
    if !PREFIXES.contains(&subnet.prefix()) {
        let (least, most) = (PREFIXES.start(), PREFIXES.end());
        return Err(format!(
            "the prefix length of `{text}` must be {least} to {most}, got {}",
            subnet.prefix()
        ));
    }
    Ok(subnet)
}

/// Returns whether two networks have an address in common.
fn overlap(one: Cidr, other: Cidr) -> bool {
    one.contains(other.address()) || other.contains(one.address())
}

/// Chooses a subnet that overlaps with none of the host's routes. Different instances start the search at different subnets.
pub(crate) fn choose(instance: InstanceId, routes: &[Cidr]) -> Option<Cidr> {
    let (range, from, to) = CHOICES;
    let count = 1_u32 << (to - from);
    let first = u32::try_from(instance.as_i64().rem_euclid(i64::from(count))).unwrap_or(0);
    let choices = (0..count).filter_map(|step| {
        let number = (first + step) % count;
        let address = u32::from(range) | number << (32 - to);
        Cidr::new(IpAddr::V4(address.into()), to)
    });
    choices.into_iter().find(|choice| !routes.iter().any(|route| overlap(*choice, *route)))
}

/// Returns the IPv4 networks that the host has a route to, without the default route.
pub(crate) fn host_routes() -> io::Result<Vec<Cidr>> {
    Ok(parse_routes(&std::fs::read_to_string(ROUTES)?))
}

/// Parses the kernel's list: one route a line, with destination and mask as hexadecimal numbers in this machine's byte order.
fn parse_routes(text: &str) -> Vec<Cidr> {
    let address = |field: Option<&str>| {
        let number = u32::from_str_radix(field?, 16).ok()?;
        Some(Ipv4Addr::from(number.to_ne_bytes()))
    };
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (to, mask) = (address(fields.get(1).copied())?, address(fields.get(7).copied())?);
        let prefix = u8::try_from(u32::from(mask).leading_ones()).ok()?;
        Cidr::new(to.into(), prefix)
    };
    text.lines().skip(1).filter_map(route).filter(|route| route.prefix() > 0).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instance(number: i64) -> InstanceId {
        InstanceId::from_i64(number).unwrap()
    }

    #[test]
    fn subnets_are_private_and_of_a_bearable_size() {
        for (text, words) in [
            ("10.0.0.1/24", "no bit set"),
            ("10.0.0.0", "not a subnet"),
            ("fd00::/64", "an IPv6 subnet"),
            ("8.8.8.0/24", "private range"),
            ("10.0.0.0/7", "private range"),
            ("172.16.0.0/11", "no bit set"),
            ("192.168.0.0/15", "private range"),
            ("10.0.0.0/30", "must be 8 to 29"),
        ] {
            let said = parse_subnet(text).unwrap_err();
            assert!(said.contains(words), "{text}: {said}");
        }
        for text in ["10.0.0.0/8", "192.168.7.0/29", "100.64.0.0/10", "172.31.0.0/16"] {
            assert_eq!(parse_subnet(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn addresses_follow_from_the_number() {
        let addresses = Addresses::new(parse_subnet("10.200.16.0/20").unwrap(), instance(0x12_3456_789a));
        assert_eq!(addresses.last(), 4094);
        assert_eq!(addresses.ipv4(2).to_string(), "10.200.16.2");
        assert_eq!(addresses.ipv4(4094).to_string(), "10.200.31.254");
        assert_eq!(addresses.ipv6(4094).to_string(), "fd12:3456:789a::ffe");
        let (v4, v6) = addresses.subnets();
        assert_eq!(
            (v4.subnet.to_string(), v4.gateway.to_string()),
            ("10.200.16.0/20".into(), "10.200.16.1".into())
        );
        assert_eq!(
            (v6.subnet.to_string(), v6.gateway.to_string()),
            ("fd12:3456:789a::/64".into(), "fd12:3456:789a::1".into())
        );
        assert_eq!(Addresses::new(parse_subnet("10.0.0.0/29").unwrap(), instance(1)).last(), 6);
    }

    #[test]
    fn routes_of_the_host_are_read_and_gone_around() {
        let text = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            junk\n";
        // The text is from a little-endian machine.
        if cfg!(target_endian = "little") {
            assert_eq!(parse_routes(text), ["192.168.0.0/24".parse().unwrap()]);
        }
        assert_eq!(choose(instance(1), &[]).unwrap().to_string(), "10.128.16.0/20");
        let taken = ["10.128.16.0/24", "10.128.32.0/19", "10.0.0.0/10"].map(|text| text.parse().unwrap());
        assert_eq!(choose(instance(1), &taken).unwrap().to_string(), "10.128.64.0/20");
        // A private network of all of 10.0.0.0/8 leaves no subnet.
        assert_eq!(choose(instance(1), &["10.0.0.0/8".parse().unwrap()]), None);
        assert_ne!(choose(instance(1), &[]), choose(instance(2), &[]));
    }

    proptest! {
        #[test]
        fn what_is_chosen_clashes_with_nothing_and_can_be_asked_for(
            instance in 1..i64::MAX,
            routes in proptest::collection::vec((any::<u32>(), 9..=32_u8), 0..20),
        ) {
            let routes: Vec<Cidr> = routes
                .into_iter()
                .filter_map(|(bits, prefix)| Cidr::new(IpAddr::V4((bits | 10 << 24).into()), prefix))
                .collect();
            if let Some(chosen) = choose(InstanceId::from_i64(instance).unwrap(), &routes) {
                prop_assert!(!routes.iter().any(|route| overlap(chosen, *route)));
                prop_assert_eq!(parse_subnet(&chosen.to_string()), Ok(chosen));
            }
        }
    }
}
