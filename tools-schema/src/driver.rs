//! The drivers: the one list of what can run a VM.

use serde::{Deserialize, Serialize};

/// Which VMM runs a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriverKind {
    /// QEMU's microvm machine.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// `nexus-guest --unix` as an ordinary process; for tests and benchmarks without a VM.
    Process,
}

impl DriverKind {
    /// Those that run real VMs, in the order in which `auto` tries them.
    pub const VMMS: [Self; 2] = [Self::Firecracker, Self::Qemu];
    /// The one whose programs are downloaded as assets of the kind `vmm`; those of the others are the host's.
    pub const OF_ASSETS: Self = Self::Firecracker;

    /// The word for it, on the wire, in the store and in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::Process => "process",
        }
    }

    /// The VMM of a name.
    pub fn vmm(name: &str) -> Option<Self> {
        Self::VMMS.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl std::fmt::Display for DriverKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmms_are_found_by_their_names() {
        for kind in DriverKind::VMMS {
            assert_eq!(DriverKind::vmm(kind.as_str()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert_eq!(DriverKind::vmm("process"), None);
    }
}
