//! Checks of what this host can run, with reasons and fixes.
//!
//! [`examine`] examines the host (quickly, with deadlines), and [`Host`] has the findings. The results of its methods depend only on
//! these findings.

mod foreign;
mod kvm;
mod probe;
mod walls;

use std::path::PathBuf;

use nexus_schema::tools::system::{Doctor, DoctorCheck, DoctorStatus};
use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{Arch, ByteSize, DriverKind, ErrorCode, ToolError};

use self::foreign::Foreign;
use self::kvm::Kvm;
use self::probe::Program;
use self::walls::Walls;
use super::driver::{Caps, Closer, Vmm, facts};
use super::plan::Accel;
use super::version::Version;
use crate::config::{Config, DriverSetting};
use crate::os::subids::Lacking;
pub(crate) use foreign::GUEST_FIX;

/// Minimum available memory to run a VM, in bytes.
const MEMORY_MIN: u64 = 256 << 20;

/// Findings about a host. Cheap to keep and to clone; they do not change by themselves.
#[derive(Debug, Clone)]
pub struct Host {
    setting: DriverSetting,
    kvm: Kvm,
    force_kvm: bool,
    /// The confinement of VMMs on this host, and what is missing.
    walls: Walls,
    /// The VMMs of the drivers that have one, in the order of [`DRIVERS`](super::driver::DRIVERS).
    vmms: Vec<FoundVmm>,
    /// What runs VMs of the other architecture.
    foreign: Foreign,
    e2fsck: Option<PathBuf>,
    debugfs: Option<PathBuf>,
    mmdebstrap: Option<PathBuf>,
    ids: Result<(), Lacking>,
    memory_available: Option<u64>,
    is_root: bool,
    /// Whether VMs can have a network interface.
    nat: Result<FoundNat, Complaint>,
}

/// A VMM and the findings about it.
#[derive(Debug, Clone)]
struct FoundVmm {
    kind: DriverKind,
    vmm: &'static Vmm,
    program: Program,
    closer: Closer,
}

/// The findings about networks of VMs that work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FoundNat {
    /// How they work, if not in the host's own network.
    found: Option<String>,
    /// What does not work in them.
    lack: Option<Complaint>,
}

/// Why something cannot be used, and the fix. For a VMM, the reason follows its name in a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Complaint {
    why: String,
    fix: String,
}

/// How a VM will be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The driver.
    pub driver: DriverKind,
    /// The VM's architecture.
    pub arch: Arch,
    /// How instructions are executed.
    pub accel: Accel,
    /// The VMM's binary.
    pub binary: PathBuf,
    /// The VMM's version.
    pub version: String,
    /// The driver's capabilities.
    pub caps: Caps,
}

/// Examines the host. Takes as long as the slowest VMM takes to print its version: usually tens of milliseconds, 12 s at most.
pub fn examine(config: &Config) -> Host {
    probe::examine(config)
}

impl Host {
    /// Returns the driver for a VM. Fails with what is missing and how to get it.
    pub fn choose(&self, choice: DriverChoice) -> Result<Choice, ToolError> {
        let wanted = match (choice.kind(), &self.setting) {
            (Some(kind), _) => kind,
            (None, DriverSetting::Vmm(kind)) => *kind,
            (None, DriverSetting::Auto) => return self.choose_auto(),
            (None, DriverSetting::Process { guest }) => {
                return Ok(Choice {
                    driver: DriverKind::Process,
                    arch: Arch::HOST,
                    accel: Accel::Tcg,
                    binary: guest.clone(),
                    version: "process".to_owned(),
                    caps: Caps::of(DriverKind::Process),
                });
            }
        };
        match self.vmms.iter().find(|found| found.kind == wanted) {
            Some(found) => self.use_vmm(found),
            None => Err(ToolError::internal(format!("the driver {wanted} was not checked"))),
        }
    }

    /// Returns the driver for a VM of which checkpoints are to be taken.
    pub(crate) fn choose_for_checkpoints(&self, choice: DriverChoice) -> Result<Choice, ToolError> {
        let chosen = self.choose(choice)?;
        if chosen.caps.checkpoint {
            return Ok(chosen);
        }
        let is_open = choice.kind().is_none() && self.setting == DriverSetting::Auto;
        let mut others = self.vmms.iter().filter(|found| is_open && Caps::of(found.kind).checkpoint);
        others.find_map(|found| self.use_vmm(found).ok()).ok_or_else(|| {
            let what = format!("checkpoints of VMs of driver {} cannot be taken", chosen.driver);
            ToolError::new(ErrorCode::HostUnsuitable, what)
                .hint("use driver qemu for this VM, or leave checkpoints out")
        })
    }

    /// Returns the first usable VMM. If there is none, fails with the error of the last one.
    fn choose_auto(&self) -> Result<Choice, ToolError> {
        let none = || Err(ToolError::internal("no driver was checked"));
        self.vmms.iter().fold(none(), |chosen, found| chosen.or_else(|_| self.use_vmm(found)))
    }

    /// Fails if VMs cannot have network interfaces on this host.
    pub(crate) fn check_nat(&self) -> Result<(), ToolError> {
        self.nat.as_ref().map(drop).map_err(|Complaint { why, fix }| {
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
                arch: Arch::HOST,
                accel: if no_kvm.is_none() { Accel::Kvm } else { Accel::Tcg },
                binary: binary.clone(),
                version: version.to_string(),
                caps: Caps::of(found.kind),
            }),
            Err(Complaint { why, fix }) => unsuitable(format!("{program} {why}"), fix),
        }
    }

    /// Returns a VMM's program and version, if the program is usable; KVM is not considered.
    fn usable<'a>(&self, found: &'a FoundVmm) -> Result<(&'a PathBuf, Version), Complaint> {
        let usable = found.program.usable(found.vmm.min_version);
        match self.unjailable(found) {
            Some((why, fix)) if usable.is_ok() => Err(Complaint { why, fix }),
            _ => usable.map_err(|why| Complaint { why, fix: format!("{}, then try again", found.vmm.fix) }),
        }
    }

    /// Returns why KVM is not used, with the fix. `None` if it works, or if it opens and the setting `force_kvm` is on.
    fn kvm_complaint(&self) -> Option<(String, String)> {
        let opens = !matches!(self.kvm, Kvm::NoDevice | Kvm::Denied | Kvm::Broken(_));
        self.kvm.complaint().filter(|_| !(self.force_kvm && opens))
    }

    /// Returns why a VMM cannot run in the jail that it would get here, with the fix.
    fn unjailable(&self, found: &FoundVmm) -> Option<(String, String)> {
        found.closer.unjailable.clone().filter(|_| self.is_root && self.walls.jail)
    }

    /// Returns all findings, the driver that `auto` picks, and why.
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
            DriverSetting::Vmm(_) | DriverSetting::Process { .. } => "set in the configuration; ",
        };
        let vmm = facts(choice.driver).vmm.as_ref();
        let why = match (vmm, choice.accel, self.kvm_complaint()) {
            (None, _, _) => "no VM at all: the guest runs as a process of this host".to_owned(),
            (Some(_), Accel::Tcg, Some((why, _))) => format!("software emulation, because {why}"),
            (Some(_), Accel::Tcg, None) => "software emulation".to_owned(),
            (Some(vmm), Accel::Kvm, _) if vmm.needs_kvm => {
                format!("hardware KVM works and {} is installed", vmm.program())
            }
            (Some(_), Accel::Kvm, _) => self.why_not_earlier(choice.driver),
        };
        format!("{asked}{why}")
    }

    /// Returns why a VMM under KVM was picked, and why the VMMs preferred to it were not.
    fn why_not_earlier(&self, picked: DriverKind) -> String {
        let earlier = self.vmms.iter().take_while(|found| found.kind != picked);
        let lacks: Vec<String> = earlier
            .filter_map(|found| Some(format!("; {} {}", found.vmm.program(), self.usable(found).err()?.why)))
            .collect();
        match lacks.is_empty() {
            true if self.kvm != Kvm::Usable => "the setting `force_kvm` is on".to_owned(),
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
                format!("used because of the setting `force_kvm`, although {why}: guests may crash or hang"),
                Some("remove `force_kvm` from the configuration, unless your guests' kernels are built for this host".to_owned()),
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
        let (status, found, fix) = self.foreign.check();
        check(Arch::FOREIGN.qemu(), status, found, fix);
        let (status, found, fix) = self.walls.check(self.is_root);
        check("walls", status, found, fix);
        match &self.nat {
            Ok(FoundNat { found, lack }) => {
                let how = found.as_ref().map(|how| format!(", {how}")).unwrap_or_default();
                let found = format!("VMs can have network nat{how}");
                match lack {
                    None => check("nat", DoctorStatus::Ok, found, None),
                    Some(Complaint { why, fix }) => {
                        check("nat", DoctorStatus::Note, format!("{found}; {why}"), Some(fix.clone()));
                    }
                }
            }
            Err(Complaint { why, fix }) => {
                let found = format!("VMs cannot have network nat: {why}; network proxy works");
                check("nat", DoctorStatus::Note, found, Some(fix.clone()));
            }
        }
        check("vsock", DoctorStatus::Ok, "built in: no vhost module needed on the host".to_owned(), None);
        let tools = [
            ("e2fsck", &self.e2fsck, "images cannot be built", "apt-get install e2fsprogs"),
            (
                "debugfs",
                &self.debugfs,
                "ext4 files cannot be imported as images",
                "apt-get install e2fsprogs",
            ),
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
            Ok(()) => check(
                "subids",
                DoctorStatus::Ok,
                "this user has subordinate ids for mmdebstrap".to_owned(),
                None,
            ),
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
                Some("stop unneeded programs; a VM uses its memory plus about 60 MiB".to_owned()),
            ),
            None => check("memory", DoctorStatus::Note, "unknown".to_owned(), None),
        }
        checks
    }
}

#[cfg(test)]
mod tests;
