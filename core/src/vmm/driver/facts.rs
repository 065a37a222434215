//! What Nexus knows of each driver before it runs a VMM.

use std::path::Path;

use nexus_schema::tools::system::DoctorCheck;
use nexus_schema::{ByteSize, DriverKind};

use super::{Driver, firecracker, process, qemu};
use crate::vmm::version::Version;

/// All drivers. What else knows one by name is [`DriverKind`] and what a caller may ask for.
pub(crate) static DRIVERS: [&Facts; 3] = [&firecracker::FACTS, &qemu::FACTS, &process::FACTS];

/// What is known of a driver.
#[derive(Debug)]
pub(crate) struct Facts {
    /// Which one it is.
    pub(crate) kind: DriverKind,
    /// What it can do.
    pub(crate) caps: Caps,
    /// The sockets and pipes that it makes in a VM's directory, beside those of all drivers.
    pub(crate) sockets: &'static [&'static str],
    /// Its VMM; the process driver has none.
    pub(crate) vmm: Option<Vmm>,
    /// Makes the driver.
    pub(crate) make: fn() -> Box<dyn Driver>,
}

/// A VMM, as a program of a host.
#[derive(Debug)]
pub(crate) struct Vmm {
    /// Its programs: the VMM itself, then those that it comes with.
    pub(crate) programs: &'static [&'static str],
    /// The oldest version that the driver is written for.
    pub(crate) min_version: Version,
    /// How to install it.
    pub(crate) fix: &'static str,
    /// Whether it runs under KVM only.
    pub(crate) needs_kvm: bool,
    /// Looks at what else matters for a binary of it.
    pub(crate) look_closer: fn(&Path) -> Closer,
}

impl Vmm {
    /// The name of the VMM itself.
    pub(crate) fn program(&self) -> &'static str {
        self.programs[0]
    }
}

/// What else was found of a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Closer {
    /// Why it cannot run in a jail, and what to do about it.
    pub(crate) unjailable: Option<(String, String)>,
    /// What a daemon of root should know.
    pub(crate) for_root: Option<DoctorCheck>,
}

/// The facts of a driver.
pub(crate) const fn facts(kind: DriverKind) -> &'static Facts {
    match kind {
        DriverKind::Firecracker => &firecracker::FACTS,
        DriverKind::Qemu => &qemu::FACTS,
        DriverKind::Process => &process::FACTS,
    }
}

/// The programs of the VMM that is downloaded as an asset, the VMM itself first.
pub(crate) fn downloaded_programs() -> &'static [&'static str] {
    facts(DriverKind::OF_ASSETS).vmm.as_ref().map_or(&[], |vmm| vmm.programs)
}

/// What a driver can do; checked when a VM's spec is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// The most virtual CPUs.
    pub max_vcpus: u32,
    /// The least memory.
    pub min_memory: ByteSize,
    /// The most drives.
    pub max_drives: u32,
    /// Whether the guest's processors can be stopped and let go on.
    pub can_pause: bool,
    /// Whether its VMs can have a network interface.
    pub has_interface: bool,
    /// Whether the VMM can ask a guest to shut down that has no agent. Where it cannot, `ShimClient::shutdown` is accepted but
    /// usual guests do not react to it.
    pub can_ask_guest: bool,
}

/// Why a driver cannot run a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Too many or too few virtual CPUs.
    #[error("{asked} virtual CPUs: the driver takes 1 to {max}")]
    Vcpus {
        /// What was asked for.
        asked: u32,
        /// What there can be.
        max: u32,
    },
    /// Too little memory, or not whole mebibytes.
    #[error("{asked} of memory: the driver takes whole mebibytes, at least {min}")]
    Memory {
        /// What was asked for.
        asked: ByteSize,
        /// What there must be.
        min: ByteSize,
    },
    /// Too many drives.
    #[error("{asked} drives: the driver takes at most {max}")]
    Drives {
        /// What was asked for.
        asked: u32,
        /// What there can be.
        max: u32,
    },
}

impl Caps {
    /// What a driver can do.
    pub const fn of(driver: DriverKind) -> Self {
        facts(driver).caps
    }

    /// Whether the driver can run a VM of this size.
    pub fn check(&self, vcpus: u32, memory: ByteSize, drives: u32) -> Result<(), Unsupported> {
        if vcpus == 0 || vcpus > self.max_vcpus {
            return Err(Unsupported::Vcpus { asked: vcpus, max: self.max_vcpus });
        }
        if memory < self.min_memory || ByteSize::mib(memory.as_mib()) != memory {
            return Err(Unsupported::Memory { asked: memory, min: self.min_memory });
        }
        if drives > self.max_drives {
            return Err(Unsupported::Drives { asked: drives, max: self.max_drives });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_driver_is_listed_with_its_own_facts() {
        let listed = DRIVERS.map(|facts| facts.kind);
        assert!(listed.starts_with(&DriverKind::VMMS), "{listed:?}");
        for driver in DRIVERS {
            assert!(std::ptr::eq(facts(driver.kind), driver));
            assert_eq!(driver.vmm.is_some(), DriverKind::VMMS.contains(&driver.kind));
        }
        assert!(!downloaded_programs().is_empty());
    }

    #[test]
    fn sizes_are_checked_against_caps() {
        for driver in DRIVERS {
            let caps = Caps::of(driver.kind);
            assert_eq!(caps.check(1, ByteSize::mib(512), 1), Ok(()));
            assert!(matches!(caps.check(0, ByteSize::mib(512), 1), Err(Unsupported::Vcpus { .. })));
            assert!(matches!(caps.check(33, ByteSize::mib(512), 1), Err(Unsupported::Vcpus { .. })));
            assert!(matches!(
                caps.check(1, ByteSize::bytes((512 << 20) + 1), 1),
                Err(Unsupported::Memory { .. })
            ));
            assert!(matches!(caps.check(1, ByteSize::mib(1), 1), Err(Unsupported::Memory { .. })));
            assert!(matches!(caps.check(1, ByteSize::mib(512), 100), Err(Unsupported::Drives { .. })));
        }
    }
}
