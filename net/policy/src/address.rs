//! Kinds of IP addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A kind of address, as presets distinguish them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// An address on the internet. This includes the ranges for documentation and benchmarks, since some hosts have mirrors there.
    Public,
    /// The host itself: 127.0.0.0/8, `::1`, 0.0.0.0/8 and `::`.
    Loopback,
    /// A private network: RFC 1918, 100.64.0.0/10, fc00::/7.
    Private,
    /// 169.254.0.0/16 and fe80::/10.
    LinkLocal,
    /// A metadata service of a cloud, which also serves credentials.
    Metadata,
    /// A multicast group.
    Multicast,
    /// Reserved or obsolete.
    Reserved,
}

/// Returns the kind of an address. An IPv6 address with an embedded IPv4 address has the kind of the IPv4 address.
pub fn range(address: IpAddr) -> Range {
    match inner(address) {
        IpAddr::V4(v4) => range_v4(v4),
        IpAddr::V6(v6) => range_v6(v6),
    }
}

/// Returns the IPv4 address that is embedded in an IPv6 address; without one, the address itself.
pub fn inner(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address.to_canonical() else { return address.to_canonical() };
    let v4 = |high: u16, low: u16| IpAddr::V4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match v6.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => v6.into(),
        // IPv4-compatible and IPv4-translated addresses, and prefixes of translators and tunnels: RFC 4291, 2765, 6052, 3056.
        [0, 0, 0, 0, 0, 0, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        // Teredo (RFC 4380): the last 32 bits are the client's address, inverted.
        [0x2001, 0, _, _, _, _, high, low] => v4(!high, !low),
        _ => v6.into(),
    }
}

const fn range_v4(address: Ipv4Addr) -> Range {
    match address.octets() {
        [0 | 127, ..] => Range::Loopback,
        // The address of most clouds, and further ones of Azure, Alibaba and Oracle.
        [169, 254, 169, 254] | [168, 63, 129, 16] | [100, 100, 100, 200] | [192, 0, 0, 192] => {
            Range::Metadata
        }
        [169, 254, ..] => Range::LinkLocal,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] => Range::Private,
        [224..=239, ..] => Range::Multicast,
        [240..=255, ..] => Range::Reserved,
        _ => Range::Public,
    }
}

const fn range_v6(address: Ipv6Addr) -> Range {
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Range::Loopback,
        // Amazon's, also for containers, and Google's.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254 | 0x23] | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254] => {
            Range::Metadata
        }
        // RFC 8215: for local translators.
        [0x64, 0xff9b, 1, ..] => Range::Private,
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => Range::Private,
        [0xfe80..=0xfebf, ..] => Range::LinkLocal,
        [0xff00..=0xffff, ..] => Range::Multicast,
        [0x2000..=0x3fff, ..] => Range::Public,
        _ => Range::Reserved,
    }
}

/// Prefix in which translators embed IPv4 addresses: 64:ff9b::/96 (RFC 6052).
pub(crate) const NAT64: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);

/// Returns all IPv4 ranges for which [`range`] differs from the addresses around them, as first and last address.
pub(crate) fn cuts_v4() -> impl Iterator<Item = (Ipv4Addr, Ipv4Addr)> {
    const NETS: [([u8; 4], u32); 15] = [
        ([0, 0, 0, 0], 8),
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([100, 100, 100, 200], 32),
        ([127, 0, 0, 0], 8),
        ([168, 63, 129, 16], 32),
        ([169, 254, 0, 0], 16),
        ([169, 254, 169, 254], 32),
        ([172, 16, 0, 0], 12),
        ([192, 0, 0, 192], 32),
        ([192, 168, 0, 0], 16),
        ([224, 0, 0, 0], 4),
        ([240, 0, 0, 0], 4),
        ([255, 255, 255, 255], 32),
        ([0, 0, 0, 0], 32),
    ];
    NETS.into_iter().map(|(net, prefix)| {
        let rest = u32::MAX.checked_shr(prefix).unwrap_or(0);
        let net = Ipv4Addr::from(net);
        (net, (u32::from(net) | rest).into())
    })
}

/// Returns the same for IPv6, without ranges within [`NAT64`] and other ranges that embed IPv4 addresses.
pub(crate) fn cuts_v6() -> impl Iterator<Item = (Ipv6Addr, Ipv6Addr)> {
    const NETS: [([u16; 8], u32); 11] = [
        ([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96),
        ([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48),
        ([0x2000, 0, 0, 0, 0, 0, 0, 0], 3),
        ([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
        ([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], 128),
        ([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23], 128),
        ([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128),
        ([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
        ([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
        ([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
        ([0, 0, 0, 0, 0, 0, 0, 1], 128),
    ];
    NETS.into_iter().map(|(net, prefix)| {
        let rest = u128::MAX.checked_shr(prefix).unwrap_or(0);
        let net = Ipv6Addr::from(net);
        (net, (u128::from(net) | rest).into())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_those_of_the_registries() {
        for (text, expected) in [
            ("8.8.8.8", Range::Public),
            ("192.0.2.1", Range::Public),
            ("198.51.100.1", Range::Public),
            ("203.0.113.1", Range::Public),
            ("198.18.0.1", Range::Public),
            ("198.19.255.255", Range::Public),
            ("2001:db8::1", Range::Public),
            ("2600::1", Range::Public),
            ("127.0.0.1", Range::Loopback),
            ("127.255.255.255", Range::Loopback),
            ("0.0.0.0", Range::Loopback),
            ("0.1.2.3", Range::Loopback),
            ("::", Range::Loopback),
            ("::1", Range::Loopback),
            ("10.0.0.0", Range::Private),
            ("172.16.0.1", Range::Private),
            ("172.31.255.255", Range::Private),
            ("172.32.0.0", Range::Public),
            ("192.168.1.1", Range::Private),
            ("100.64.0.0", Range::Private),
            ("100.127.255.255", Range::Private),
            ("100.128.0.0", Range::Public),
            ("fc00::1", Range::Private),
            ("fd12::1", Range::Private),
            ("fec0::1", Range::Private),
            ("64:ff9b:1::1", Range::Private),
            ("169.254.0.1", Range::LinkLocal),
            ("fe80::1", Range::LinkLocal),
            ("169.254.169.254", Range::Metadata),
            ("fd00:ec2::254", Range::Metadata),
            ("fd00:ec2::23", Range::Metadata),
            ("fd20:ce::254", Range::Metadata),
            ("168.63.129.16", Range::Metadata),
            ("100.100.100.200", Range::Metadata),
            ("::ffff:168.63.129.16", Range::Metadata),
            ("224.0.0.1", Range::Multicast),
            ("ff02::1", Range::Multicast),
            ("240.0.0.1", Range::Reserved),
            ("255.255.255.255", Range::Reserved),
            ("100::1", Range::Reserved),
            // Embedded IPv4 addresses.
            ("::ffff:127.0.0.1", Range::Loopback),
            ("::ffff:169.254.169.254", Range::Metadata),
            ("::ffff:8.8.8.8", Range::Public),
            ("::10.0.0.1", Range::Private),
            ("::ffff:0:10.0.0.1", Range::Private),
            ("64:ff9b::10.0.0.1", Range::Private),
            ("64:ff9b::8.8.8.8", Range::Public),
            ("2002:7f00:1::", Range::Loopback),
            ("2002:a9fe:a9fe::1", Range::Metadata),
            ("2001:0:1:2:3:4:80ff:fffe", Range::Loopback),
        ] {
            assert_eq!(range(text.parse().unwrap()), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_what_it_maps(bits: u32) {
            let v4 = Ipv4Addr::from(bits);
            prop_assert_eq!(range(v4.to_ipv6_mapped().into()), range(v4.into()));
            let [a, b, c, d] = v4.octets().map(u16::from);
            let through = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
            prop_assert_eq!(range(through.into()), range(v4.into()));
        }
    }
}
