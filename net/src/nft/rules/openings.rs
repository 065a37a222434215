//! Rules for chains of the host's own firewall.

use nexus_schema::tools::network::FirewallHook;

use super::{ICMP, ICMPV6, TCP, UDP, field, meta_is, one};
use crate::nft::Family;
use crate::nft::expr::{Base, Expr, Meta, R0, accept, interface, is, meta};

/// Returns the rules that accept packets of VMs in a chain of the host's own firewall: forwarded packets from and to the bridge, and DNS and ICMP
/// to the gateway. The instance's own table filters them, too.
pub(crate) fn openings(family: Family, hook: FirewallHook, bridge: &str) -> Vec<Vec<Expr>> {
    let bridge = interface(bridge);
    let from_bridge = || [meta(Meta::IifName, R0), is(R0, &bridge)];
    let ask = |protocol| {
        rule![
            from_bridge(),
            meta_is(Meta::L4Proto, protocol),
            field(Base::Transport, 2, &53_u16.to_be_bytes()),
            one(accept())
        ]
    };
    let ping = |protocol| rule![from_bridge(), meta_is(Meta::L4Proto, protocol), one(accept())];
    match hook {
        FirewallHook::Forward => vec![
            rule![from_bridge(), one(accept())],
            rule![[meta(Meta::OifName, R0), is(R0, &bridge)], one(accept())],
        ],
        FirewallHook::Input => {
            let mut rules = vec![ask(&UDP), ask(&TCP)];
            if family != Family::Ip6 {
                rules.push(ping(&ICMP));
            }
            if family != Family::Ip {
                rules.push(ping(&ICMPV6));
            }
            rules
        }
    }
}
