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
use nexus_schema::{ByteSize, DriverKind, ErrorCode, ToolError};

use self::kvm::Kvm;
use self::probe::Program;
use self::walls::Walls;
use super::driver::{Caps, Closer, Vmm, facts};
use super::plan::Accel;
use super::version::Version;
use crate::config::{Config, DriverSetting};
use crate::os::subids::Lacking;

/// Less free memory than this runs no VM, in bytes.
const MEMORY_MIN: u64 = 256 << 20;

/// What a host has. Cheap to keep and to clone; it does not change by itself.
#[derive(Debug, Clone)]
pub struct Host {
    setting: DriverSetting,
    kvm: Kvm,
    force_kvm: bool,
    /// The walls that VMMs get here, and what lacks of them.
    walls: Walls,
    /// Those of [`DRIVERS`] that have one, in that order.
    vmms: Vec<FoundVmm>,
    e2fsck: Option<PathBuf>,
    debugfs: Option<PathBuf>,
    mmdebstrap: Option<PathBuf>,
    ids: Result<(), Lacking>,
    memory_available: Option<u64>,
    is_root: bool,
    /// Whether VMs can have a network interface.
    nat: Result<(), Complaint>,
}

/// A VMM, and what was found of it.
#[derive(Debug, Clone)]
struct FoundVmm {
    kind: DriverKind,
    vmm: &'static Vmm,
    program: Program,
    closer: Closer,
}

/// Why something cannot be used, of a VMM to be read after its name, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Complaint {
    why: String,
    fix: String,
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
        let wanted = match (choice.kind(), &self.setting) {
            (Some(kind), _) => kind,
            (None, DriverSetting::Vmm(kind)) => *kind,
            (None, DriverSetting::Auto) => return self.choose_auto(),
            (None, DriverSetting::Process { guest }) => {
                return Ok(Choice {
                    driver: DriverKind::Process,
                    accel: Accel::Tcg,
                    binary: guest.clone(),
                    version: "process".to_owned(),
                    caps: Caps::of(DriverKind::Process),
                });
            }
        };
        match self.vmms.iter().find(|found| found.kind == wanted) {
            Some(found) => self.use_vmm(found),
            None => Err(ToolError::internal(format!("the driver {wanted} was not looked for"))),
        }
    }

    /// The first VMM that can be used; if there is none, what the last one lacks.
    fn choose_auto(&self) -> Result<Choice, ToolError> {
        let none = || Err(ToolError::internal("no driver was looked for"));
        self.vmms.iter().fold(none(), |chosen, found| chosen.or_else(|_| self.use_vmm(found)))
    }

    /// Refuses network interfaces where VMs cannot have them.
    pub(crate) fn check_nat(&self) -> Result<(), ToolError> {
        self.nat.as_ref().copied().map_err(|Complaint { why, fix }| {
            let what = format!("VMs cannot have network nat on this host: {why}");
            ToolError::new(ErrorCode::HostUnsuitable, what).hint(format!("{fix}, or use network proxy"))
        })
    }

    fn use_vmm(&self, found: &FoundVmm) -> Result<Choice, ToolError> {
        let program = found.vmm.program();
        let unsuitable = |message: String, hint: String| {
            Err(ToolError::new(ErrorCode::HostUnsuitable, message).hint(hint))
        };
        let no_kvm = self.kvm_complaint();
        if found.vmm.needs_kvm
            && let Some((why, fix)) = &no_kvm
        {
            let message = format!("{program} needs hardware KVM: {why}");
            return unsuitable(message, format!("use driver `qemu`, or: {fix}"));
        }
        match self.usable(found) {
            Ok((binary, version)) => Ok(Choice {
                driver: found.kind,
                accel: if no_kvm.is_none() { Accel::Kvm } else { Accel::Tcg },
                binary: binary.clone(),
                version: version.to_string(),
                caps: Caps::of(found.kind),
            }),
            Err(Complaint { why, fix }) => unsuitable(format!("{program} {why}"), fix),
        }
    }

    /// A VMM's program, if it can be used as far as it is the program that matters.
    fn usable<'a>(&self, found: &'a FoundVmm) -> Result<(&'a PathBuf, Version), Complaint> {
        let usable = found.program.usable(found.vmm.min_version);
        match self.unjailable(found) {
            Some((why, fix)) if usable.is_ok() => Err(Complaint { why, fix }),
            _ => usable.map_err(|why| Complaint { why, fix: format!("{}, then try again", found.vmm.fix) }),
        }
    }

    /// What is wrong with KVM, unless the owner of the host insists on it and it opens.
    fn kvm_complaint(&self) -> Option<(String, String)> {
        let opens = !matches!(self.kvm, Kvm::NoDevice | Kvm::Denied | Kvm::Broken(_));
        self.kvm.complaint().filter(|_| !(self.force_kvm && opens))
    }

    /// Why a VMM cannot run in the jail that it would get here, and what to do about it.
    fn unjailable(&self, found: &FoundVmm) -> Option<(String, String)> {
        found.closer.unjailable.clone().filter(|_| self.is_root && self.walls.jail)
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
            DriverSetting::Vmm(_) | DriverSetting::Process { .. } => "the configuration says so; ",
        };
        let vmm = facts(choice.driver).vmm.as_ref();
        let why = match (vmm, choice.accel, self.kvm_complaint()) {
            (None, _, _) => "no VM at all: the guest runs as a process of this host".to_owned(),
            (Some(_), Accel::Tcg, Some((why, _))) => format!("software emulation, since {why}"),
            (Some(_), Accel::Tcg, None) => "software emulation".to_owned(),
            (Some(vmm), Accel::Kvm, _) if vmm.needs_kvm => {
                format!("hardware KVM works and {} is installed", vmm.program())
            }
            (Some(_), Accel::Kvm, _) => self.why_not_earlier(choice.driver),
        };
        format!("{asked}{why}")
    }

    /// Why a VMM under KVM was picked, and none that is preferred to it.
    fn why_not_earlier(&self, picked: DriverKind) -> String {
        let earlier = self.vmms.iter().take_while(|found| found.kind != picked);
        let lacks: Vec<String> = earlier
            .filter_map(|found| Some(format!("; {} {}", found.vmm.program(), self.usable(found).err()?.why)))
            .collect();
        match lacks.is_empty() {
            true if self.kvm != Kvm::Usable => "the setting `force_kvm` says to use KVM".to_owned(),
            _ => format!("hardware KVM works{}", lacks.concat()),
        }
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
        for found in &self.vmms {
            let vmm = found.vmm;
            let is_installed = found.program.usable(vmm.min_version).is_ok();
            match self.usable(found) {
                Ok((binary, version)) => {
                    let found = format!("{version} at {}", binary.display());
                    check(vmm.program(), DoctorStatus::Ok, found, None);
                }
                Err(Complaint { why, fix }) if is_installed => {
                    check(vmm.program(), DoctorStatus::Warn, why, Some(fix));
                }
                Err(Complaint { why, .. }) => {
                    let is_needed = picked.is_none() && !vmm.needs_kvm;
                    let status = if is_needed { DoctorStatus::Fail } else { DoctorStatus::Note };
                    check(vmm.program(), status, why, Some(vmm.fix.to_owned()));
                }
            }
            if let Some(more) = found.closer.for_root.clone().filter(|_| self.is_root && is_installed) {
                check(&more.name, more.status, more.found, more.fix);
            }
        }
        let (status, found, fix) = self.walls.check(self.is_root);
        check("walls", status, found, fix);
        match &self.nat {
            Ok(()) => check("nat", DoctorStatus::Ok, "VMs can have network nat".to_owned(), None),
            Err(Complaint { why, fix }) => {
                let found = format!("VMs cannot have network nat: {why}; network proxy works");
                check("nat", DoctorStatus::Note, found, Some(fix.clone()));
            }
        }
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

#[cfg(test)]
mod tests;
