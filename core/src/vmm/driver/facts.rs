//! Static facts about each driver.

use std::path::Path;

use nexus_schema::tools::system::DoctorCheck;
use nexus_schema::{ByteSize, DriverKind};

use super::{Driver, firecracker, process, qemu};
use crate::vmm::version::Version;

/// All drivers. The only other lists of drivers are [`DriverKind`] and the values that callers may request.
pub(crate) static DRIVERS: [&Facts; 3] = [&firecracker::FACTS, &qemu::FACTS, &process::FACTS];

/// Facts about a driver.
#[derive(Debug)]
pub(crate) struct Facts {
    /// The driver.
    pub(crate) kind: DriverKind,
    /// Its capabilities.
    pub(crate) caps: Caps,
    /// Sockets and pipes that it makes in a VM's directory, in addition to those of all drivers.
    pub(crate) sockets: &'static [&'static str],
    /// Whether the VMM itself connects to sockets of the host for its guest. The system call filter lets no other do that.
    pub(crate) dials: bool,
    /// Its VMM; `None` for the process driver.
    pub(crate) vmm: Option<Vmm>,
    /// Constructor of the driver.
    pub(crate) make: fn() -> Box<dyn Driver>,
}

/// A VMM as an installed program.
#[derive(Debug)]
pub(crate) struct Vmm {
    /// Its programs: the VMM itself, then the programs that belong to it.
    pub(crate) programs: &'static [&'static str],
    /// Oldest supported version.
    pub(crate) min_version: Version,
    /// How to install it.
    pub(crate) fix: &'static str,
    /// Whether it requires KVM.
    pub(crate) needs_kvm: bool,
    /// Function that makes further checks of a binary.
    pub(crate) look_closer: fn(&Path) -> Closer,
}

impl Vmm {
    /// Returns the name of the VMM itself.
    pub(crate) fn program(&self) -> &'static str {
        self.programs[0]
    }
}

/// Further findings about a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Closer {
    /// Why it cannot run in a jail, and the fix.
    pub(crate) unjailable: Option<(String, String)>,
    /// A check that matters only if the daemon is root's.
    pub(crate) for_root: Option<DoctorCheck>,
}

/// Returns the facts about a driver.
pub(crate) const fn facts(kind: DriverKind) -> &'static Facts {
    match kind {
        DriverKind::Firecracker => &firecracker::FACTS,
        DriverKind::Qemu => &qemu::FACTS,
        DriverKind::Process => &process::FACTS,
    }
}

/// Returns the programs of the VMM that can be downloaded as an asset; the VMM itself comes first.
pub(crate) fn downloaded_programs() -> &'static [&'static str] {
    facts(DriverKind::OF_ASSETS).vmm.as_ref().map_or(&[], |vmm| vmm.programs)
}

/// Capabilities of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// Maximum number of virtual CPUs.
    pub max_vcpus: u32,
    /// Minimum memory.
    pub min_memory: ByteSize,
    /// Maximum number of drives.
    pub max_drives: u32,
    /// Whether the guest's processors can be paused and resumed.
    pub can_pause: bool,
    /// Whether the VMM pauses the guest when the host's disk is full. If not, the guest's writes fail.
    pub pauses_on_full_disk: bool,
    /// Whether its VMs can have a network interface.
    pub has_interface: bool,
    /// Whether the VMM takes a network device that is already open. Otherwise it opens the device itself, in the host's network namespace.
    pub takes_open_tap: bool,
    /// Whether the VMM itself holds the traffic of an interface to limits, which can change while it runs.
    pub limits_bandwidth: bool,
    /// Whether a running guest can be saved and go on later from what was saved. Its VM must have been made for that.
    pub checkpoint: bool,
    /// Whether guests with a vsock device can be saved. VMs are then made so that they can be, if nobody says otherwise, since it costs nothing. If
    /// not, only guests with [`Link::Serial`](crate::vmm::Link) can.
    pub saves_vsock: bool,
    /// Whether several VMs can go on from one saved guest.
    pub fork: bool,
    /// Whether connections to a guest survive that it is saved.
    pub keeps_connections: bool,
    /// Whether the VMM can ask a guest without an agent to shut down. If not, `ShimClient::shutdown` succeeds but usual guests
    /// do not react to it.
    pub can_ask_guest: bool,
}

/// Why a driver cannot run a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Too many or too few virtual CPUs.
    #[error("{asked} virtual CPUs: the driver supports 1 to {max}")]
    Vcpus {
        /// Requested number.
        asked: u32,
        /// Maximum.
        max: u32,
    },
    /// Too little memory, or not whole mebibytes.
    #[error("{asked} of memory: the driver supports whole mebibytes, at least {min}")]
    Memory {
        /// Requested size.
        asked: ByteSize,
        /// Minimum.
        min: ByteSize,
    },
    /// Too many drives.
    #[error("{asked} drives: the driver supports at most {max}")]
    Drives {
        /// Requested number.
        asked: u32,
        /// Maximum.
        max: u32,
    },
}

impl Caps {
    /// Returns the capabilities of a driver.
    pub const fn of(driver: DriverKind) -> Self {
        facts(driver).caps
    }

    /// Returns whether connections to a guest are lost when it is paused or saved, and have to be made anew.
    pub const fn cuts_connections(&self) -> bool {
        self.checkpoint && !self.keeps_connections
    }

    /// Checks whether the driver can run a VM of this size.
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
    fn what_cannot_be_saved_cannot_be_forked() {
        for Facts { caps, kind, .. } in DRIVERS {
            assert!(
                caps.checkpoint || !(caps.fork || caps.keeps_connections || caps.saves_vsock),
                "{kind:?}"
            );
            assert!(caps.can_pause || !caps.checkpoint, "{kind:?}");
        }
        assert!(Caps::of(DriverKind::Qemu).checkpoint && !Caps::of(DriverKind::Process).checkpoint);
        let firecracker = facts(DriverKind::Firecracker);
        assert!(firecracker.caps.checkpoint && firecracker.caps.cuts_connections());
        assert!(!Caps::of(DriverKind::Qemu).cuts_connections());
        assert!(!Caps::of(DriverKind::Process).cuts_connections());
        // Older ones do not go on with a saved guest's connections.
        assert_eq!(firecracker.vmm.as_ref().unwrap().min_version, Version(1, 16, 1));
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
