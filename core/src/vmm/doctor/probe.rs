//! Examination of the host: which programs are installed, and their versions.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_net_wire::{Check, Lack};
use nexus_schema::{Arch, DriverKind};

use super::kvm::Kvm;
use super::walls::Walls;
use super::{Complaint, Foreign, FoundNat, FoundVmm, Host};
use crate::config::Config;
use crate::os::paths::{PROGRAM_DIRECTORIES, Paths, TUN};
use crate::os::site::{Site, may_change_network};
use crate::os::subids;
use crate::os::tap;
use crate::os::tool::is_program;
use crate::vmm::driver::{Closer, DRIVERS, Vmm};
use crate::vmm::process::ask;
use crate::vmm::version::Version;

/// Timeout of a program to print its version.
const ANSWER: Duration = Duration::from_secs(12);

/// A program that has a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// Not installed.
    Missing,
    /// Installed, but it does not run or does not print a version.
    Broken { binary: PathBuf, why: String },
    /// Installed.
    Found { binary: PathBuf, version: Version },
}

impl Program {
    /// Returns the program and its version. Fails if it is missing or too old, with a reason that follows its name in a sentence.
    pub(super) fn usable(&self, min: Version) -> Result<(&PathBuf, Version), String> {
        match self {
            Self::Missing => Err("is not installed".to_owned()),
            Self::Broken { binary, why } => Err(format!("does not run from {}: {why}", binary.display())),
            Self::Found { binary, version } if *version < min => {
                Err(format!("{version} at {} is too old: {min} or newer required", binary.display()))
            }
            Self::Found { binary, version } => Ok((binary, *version)),
        }
    }

    fn look(name: &str, configured: Option<&Path>) -> Self {
        let Some(binary) = configured.map(Path::to_owned).or_else(|| find(name)) else {
            return Self::Missing;
        };
        let broken = |why: String| Self::Broken { binary: binary.clone(), why };
        match ask(&binary, &["--version"], ANSWER) {
            Err(error) => broken(error.to_string()),
            Ok(printed) if !printed.status.success() => {
                broken(format!("{}: {}", printed.status, printed.text.lines().next().unwrap_or_default()))
            }
            Ok(printed) => match Version::find(&printed.text) {
                Some(version) => Self::Found { binary, version },
                None => broken("it does not print its version".to_owned()),
            },
        }
    }
}

/// Finds a program.
fn find(name: &str) -> Option<PathBuf> {
    PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| is_program(path))
}

/// Returns the path of a downloaded program, with the link to it resolved.
fn downloaded(config: &Config, name: &str) -> Option<PathBuf> {
    let program = std::fs::canonicalize(Paths::new(&config.state_dir).programs().join(name)).ok()?;
    is_program(&program).then_some(program)
}

pub(super) fn examine(config: &Config) -> Host {
    let (vmms, program) = std::thread::scope(|scope| {
        let foreign = scope.spawn(|| Program::look(Arch::FOREIGN.qemu(), None));
        let look = |kind, vmm: &'static Vmm| scope.spawn(move || look_at(config, kind, vmm));
        let looks: Vec<_> = DRIVERS
            .iter()
            .filter_map(|facts| Some((facts.kind, facts.vmm.as_ref()?)))
            .map(|(kind, vmm)| (kind, vmm, look(kind, vmm)))
            .collect();
        let missing =
            |kind, vmm| FoundVmm { kind, vmm, program: Program::Missing, closer: Closer::default() };
        let found = looks
            .into_iter()
            .map(|(kind, vmm, look)| look.join().unwrap_or_else(|_| missing(kind, vmm)))
            .collect();
        (found, foreign.join().unwrap_or(Program::Missing))
    });
    let foreign = Foreign { program, has_guest: config.foreign_agent.is_some() };
    Host {
        foreign,
        setting: config.driver.clone(),
        kvm: Kvm::look(Path::new("/")),
        force_kvm: config.force_kvm,
        walls: Walls::look(config.jail),
        vmms,
        e2fsck: find("e2fsck"),
        debugfs: find("debugfs"),
        mmdebstrap: find("mmdebstrap"),
        ids: subids::check(),
        memory_available: memory_available(),
        nat: nat(&config.nexus_net),
        is_root: rustix::process::geteuid().is_root(),
    }
}

/// Finds a VMM: the program in the configuration, else the downloaded one, else an installed one.
fn look_at(config: &Config, kind: DriverKind, vmm: &'static Vmm) -> FoundVmm {
    let own = config.vmms.get(&kind).cloned();
    let downloaded = || (kind == DriverKind::OF_ASSETS).then(|| downloaded(config, vmm.program())).flatten();
    let program = Program::look(vmm.program(), own.or_else(downloaded).as_deref());
    let closer = match &program {
        Program::Found { binary, .. } => (vmm.look_closer)(binary),
        Program::Missing | Program::Broken { .. } => Closer::default(),
    };
    FoundVmm { kind, vmm, program, closer }
}

/// Checks whether VMs can have a network interface: for root as far as possible without making one, for an ordinary user by making one in a
/// network namespace of its own.
fn nat(binary: &Path) -> Result<FoundNat, Complaint> {
    let complain = |why: String, fix: String| Err(Complaint { why, fix });
    if !is_program(binary) {
        let why = format!("there is no program {}", binary.display());
        return complain(why, "install nexus-net beside nexusd".to_owned());
    }
    if Site::of_this_process() == Site::Own {
        return own_nat(binary);
    }
    if !may_change_network() {
        let why = "this daemon has no permission to change the host's network".to_owned();
        return complain(why, "run nexusd as root".to_owned());
    }
    tap::check().map(|()| FoundNat::default()).or_else(|why| {
        let fix = format!("load the kernel module tun, and make sure that {TUN} exists");
        complain(format!("TAP devices cannot be used: {why}"), fix)
    })
}

/// Lets `nexus-net` check it.
pub(super) fn own_nat(binary: &Path) -> Result<FoundNat, Complaint> {
    let broken = |why: String| Complaint {
        why: format!("{} does not work: {why}", binary.display()),
        fix: "install nexus-net and nexusd of the same version".to_owned(),
    };
    let complaint = |lack: Lack| Complaint { why: lack.why, fix: lack.fix };
    let printed = ask(binary, &["--check"], ANSWER).map_err(|error| broken(error.to_string()))?;
    match Check::find(&printed.text) {
        Some(Check::Usable { found, lack }) => Ok(FoundNat { found: Some(found), lack: lack.map(complaint) }),
        Some(Check::Unusable(lack)) => Err(complaint(lack)),
        None => Err(broken(printed.text.trim().lines().next_back().unwrap_or_default().to_owned())),
    }
}

fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
