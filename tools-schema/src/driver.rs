//! The list of all drivers that can run a VM.

use serde::{Deserialize, Serialize};

/// The VMM that runs a VM.
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
    /// The drivers of real VMs, in the order in which `auto` tries them.
    pub const VMMS: [Self; 2] = [Self::Firecracker, Self::Qemu];
    /// The driver whose programs are downloaded as assets of the kind `vmm`; the programs of the others are installed on the host.
    pub const OF_ASSETS: Self = Self::Firecracker;

    /// Returns its name on the wire, in the store and in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::Process => "process",
        }
    }

    /// Returns the driver with a name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Qemu, Self::Firecracker, Self::Process].into_iter().find(|kind| kind.as_str() == name)
    }

    /// Returns the VMM with a name.
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
        assert_eq!(DriverKind::named("process"), Some(DriverKind::Process));
        assert_eq!(DriverKind::named("x"), None);
    }
}
