//! What this host can run, why, and what to do about the rest.
//!
//! [`examine`] looks (quickly, with deadlines), [`Host`] is what was found, and its methods only judge: what they say depends on
//! nothing else.

mod kvm;
mod probe;
mod walls;

use std::path::PathBuf;

use nexus_schema::tools::system::{Doctor, DoctorCheck, DoctorStatus};
use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{ByteSize, ErrorCode, ToolError};

use self::kvm::Kvm;
use self::probe::{Program, Version};
use self::walls::Walls;
use super::driver::Caps;
use super::plan::{Accel, DriverKind};
use crate::config::{Config, DriverSetting};
use crate::os::subids::Lacking;

/// The oldest QEMU that the driver is written for.
const QEMU_MIN: Version = Version(6, 0, 0);
/// The oldest Firecracker that the driver is written for.
const FIRECRACKER_MIN: Version = Version(1, 16, 1);
/// Less free memory than this runs no VM, in bytes.
const MEMORY_MIN: u64 = 256 << 20;

/// What a host has. Cheap to keep and to clone; it does not change by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    setting: DriverSetting,
    kvm: Kvm,
    force_kvm: bool,
    /// The walls that VMMs get here, and what lacks of them.
    walls: Walls,
    qemu: Program,
    firecracker: Program,
    jailer: Option<PathBuf>,
    /// The loader that a firecracker needs which is not linked statically: there is none in its jail.
    firecracker_loader: Option<PathBuf>,
    e2fsck: Option<PathBuf>,
    debugfs: Option<PathBuf>,
    mmdebstrap: Option<PathBuf>,
    ids: Result<(), Lacking>,
    memory_available: Option<u64>,
    is_root: bool,
}

/// How a VM is going to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The driver.
    pub driver: DriverKind,
    /// How instructions are executed.
    pub accel: Accel,
    /// The VMM's binary.
    pub binary: PathBuf,
    /// The VMM's version.
    pub version: String,
    /// What the driver can do.
    pub caps: Caps,
}

/// Looks at the host. Takes as long as the slowest VMM takes to say its version: tens of milliseconds, 5 s at most.
pub fn examine(config: &Config) -> Host {
    probe::examine(config)
}

impl Host {
    /// The driver for a VM, or what is missing and how to get it.
    pub fn choose(&self, choice: DriverChoice) -> Result<Choice, ToolError> {
        match (choice, &self.setting) {
            (DriverChoice::Auto, DriverSetting::Process { guest }) => Ok(Choice {
                driver: DriverKind::Process,
                accel: Accel::Tcg,
                binary: guest.clone(),
                version: "process".to_owned(),
                caps: Caps::of(DriverKind::Process),
            }),
            (DriverChoice::Auto, DriverSetting::Auto) => self.choose_auto(),
            (DriverChoice::Qemu, _) | (DriverChoice::Auto, DriverSetting::Qemu) => self.choose_qemu(),
            (DriverChoice::Firecracker, _) | (DriverChoice::Auto, DriverSetting::Firecracker) => {
                self.choose_firecracker()
            }
        }
    }

    fn choose_auto(&self) -> Result<Choice, ToolError> {
        self.choose_firecracker().or_else(|_| self.choose_qemu())
    }

    fn choose_firecracker(&self) -> Result<Choice, ToolError> {
        let unsuitable = |message: String, hint: String| {
            Err(ToolError::new(ErrorCode::HostUnsuitable, message).hint(hint))
        };
        if let Some((why, fix)) = self.kvm_complaint() {
            let message = format!("firecracker needs hardware KVM: {why}");
            return unsuitable(message, format!("use driver `qemu`, or: {fix}"));
        }
        if let Some((why, fix)) = self.unjailable() {
            return unsuitable(format!("firecracker {why}"), fix);
        }
        match self.firecracker.usable(FIRECRACKER_MIN) {
            Ok((binary, version)) => Ok(Choice {
                driver: DriverKind::Firecracker,
                accel: Accel::Kvm,
                binary: binary.clone(),
                version: version.to_string(),
                caps: Caps::of(DriverKind::Firecracker),
            }),
            Err(why) => unsuitable(format!("firecracker {why}"), FIRECRACKER_FIX.to_owned()),
        }
    }

    fn choose_qemu(&self) -> Result<Choice, ToolError> {
        match self.qemu.usable(QEMU_MIN) {
            Ok((binary, version)) => Ok(Choice {
                driver: DriverKind::Qemu,
                accel: if self.kvm_complaint().is_none() { Accel::Kvm } else { Accel::Tcg },
                binary: binary.clone(),
                version: version.to_string(),
                caps: Caps::of(DriverKind::Qemu),
            }),
            Err(why) => Err(ToolError::new(ErrorCode::HostUnsuitable, format!("qemu-system-x86_64 {why}"))
                .hint(format!("{QEMU_FIX}, then try again"))),
        }
    }

    /// What is wrong with KVM, unless the owner of the host insists on it and it opens.
    fn kvm_complaint(&self) -> Option<(String, String)> {
        let opens = !matches!(self.kvm, Kvm::NoDevice | Kvm::Denied | Kvm::Broken(_));
        self.kvm.complaint().filter(|_| !(self.force_kvm && opens))
    }

    /// Why this host's firecracker cannot run in a jail, and what to do about it.
    fn unjailable(&self) -> Option<(String, String)> {
        let loader = self.firecracker_loader.as_ref()?;
        if !self.is_root || !self.walls.jail || self.jailer.is_none() {
            return None;
        }
        let why = format!("needs the loader {}, which is not in its jail", loader.display());
        Some((why, "install firecracker's release binary, which is linked statically".to_owned()))
    }

    /// Everything that was found, what `auto` picks, and why.
    pub fn report(&self) -> Doctor {
        let choice = self.choose(DriverChoice::Auto);
        let why = match &choice {
            Ok(choice) => self.why(choice),
            Err(error) => error.message.clone(),
        };
        let picked = choice.as_ref().ok().map(|choice| choice.driver);
        Doctor {
            ok: choice.is_ok(),
            driver: picked.map(|driver| driver.as_str().to_owned()),
            accel: choice.as_ref().ok().map(|choice| choice.accel.as_str().to_owned()),
            why,
            checks: self.checks(picked),
        }
    }

    fn why(&self, choice: &Choice) -> String {
        let asked = match &self.setting {
            DriverSetting::Auto => "",
            DriverSetting::Qemu | DriverSetting::Firecracker | DriverSetting::Process { .. } => {
                "the configuration says so; "
            }
        };
        let why = match (choice.driver, choice.accel) {
            (DriverKind::Process, _) => "no VM at all: the guest runs as a process of this host".to_owned(),
            (DriverKind::Firecracker, _) => "hardware KVM works and firecracker is installed".to_owned(),
            (DriverKind::Qemu, Accel::Kvm) => match self.firecracker.usable(FIRECRACKER_MIN) {
                Err(why) => format!("hardware KVM works; firecracker {why}"),
                Ok(_) if self.kvm != Kvm::Usable => "the setting `force_kvm` says to use KVM".to_owned(),
                Ok(_) => "hardware KVM works".to_owned(),
            },
            (DriverKind::Qemu, Accel::Tcg) => match self.kvm_complaint() {
                Some((why, _)) => format!("software emulation, since {why}"),
                None => "software emulation".to_owned(),
            },
        };
        format!("{asked}{why}")
    }

    fn checks(&self, picked: Option<DriverKind>) -> Vec<DoctorCheck> {
        let mut checks = Vec::new();
        let mut check = |name: &str, status, found: String, fix: Option<String>| {
            checks.push(DoctorCheck { name: name.to_owned(), status, found, fix });
        };
        match (self.kvm.complaint(), self.kvm_complaint()) {
            (None, _) => check("kvm", DoctorStatus::Ok, "usable".to_owned(), None),
            (Some((why, _)), None) => check(
                "kvm",
                DoctorStatus::Warn,
                format!("used because the setting `force_kvm` says so, though {why}: guests may crash or hang"),
                Some("take `force_kvm` out of the configuration, unless your guests' kernels are made for this host".to_owned()),
            ),
            (Some(_), Some((why, fix))) => check("kvm", DoctorStatus::Warn, why, Some(fix)),
        }
        let programs = [
            ("qemu-system-x86_64", &self.qemu, QEMU_MIN, DriverKind::Qemu, QEMU_FIX),
            ("firecracker", &self.firecracker, FIRECRACKER_MIN, DriverKind::Firecracker, FIRECRACKER_FIX),
        ];
        for (name, program, min, kind, fix) in programs {
            match program.usable(min) {
                Ok(_) if kind == DriverKind::Firecracker && self.unjailable().is_some() => {
                    let (why, fix) = self.unjailable().unwrap_or_default();
                    check(name, DoctorStatus::Warn, why, Some(fix));
                }
                Ok((binary, version)) => {
                    check(name, DoctorStatus::Ok, format!("{version} at {}", binary.display()), None);
                }
                Err(why) => {
                    let status = match picked {
                        None if kind == DriverKind::Qemu => DoctorStatus::Fail,
                        _ => DoctorStatus::Note,
                    };
                    check(name, status, why, Some(fix.to_owned()));
                }
            }
        }
        if self.is_root && self.firecracker.usable(FIRECRACKER_MIN).is_ok() {
            match &self.jailer {
                Some(path) => check("jailer", DoctorStatus::Ok, path.display().to_string(), None),
                None => check(
                    "jailer",
                    DoctorStatus::Warn,
                    "not found: firecracker runs as root, kept in by its own seccomp filter only".to_owned(),
                    Some("put the jailer of firecracker's release beside it".to_owned()),
                ),
            }
        }
        let (status, found, fix) = self.walls.check(self.is_root);
        check("walls", status, found, fix);
        check("vsock", DoctorStatus::Ok, "built in: the host needs no vhost module".to_owned(), None);
        let tools = [
            ("e2fsck", &self.e2fsck, "images cannot be built", "apt-get install e2fsprogs"),
            ("debugfs", &self.debugfs, "ext4 files cannot be made images", "apt-get install e2fsprogs"),
            (
                "mmdebstrap",
                &self.mmdebstrap,
                "the debian image cannot be built",
                "apt-get install mmdebstrap",
            ),
        ];
        for (name, found, lack, fix) in tools {
            match found {
                Some(path) => check(name, DoctorStatus::Ok, path.display().to_string(), None),
                None => {
                    check(name, DoctorStatus::Warn, format!("not found: {lack}"), Some(fix.to_owned()));
                }
            }
        }
        match &self.ids {
            _ if self.is_root => {}
            Ok(()) => check("subids", DoctorStatus::Ok, "this user has ids for mmdebstrap".to_owned(), None),
            Err(lacking) => check(
                "subids",
                DoctorStatus::Warn,
                format!("{lacking}: the debian image cannot be built"),
                Some(lacking.fix()),
            ),
        }
        match self.memory_available {
            Some(bytes) if bytes >= MEMORY_MIN => {
                let found = format!("{} MiB available", ByteSize::bytes(bytes).as_mib());
                check("memory", DoctorStatus::Ok, found, None);
            }
            Some(bytes) => check(
                "memory",
                DoctorStatus::Warn,
                format!("{} MiB available", ByteSize::bytes(bytes).as_mib()),
                Some("stop what is not needed; a VM takes its memory plus about 60 MiB".to_owned()),
            ),
            None => check("memory", DoctorStatus::Note, "unknown".to_owned(), None),
        }
        checks
    }
}

const QEMU_FIX: &str = "apt-get install qemu-system-x86";
const FIRECRACKER_FIX: &str = "nexusctl asset download vmm (or put firecracker 1.16.1 or newer, its release binary, into a directory of programs, or name it in the configuration)";

#[cfg(test)]
mod tests;
