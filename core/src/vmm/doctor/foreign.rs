//! VMs of the other architecture, which QEMU emulates. Experimental.

use nexus_schema::tools::system::DoctorStatus;
use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{Arch, DriverKind, ErrorCode, ToolError};

use super::probe::Program;
use super::{Choice, Complaint, Host};
use crate::config::DriverSetting;
use crate::vmm::driver::{Caps, facts};
use crate::vmm::plan::Accel;
use crate::vmm::version::Version;

/// What to do if there is no guest binary for the other architecture.
pub(crate) const GUEST_FIX: &str = "build one in a clone of Nexus with .ci/cross, and name it in the configuration: foreign_guest_binary = \"/path/to/it\"";

/// What runs VMs of the other architecture, as far as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Foreign {
    /// Its QEMU.
    pub(super) program: Program,
    /// Whether there is a guest binary for it.
    pub(super) has_guest: bool,
}

impl Foreign {
    /// Returns the program and its version. Fails if a VM cannot be run.
    fn usable(&self) -> Result<(&std::path::PathBuf, Version), Complaint> {
        let min = facts(DriverKind::Qemu).vmm.as_ref().map_or(Version(0, 0, 0), |vmm| vmm.min_version);
        let found = self.program.usable(min).map_err(|why| Complaint {
            why: format!("{} {why}", Arch::FOREIGN.qemu()),
            fix: format!("apt-get install {}", Arch::FOREIGN.qemu_package()),
        })?;
        match self.has_guest {
            true => Ok(found),
            false => Err(Complaint {
                why: format!("there is no guest binary for {}", Arch::FOREIGN),
                fix: GUEST_FIX.to_owned(),
            }),
        }
    }

    /// Returns the check of the report. What is missing is no fault of the host.
    pub(super) fn check(&self) -> (DoctorStatus, String, Option<String>) {
        let foreign = Arch::FOREIGN;
        match self.usable() {
            Ok((binary, version)) => {
                let found = format!(
                    "{version} at {}: VMs of {foreign} are emulated (experimental)",
                    binary.display()
                );
                (DoctorStatus::Ok, found, None)
            }
            Err(Complaint { why, fix }) => {
                let found = format!("VMs of {foreign} (experimental) cannot be run: {why}");
                (DoctorStatus::Note, found, Some(fix))
            }
        }
    }
}

impl Host {
    /// Returns the driver for a VM of the other architecture. Fails with what is missing and how to get it.
    pub(crate) fn choose_foreign(
        &self,
        choice: DriverChoice,
        checkpoints: bool,
    ) -> Result<Choice, ToolError> {
        let foreign = Arch::FOREIGN;
        let unsuitable = |message: String, hint: String| {
            Err(ToolError::new(ErrorCode::HostUnsuitable, message).hint(hint))
        };
        let set = match self.setting {
            DriverSetting::Auto => None,
            DriverSetting::Vmm(kind) => Some(kind),
            DriverSetting::Process { .. } => Some(DriverKind::Process),
        };
        if let Some(other) = choice.kind().or(set).filter(|kind| *kind != DriverKind::Qemu) {
            let message = format!("driver {other} runs no VMs of {foreign} on this host");
            return unsuitable(message, "use driver qemu for this VM".to_owned());
        }
        if checkpoints {
            let message = format!("checkpoints of VMs of {foreign} cannot be taken on this host");
            return unsuitable(message, "leave checkpoints out, or pass checkpoints: false".to_owned());
        }
        match self.foreign.usable() {
            Ok((binary, version)) => Ok(Choice {
                driver: DriverKind::Qemu,
                arch: foreign,
                accel: Accel::Tcg,
                binary: binary.clone(),
                version: version.to_string(),
                caps: Caps {
                    checkpoint: false,
                    fork: false,
                    keeps_connections: false,
                    ..Caps::of(DriverKind::Qemu)
                },
            }),
            Err(Complaint { why, fix }) => {
                unsuitable(format!("VMs of {foreign} (experimental) cannot be run: {why}"), fix)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    fn with(program: Program, has_guest: bool) -> Host {
        Host { foreign: Foreign { program, has_guest }, ..host() }
    }

    fn found() -> Program {
        Program::Found { binary: "/bin/other".into(), version: Version(7, 2, 22) }
    }

    #[test]
    fn what_keeps_vms_of_the_other_architecture_from_running_is_said_with_the_fix() {
        for (host, lack, fix) in [
            (with(Program::Missing, true), "is not installed", "apt-get install qemu-system-"),
            (with(found(), false), "there is no guest binary", "foreign_guest_binary"),
        ] {
            let refused = host.choose_foreign(DriverChoice::Auto, false).unwrap_err();
            assert_eq!(refused.code, ErrorCode::HostUnsuitable);
            assert!(refused.message.contains(lack), "{refused}");
            assert!(refused.hint.unwrap().contains(fix));
            let report = host.report();
            assert!(report.ok, "VMs of this host run all the same");
            let check = report.checks.into_iter().find(|check| check.name == Arch::FOREIGN.qemu()).unwrap();
            assert_eq!(check.status, DoctorStatus::Note);
            assert!(check.found.contains("(experimental)") && check.found.contains(lack), "{}", check.found);
            assert!(check.fix.unwrap().contains(fix));
        }
    }

    #[test]
    fn vms_of_the_other_architecture_are_emulated_by_qemu() {
        let host = with(found(), true);
        for choice in [DriverChoice::Auto, DriverChoice::Qemu] {
            let chosen = host.choose_foreign(choice, false).unwrap();
            assert_eq!((chosen.driver, chosen.arch), (DriverKind::Qemu, Arch::FOREIGN));
            assert_eq!((chosen.accel, chosen.binary), (Accel::Tcg, "/bin/other".into()));
            assert!(!chosen.caps.checkpoint);
        }
        assert!(
            host.choose_foreign(DriverChoice::Firecracker, false)
                .unwrap_err()
                .message
                .contains("firecracker")
        );
        let set = Host { setting: DriverSetting::Vmm(DriverKind::Firecracker), ..host.clone() };
        assert!(set.choose_foreign(DriverChoice::Auto, false).is_err());
        assert!(set.choose_foreign(DriverChoice::Qemu, false).is_ok(), "the VM's own choice wins");
        let refused = host.choose_foreign(DriverChoice::Auto, true).unwrap_err();
        assert!(refused.message.starts_with("checkpoints of VMs"), "{refused}");
        let check =
            host.report().checks.into_iter().find(|check| check.name == Arch::FOREIGN.qemu()).unwrap();
        assert_eq!(check.status, DoctorStatus::Ok);
        assert!(check.found.ends_with("are emulated (experimental)"), "{}", check.found);
    }
}
