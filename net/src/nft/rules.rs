//! Defines the two tables: sets, chains and rules, the same for all VMs of an instance. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_net_policy::Protocols;
use nexus_net_wire::Cidr;
use nexus_schema::network::RuleProtocol;

use super::expr::{
    Base, Ct, CtOriginal, Expr, Meta, R0, Reject, accept, discard, go, has_bits, has_no_bits, interface, is,
    is_in, is_not, is_not_in, meta, payload,
};
use super::sets::{ASK, ASKED, BEGIN, INET_SETS, LIMIT, OPEN, PIN4, PIN6};
use super::{
    BRIDGE_PREFIX, Chain, Family, Hook, HookAt, MARK_CUT, MARK_HOST, MARK_INDEX, MARK_TAG, Table, bits_of,
};
use crate::forwarding::Forwarding;

pub(crate) use openings::openings;

/// Prefixes of logged packets, which tell the reader why they were logged.
pub(crate) const LOG_REFUSED: &str = "nexus refused";
pub(crate) const LOG_SPOOFED: &str = "nexus spoofed";
pub(crate) const LOG_FULL: &str = "nexus full";
/// Number of bytes of a refused packet that are logged: enough for the headers, also of IPv6.
const LOG_LENGTH: u32 = 128;
/// Maximum number of refusals of a VM that are logged each second; the counters have all of them.
const LOG_RATE: u64 = 20;
const LOG_BURST: u32 = 60;
/// Maximum number of connections that a VM may open each second: the host uses the same connection table of the kernel.
const BEGIN_RATE: u64 = 500;
const BEGIN_BURST: u32 = 5000;
/// Maximum number of DNS queries over TCP each second: each uses a socket of this process for some seconds.
const ASK_RATE: u64 = 20;
const ASK_BURST: u32 = 40;
/// Timeout of the elements that limit rates, in milliseconds.
const LIMIT_MEMORY: u64 = 60_000;

/// Types of Ethernet frames.
const ETHER_IPV4: [u8; 2] = [0x08, 0x00];
const ETHER_ARP: [u8; 2] = [0x08, 0x06];
const ETHER_IPV6: [u8; 2] = [0x86, 0xdd];
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const IPV4: [u8; 1] = [2];
const IPV6: [u8; 1] = [10];
/// Numbers of protocols in IP headers.
const ICMP: [u8; 1] = [1];
const TCP: [u8; 1] = [6];
const UDP: [u8; 1] = [17];
const ICMPV6: [u8; 1] = [58];
/// Types of ICMP and ICMPv6.
const ECHO_REQUEST: [u8; 1] = [8];
const ECHO_REQUEST_V6: [u8; 1] = [128];
const ROUTER_ADVERTISEMENT: [u8; 1] = [134];
const NEIGHBOUR_SOLICITATION: [u8; 1] = [135];
const NEIGHBOUR_ADVERTISEMENT: [u8; 1] = [136];
const REDIRECT: [u8; 1] = [137];
const REDIRECT_V4: [u8; 1] = [5];
const MLD_REPORT: [u8; 1] = [143];
/// Bits of `ct state`.
const INVALID: u32 = 1;
const ESTABLISHED: u32 = 2;
const RELATED: u32 = 4;
const NEW: u32 = 8;
/// Bit of `ct status`: the destination was translated, as for forwarded ports.
const DESTINATION_NAT: u32 = 0x20;

/// Priorities of hooks: before connection tracking, of filters, and of source NAT.
const BRIDGE_FIRST: i32 = -300;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;

/// The parameters of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// The table's name, in both families.
    pub(crate) table: String,
    pub(crate) bridge: String,
    pub(crate) v4: (Cidr, Ipv4Addr),
    pub(crate) v6: Option<(Cidr, Ipv6Addr)>,
    /// The group of nfnetlink_log that refusals are sent to.
    pub(crate) log_group: u16,
    /// Maximum number of open connections of a VM.
    pub(crate) connections_max: u32,
    /// The families in which the host forwards packets of VMs only.
    pub(crate) forwarding: Forwarding,
    /// Whether packets to VMs above their limits are dropped here: the kernel cannot hold them back.
    pub(crate) drops_to_vms: bool,
}

/// Returns both tables.
pub(crate) fn tables(frame: &Frame) -> [Table; 2] {
    [bridge::bridge(frame), inet(frame)]
}

fn chain(name: &'static str, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name, hook: None, rules }
}

fn hook(name: &'static str, at: HookAt, priority: i32, rules: Vec<Vec<Expr>>) -> Chain {
    Chain { name, hook: Some(Hook { at, priority, is_nat: false }), rules }
}

/// Builds a rule of these parts.
macro_rules! rule {
    ($($part:expr),* $(,)?) => {{
        let mut rule: Vec<Expr> = Vec::new();
        $(rule.extend($part);)*
        rule
    }};
}

mod bridge;
mod openings;

fn one(expr: Expr) -> [Expr; 1] {
    [expr]
}

/// Compares a field of a header.
fn field(base: Base, offset: u32, value: &[u8]) -> [Expr; 2] {
    let length = u32::try_from(value.len()).unwrap_or_default();
    [payload(base, offset, length, R0), is(R0, value)]
}

fn meta_is(key: Meta, value: &[u8]) -> [Expr; 2] {
    [meta(key, R0), is(R0, value)]
}

fn ether(kind: [u8; 2]) -> [Expr; 2] {
    field(Base::Link, 12, &kind)
}

fn below(set: &'static str, per: Meta, (per_second, burst): (u64, u32)) -> [Expr; 2] {
    [meta(per, R0), Expr::LimitPer { set, from: R0, per_second, burst, timeout_ms: LIMIT_MEMORY }]
}

/// Goes to `full` if a VM has too many connections.
fn room(set: &'static str, most: u32) -> Vec<Expr> {
    let too_many = Expr::CountPer { set, from: R0, more_than: most };
    rule![[meta(Meta::Mark, R0), too_many], one(go("full"))]
}

fn log(group: u16, prefix: &'static str, per: Meta) -> Vec<Expr> {
    rule![below(LIMIT.name, per, (LOG_RATE, LOG_BURST)), one(Expr::Log { group, prefix, length: LOG_LENGTH })]
}

fn ct(key: Ct) -> [Expr; 1] {
    [Expr::Ct { key, to: R0 }]
}

fn was_cut() -> Vec<Expr> {
    rule![ct(Ct::Mark), has_bits(R0, MARK_CUT), one(go("cut"))]
}

/// Rules for packets that a VM sends as part of a connection: its own, one that a VM of its groups opened, or one of the host. Packets of other
/// connections are refused: of an earlier VM with the same address, and ICMP errors about connections of others.
fn known_from_vm() -> Vec<Vec<Expr>> {
    let is_part = || [meta(Meta::Mark, R0), Expr::Ct { key: Ct::Mark, to: R0 + 1 }, is_in("flows", R0)];
    // Most packets, so they are first. The mark of a cut connection is in no element.
    let mut rules =
        vec![rule![ct(Ct::State), has_bits(R0, ESTABLISHED), is_part(), one(accept())], was_cut()];
    // ICMP errors about a connection from or to one of the VM's addresses.
    for (key, set) in [
        (CtOriginal::SourceV4, "mine4"),
        (CtOriginal::DestinationV4, "mine4"),
        (CtOriginal::SourceV6, "mine6"),
        (CtOriginal::DestinationV6, "mine6"),
    ] {
        rules.push(rule![
            ct(Ct::State),
            has_bits(R0, RELATED),
            is_part(),
            [meta(Meta::Mark, R0), Expr::CtOriginal { key, to: R0 + 1 }, is_in(set, R0)],
            one(accept())
        ]);
    }
    rules.push(rule![ct(Ct::State), has_bits(R0, ESTABLISHED), one(go("cut"))]);
    rules.push(rule![ct(Ct::State), has_bits(R0, RELATED | INVALID), one(discard())]);
    rules
}

/// Rules for packets to a VM that belong to a connection that it opened.
fn known_to_vm() -> Vec<Vec<Expr>> {
    let to_its = |family: [u8; 1], offset, length, set| {
        rule![
            ct(Ct::State),
            has_bits(R0, ESTABLISHED | RELATED),
            meta_is(Meta::NfProto, &family),
            ct(Ct::Mark),
            [payload(Base::Network, offset, length, R0 + 1), is_in(set, R0)],
            one(accept())
        ]
    };
    vec![
        // Most packets, so they are first. The mark of a cut connection is in no element.
        to_its(IPV4, 16, 4, "mine4"),
        to_its(IPV6, 24, 16, "mine6"),
        was_cut(),
        rule![ct(Ct::State), has_bits(R0, RELATED | INVALID), one(discard())],
    ]
}

/// The rule for packets neither from nor to VMs, if the host forwards packets of VMs only: other machines cannot route through it. Packets from
/// the host's own virtual networks, such as those of containers, and to ports that it forwards, pass.
fn strangers(forwarding: Forwarding) -> Option<Vec<Expr>> {
    let family = match (forwarding.v4, forwarding.v6) {
        (true, true) => Vec::new(),
        (true, false) => meta_is(Meta::NfProto, &IPV4).to_vec(),
        (false, true) => meta_is(Meta::NfProto, &IPV6).to_vec(),
        (false, false) => return None,
    };
    Some(rule![
        family,
        [meta(Meta::Iif, R0), is_in("outer", R0)],
        // Packets to VMs of another instance: its own table decides.
        [meta(Meta::OifName, R0), is_not(R0, BRIDGE_PREFIX.as_bytes())],
        ct(Ct::State),
        has_no_bits(R0, ESTABLISHED | RELATED),
        ct(Ct::Status),
        has_no_bits(R0, DESTINATION_NAT),
        one(discard())
    ])
}

/// Rules that copy the VM's mark to the connection. Packets without a mark did not pass the guard.
fn identified() -> Vec<Vec<Expr>> {
    let tag = (!MARK_INDEX).to_ne_bytes().to_vec();
    vec![
        rule![
            one(meta(Meta::Mark, R0)),
            one(Expr::Bitwise { from: R0, to: R0, mask: tag, xor: vec![0; 4] }),
            one(is_not(R0, &MARK_TAG.to_ne_bytes())),
            one(discard())
        ],
        rule![one(meta(Meta::Mark, R0)), one(Expr::SetCtMark { from: R0 })],
    ]
}

/// Matches mark, destination and port (0 for protocols without ports) in a set.
fn place(is_v4: bool, has_ports: bool, set: &'static str) -> Vec<Expr> {
    let (family, offset, length) = if is_v4 { (IPV4, 16, 4) } else { (IPV6, 24, 16) };
    let port = R0 + 1 + length / 4;
    let ported = if has_ports { is_in("ported", R0) } else { is_not_in("ported", R0) };
    let load = if has_ports {
        payload(Base::Transport, 2, 2, port)
    } else {
        Expr::Load { to: port, value: vec![0; 2] }
    };
    rule![
        meta_is(Meta::NfProto, &family),
        [meta(Meta::L4Proto, R0), ported],
        [meta(Meta::Mark, R0), payload(Base::Network, offset, length, R0 + 1), load],
        one(is_in(set, R0)),
    ]
}

/// The same for what is open to one protocol only: its elements have bits of that protocol in their marks.
fn place_of(protocol: RuleProtocol, is_v4: bool, set: &'static str) -> Vec<Expr> {
    let (family, offset, length, icmp) = if is_v4 { (IPV4, 16, 4, ICMP) } else { (IPV6, 24, 16, ICMPV6) };
    let port = R0 + 1 + length / 4;
    let to_port = payload(Base::Transport, 2, 2, port);
    let (number, load) = match protocol {
        RuleProtocol::Tcp => (TCP, to_port),
        RuleProtocol::Udp => (UDP, to_port),
        RuleProtocol::Icmp => (icmp, Expr::Load { to: port, value: vec![0; 2] }),
    };
    let xor = bits_of(Protocols::Only(protocol)).to_ne_bytes().to_vec();
    rule![
        meta_is(Meta::NfProto, &family),
        meta_is(Meta::L4Proto, &number),
        one(meta(Meta::Mark, R0)),
        one(Expr::Bitwise { from: R0, to: R0, mask: vec![0xff; 4], xor }),
        [payload(Base::Network, offset, length, R0 + 1), load],
        one(is_in(set, R0)),
    ]
}

fn decide() -> Vec<Vec<Expr>> {
    let places = |v4: &'static str, v6: &'static str| {
        [(true, v4), (false, v6)].into_iter().flat_map(|(is_v4, set)| {
            let all = [true, false].map(|has_ports| rule![place(is_v4, has_ports, set), one(go("let"))]);
            let of_one =
                RuleProtocol::ALL.map(|protocol| rule![place_of(protocol, is_v4, set), one(go("let"))]);
            all.into_iter().chain(of_one)
        })
    };
    let mut rules: Vec<Vec<Expr>> = places("allow4", "allow6").collect();
    // QUIC is refused before pins are checked: it would hide which name of a shared address is used.
    rules.push(rule![
        meta_is(Meta::L4Proto, &UDP),
        field(Base::Transport, 2, &443_u16.to_be_bytes()),
        one(go("refuse"))
    ]);
    rules.extend(places(PIN4.name, PIN6.name));
    rules.push(rule![one(go("refuse"))]);
    rules
}

fn peer() -> Vec<Vec<Expr>> {
    let to = |family: &[u8], offset, length, set| {
        rule![
            meta_is(Meta::NfProto, family),
            [meta(Meta::Mark, R0), payload(Base::Network, offset, length, R0 + 1), is_in(set, R0)],
            one(go("let"))
        ]
    };
    vec![to(&IPV4, 16, 4, "peer4"), to(&IPV6, 24, 16, "peer6"), rule![one(go("refuse"))]]
}

/// Rules for packets to the host: VMs may send DNS queries and pings to the gateway.
fn to_host(frame: &Frame) -> Vec<Vec<Expr>> {
    let icmpv6 = |kind: [u8; 1]| rule![meta_is(Meta::L4Proto, &ICMPV6), field(Base::Transport, 0, &kind)];
    let mut rules = known_from_vm();
    for kind in [NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT] {
        rules.push(rule![meta_is(Meta::NfProto, &IPV6), icmpv6(kind), one(accept())]);
    }
    // Broadcasts and multicasts: guests send them all the time, and none is answered.
    rules.push(rule![[meta(Meta::PktType, R0), is_not(R0, &[0])], one(discard())]);
    rules.extend(identified());
    let gateways = [Some(IpAddr::V4(frame.v4.1)), frame.v6.map(|(_, gateway)| IpAddr::V6(gateway))];
    for gateway in gateways.into_iter().flatten() {
        let (to, icmp, echo) = match gateway {
            IpAddr::V4(v4) => (
                rule![meta_is(Meta::NfProto, &IPV4), field(Base::Network, 16, &v4.octets())],
                ICMP,
                ECHO_REQUEST,
            ),
            IpAddr::V6(v6) => (
                rule![meta_is(Meta::NfProto, &IPV6), field(Base::Network, 24, &v6.octets())],
                ICMPV6,
                ECHO_REQUEST_V6,
            ),
        };
        let ask = |protocol| {
            rule![
                to.clone(),
                meta_is(Meta::L4Proto, protocol),
                field(Base::Transport, 2, &53_u16.to_be_bytes())
            ]
        };
        let some = || below(BEGIN.name, Meta::Mark, (BEGIN_RATE, BEGIN_BURST));
        rules.push(rule![ask(&UDP), some(), one(go("answer"))]);
        rules.push(rule![ask(&TCP), below(ASK.name, Meta::Mark, (ASK_RATE, ASK_BURST)), one(go("answer"))]);
        let is_echo = rule![meta_is(Meta::L4Proto, &icmp), field(Base::Transport, 0, &echo)];
        rules.push(rule![to, is_echo, some(), one(go("answer"))]);
    }
    rules.push(rule![one(go("decide"))]);
    rules
}

fn masquerade(frame: &Frame, is_v4: bool) -> Vec<Expr> {
    let (family, offset, net) = match (is_v4, frame.v6) {
        (true, _) => (IPV4, 12, frame.v4.0),
        (false, Some((net, _))) => (IPV6, 8, net),
        (false, None) => return Vec::new(),
    };
    let (address, mask) = match net.address() {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(net.prefix())).unwrap_or(0);
            (v4.octets().to_vec(), mask.to_be_bytes().to_vec())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(net.prefix())).unwrap_or(0);
            (v6.octets().to_vec(), mask.to_be_bytes().to_vec())
        }
    };
    let length = u32::try_from(address.len()).unwrap_or_default();
    rule![
        meta_is(Meta::NfProto, &family),
        one(payload(Base::Network, offset, length, R0)),
        one(Expr::Bitwise { from: R0, to: R0, xor: vec![0; mask.len()], mask }),
        one(is(R0, &address)),
        [meta(Meta::OifName, R0), is_not(R0, &interface(&frame.bridge))],
        one(Expr::Masquerade)
    ]
}

fn inet(frame: &Frame) -> Table {
    let bridge = interface(&frame.bridge);
    let from_bridge = || [meta(Meta::IifName, R0), is(R0, &bridge)];
    let to_bridge = || [meta(Meta::OifName, R0), is(R0, &bridge)];
    let answered = |reset_first: Vec<Vec<Expr>>| {
        let mut rules = reset_first;
        rules.push(rule![meta_is(Meta::L4Proto, &TCP), one(Expr::Reject(Reject::TcpReset))]);
        rules.push(rule![one(Expr::Reject(Reject::Prohibited))]);
        rules
    };
    let counted = |set| [meta(Meta::Mark, R0), is_in(set, R0)];
    let refused = |prefix| {
        answered(vec![
            log(frame.log_group, prefix, Meta::Mark),
            // Only counts, by the element.
            rule![counted("refused"), one(Expr::Counter)],
        ])
    };
    let mut forward = vec![rule![from_bridge(), one(go("from_vm"))], rule![to_bridge(), one(go("to_vm"))]];
    forward.extend(strangers(frame.forwarding));
    let mut from_vm = known_from_vm();
    from_vm.extend(identified());
    from_vm.push(rule![to_bridge(), one(go("peer"))]);
    from_vm.push(rule![one(go("decide"))]);
    let mut to_vm = known_to_vm();
    to_vm.push(rule![one(Expr::Reject(Reject::Prohibited))]);
    let masquerades = [true, false].map(|is_v4| masquerade(frame, is_v4));
    Table {
        family: Family::Inet,
        name: frame.table.clone(),
        sets: INET_SETS.to_vec(),
        chains: vec![
            chain(
                "let",
                vec![
                    rule![below(BEGIN.name, Meta::Mark, (BEGIN_RATE, BEGIN_BURST)), one(go("begin"))],
                    // Dropped without an answer, so that TCP retries a little later.
                    rule![one(discard())],
                ],
            ),
            chain(
                "begin",
                vec![room(OPEN.name, frame.connections_max), rule![counted("allowed"), one(accept())]],
            ),
            chain("answer", vec![room(ASKED.name, frame.connections_max), rule![one(accept())]]),
            chain("refuse", refused(LOG_REFUSED)),
            chain("full", refused(LOG_FULL)),
            chain("cut", answered(Vec::new())),
            chain("decide", decide()),
            chain("peer", peer()),
            chain("from_vm", from_vm),
            chain("to_vm", to_vm),
            chain("to_host", to_host(frame)),
            hook("forward", HookAt::Forward, FILTER, forward),
            hook("input", HookAt::Input, FILTER, vec![rule![from_bridge(), one(go("to_host"))]]),
            // For IPv6 there is no kernel setting that disables redirects; see `sysctl` for the reason to drop them.
            hook(
                "output",
                HookAt::Output,
                FILTER,
                vec![
                    // Mark the connections that the host opens, too.
                    rule![
                        to_bridge(),
                        ct(Ct::State),
                        has_bits(R0, NEW),
                        [
                            Expr::Load { to: R0, value: MARK_HOST.to_ne_bytes().to_vec() },
                            Expr::SetCtMark { from: R0 }
                        ]
                    ],
                    rule![
                        to_bridge(),
                        meta_is(Meta::L4Proto, &ICMPV6),
                        field(Base::Transport, 0, &REDIRECT),
                        one(discard())
                    ],
                    rule![
                        to_bridge(),
                        meta_is(Meta::NfProto, &IPV4),
                        meta_is(Meta::L4Proto, &ICMP),
                        field(Base::Transport, 0, &REDIRECT_V4),
                        one(discard())
                    ],
                ],
            ),
            Chain {
                name: "postrouting",
                hook: Some(Hook { at: HookAt::Postrouting, priority: SOURCE_NAT, is_nat: true }),
                rules: masquerades.into_iter().filter(|rule| !rule.is_empty()).collect(),
            },
        ],
    }
}

#[cfg(test)]
mod tests;
