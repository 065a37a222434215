//! Where the network of VMs with a network card is.

use rustix::thread::{CapabilitySet, capabilities};

/// The network namespace that has the bridge and the TAPs of VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// The host's: this process may change it.
    Host,
    /// One that `nexus-net` makes: this process is an ordinary user's.
    Own,
}

impl Site {
    /// Returns the one of this process.
    pub(crate) fn of_this_process() -> Self {
        if may_change_network() || rustix::process::geteuid().is_root() { Self::Host } else { Self::Own }
    }

    /// Returns the user that a TAP must belong to so that the user `uid` of this host can have it. In a namespace of its own, the daemon's user
    /// is root, and there is no other.
    pub(crate) const fn owner(self, uid: u32) -> u32 {
        match self {
            Self::Host => uid,
            Self::Own => 0,
        }
    }
}

/// Returns whether this process has the capability to change the host's network.
pub(crate) fn may_change_network() -> bool {
    capabilities(None).is_ok_and(|has| has.effective.contains(CapabilitySet::NET_ADMIN))
}
