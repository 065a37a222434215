//! Remembers whether the host forwarded packets before VMs needed it. If it did not, it forwards packets of VMs only, and forwarding is switched
//! off when the last instance is removed.
//!
//! This is stored in the alias of each instance's bridge, which exists as long as it matters.

use std::ops::BitOr;

use nexus_net_wire::InstanceId;

use crate::link::{Found, bridge_alias, bridge_name, sysctl};

/// The kernel's settings for IPv4 and IPv6.
const V4: &str = "ipv4/ip_forward";
const V6: &str = "ipv6/conf/all/forwarding";
/// Start of the suffix of an alias.
const WORD: &str = ":fwd";

/// The families in which the host did not forward before, and now forwards packets of VMs only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Forwarding {
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

impl BitOr for Forwarding {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self { v4: self.v4 | other.v4, v6: self.v6 | other.v6 }
    }
}

impl Forwarding {
    /// Adds the families in which forwarding is off now. Call it before forwarding is switched on.
    pub(crate) fn look(self, found: &Found, has_v6: bool) -> Self {
        let is_off = |name| sysctl::number(name) == Some(0);
        let now = Self { v4: is_off(V4), v6: has_v6 && is_off(V6) };
        self | now | Self::recorded(found)
    }

    /// Returns what the aliases of all instances' bridges say.
    pub(crate) fn recorded(found: &Found) -> Self {
        found.bridges().map(|bridge| Self::of_alias(&bridge.alias)).fold(Self::default(), Self::bitor)
    }

    fn of_alias(alias: &str) -> Self {
        let families = alias.split_once(WORD).map(|(_, families)| families).unwrap_or_default();
        Self { v4: families.contains('4'), v6: families.contains('6') }
    }

    /// Returns the alias of an instance's bridge.
    pub(crate) fn alias(self, id: InstanceId) -> String {
        let plain = bridge_alias(id);
        if self == Self::default() {
            return plain;
        }
        let families = [(self.v4, "4"), (self.v6, "6")].into_iter().filter(|(is_it, _)| *is_it);
        format!("{plain}{WORD}{}", families.map(|(_, family)| family).collect::<String>())
    }

    /// Switches forwarding off again after an instance was removed, unless another instance needs it, or the host has networks of
    /// its own (bridges, tunnels) that may need it.
    pub(crate) fn end(self, found: &Found, id: InstanceId) {
        let own = bridge_name(id);
        let user = found.links.iter().find(|link| {
            let is_ours = link.name == own || link.alias.starts_with(&bridge_alias(id));
            link.is_of_others && !is_ours
        });
        if let Some(user) = user {
            tracing::info!(interface = user.name, "forwarding stays as it is: the host has other networks");
            return;
        }
        let off = [(self.v4, V4), (self.v6, V6)].into_iter().filter(|(was_off, _)| *was_off);
        let off: Vec<_> = off.map(|(_, name)| (name.to_owned(), "0")).collect();
        if let Err(error) = sysctl::apply(&off) {
            tracing::warn!(%error, "forwarding stays on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_says_what_was_off() {
        let id = InstanceId::new(0x0a1b_2c3d).unwrap();
        for (v4, v6, alias) in [
            (false, false, "nexus:0a1b2c3d"),
            (true, false, "nexus:0a1b2c3d:fwd4"),
            (false, true, "nexus:0a1b2c3d:fwd6"),
            (true, true, "nexus:0a1b2c3d:fwd46"),
        ] {
            let forwarding = Forwarding { v4, v6 };
            assert_eq!(forwarding.alias(id), alias);
            assert_eq!(Forwarding::of_alias(alias), forwarding);
        }
        assert_eq!(Forwarding::of_alias("nexus:0a1b2c3d:aaaaaaaaaaabe"), Forwarding::default());
    }
}
