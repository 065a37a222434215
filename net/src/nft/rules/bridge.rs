//! The bridge table: who sends.

use super::{
    BRIDGE_FIRST, ETHER_ARP, ETHER_IPV4, ETHER_IPV6, FILTER, Frame, ICMPV6, LOG_SPOOFED, MLD_REPORT,
    NEIGHBOUR_SOLICITATION, REDIRECT, ROUTER_ADVERTISEMENT, chain, ether, field, hook, log, meta_is, one,
};
use crate::nft::expr::{Base, Expr, Meta, R0, accept, discard, go, is_in, jump, meta, payload};
use crate::nft::sets::BRIDGE_SETS;
use crate::nft::{Family, HookAt, MARK_INDEX, MARK_TAG, Table};

/// Builds the bridge table: senders must use the MAC and IP addresses of the VM behind the TAP.
pub(super) fn bridge(frame: &Frame) -> Table {
    // iif . ether saddr . an address: registers 8, 9-10, and from 11 on.
    let own =
        |source: Expr, set| [meta(Meta::Iif, R0), payload(Base::Link, 6, 6, R0 + 1), source, is_in(set, R0)];
    let icmpv6 = |kind: [u8; 1]| rule![meta_is(Meta::L4Proto, &ICMPV6), field(Base::Transport, 0, &kind)];
    let from_nobody = field(Base::Network, 8, &[0; 16]);
    let guard = vec![
        // ARP: the sender's hardware and protocol address, at offsets 8 and 14.
        rule![
            ether(ETHER_ARP),
            own(payload(Base::Network, 14, 4, R0 + 3), "own4"),
            [payload(Base::Network, 8, 6, R0 + 1), is_in("own4", R0)],
            one(go("pass"))
        ],
        rule![ether(ETHER_IPV6), icmpv6(ROUTER_ADVERTISEMENT), one(go("forged"))],
        rule![ether(ETHER_IPV6), icmpv6(REDIRECT), one(go("forged"))],
        rule![ether(ETHER_IPV6), own(payload(Base::Network, 8, 16, R0 + 3), "own6"), one(go("pass"))],
        // Duplicate address detection sends from the unspecified address.
        rule![ether(ETHER_IPV6), from_nobody.clone(), icmpv6(NEIGHBOUR_SOLICITATION), one(go("pass"))],
        rule![ether(ETHER_IPV6), from_nobody.clone(), icmpv6(MLD_REPORT), one(go("pass"))],
        // Other packets from the unspecified address (of a card that looks for its address) are useless, but not spoofed.
        rule![ether(ETHER_IPV6), from_nobody, one(discard())],
        rule![ether(ETHER_IPV4), field(Base::Network, 12, &[0; 4]), one(discard())],
        rule![ether(ETHER_ARP), field(Base::Network, 14, &[0; 4]), one(discard())],
        rule![ether(ETHER_IPV4), one(go("forged"))],
        rule![ether(ETHER_IPV6), one(go("forged"))],
        rule![ether(ETHER_ARP), one(go("forged"))],
        rule![one(discard())],
    ];
    let pass = vec![rule![
        one(meta(Meta::Iif, R0)),
        one(Expr::Bitwise {
            from: R0,
            to: R0,
            mask: MARK_INDEX.to_ne_bytes().to_vec(),
            xor: MARK_TAG.to_ne_bytes().to_vec(),
        }),
        one(Expr::SetMark { from: R0 }),
        one(accept()),
    ]];
    let forged = vec![
        log(frame.log_group, LOG_SPOOFED, Meta::Iif),
        rule![[meta(Meta::Iif, R0), is_in("spoofed", R0)], one(discard())],
        rule![one(discard())],
    ];
    let slow = |set, per| rule![[meta(per, R0), is_in(set, R0)], one(discard())];
    let first = vec![
        // The element matches only packets above its rate.
        slow("slow_tx", Meta::Iif),
        // Most packets, so they are before the guard. Only TAPs have elements in this set.
        rule![ether(ETHER_IPV4), own(payload(Base::Network, 12, 4, R0 + 3), "own4"), one(go("pass"))],
        rule![[meta(Meta::Iif, R0), is_in("taps", R0)], one(jump("guard"))],
    ];
    let mut chains = vec![
        chain("pass", pass),
        chain("forged", forged),
        chain("guard", guard),
        hook("prerouting", HookAt::Prerouting, BRIDGE_FIRST, first),
    ];
    // Otherwise its set is empty, and each packet to a VM would be looked up in vain.
    if frame.drops_to_vms {
        chains.push(hook("postrouting", HookAt::Postrouting, FILTER, vec![slow("slow_rx", Meta::Oif)]));
    }
    Table { family: Family::Bridge, name: frame.table.clone(), sets: BRIDGE_SETS.to_vec(), chains }
}
