//! Looking: which programs there are and which versions.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Host;
use super::kvm::Kvm;
use super::walls::Walls;
use crate::config::Config;
use crate::os::confine::program::interpreter;
use crate::os::paths::{PROGRAM_DIRECTORIES, Paths};
use crate::os::subids;
use crate::os::tool::is_program;
use crate::vmm::driver::firecracker::jail::find_jailer;
use crate::vmm::process::ask;

/// How long a program may take to say its version.
const ANSWER: Duration = Duration::from_secs(12);

/// A version, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// The first version in a text such as `QEMU emulator version 7.2.22 (Debian ..)` or `Firecracker v1.16.1`.
    pub(super) fn find(text: &str) -> Option<Self> {
        text.split(|c: char| c.is_whitespace() || c == '(').find_map(|word| {
            let word = word.strip_prefix('v').unwrap_or(word);
            let mut numbers = word.split('.').map(|part| {
                let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
                part[..digits].parse().ok()
            });
            let (major, minor) = (numbers.next()??, numbers.next()??);
            Some(Self(major, minor, numbers.next().flatten().unwrap_or(0)))
        })
    }
}

/// A program that has a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// Not there.
    Missing,
    /// There, but it does not run or does not say a version.
    Broken { binary: PathBuf, why: String },
    /// There.
    Found { binary: PathBuf, version: Version },
}

impl Program {
    /// The program, if it is new enough; else why not, to be read after its name.
    pub(super) fn usable(&self, min: Version) -> Result<(&PathBuf, Version), String> {
        match self {
            Self::Missing => Err("is not installed".to_owned()),
            Self::Broken { binary, why } => Err(format!("does not run from {}: {why}", binary.display())),
            Self::Found { binary, version } if *version < min => {
                Err(format!("{version} at {} is too old: {min} or newer is needed", binary.display()))
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
                None => broken("it does not say its version".to_owned()),
            },
        }
    }
}

/// Where a program is.
fn find(name: &str) -> Option<PathBuf> {
    PROGRAM_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name)).find(|path| is_program(path))
}

/// A program that was downloaded, at its own place rather than that of the link to it.
fn downloaded(config: &Config, name: &str) -> Option<PathBuf> {
    let program = std::fs::canonicalize(Paths::new(&config.state_dir).programs().join(name)).ok()?;
    is_program(&program).then_some(program)
}

pub(super) fn examine(config: &Config) -> Host {
    // What the configuration names, else what was downloaded on purpose, else what the host has.
    let own = config.firecracker.clone().or_else(|| downloaded(config, "firecracker"));
    let (qemu, firecracker) = std::thread::scope(|scope| {
        let qemu = scope.spawn(|| Program::look("qemu-system-x86_64", config.qemu.as_deref()));
        let firecracker = Program::look("firecracker", own.as_deref());
        (qemu.join().unwrap_or(Program::Missing), firecracker)
    });
    let jailer = match &firecracker {
        Program::Found { binary, .. } => find_jailer(binary),
        Program::Missing | Program::Broken { .. } => None,
    };
    let firecracker_loader = match &firecracker {
        Program::Found { binary, .. } => interpreter(binary).ok().flatten(),
        Program::Missing | Program::Broken { .. } => None,
    };
    Host {
        setting: config.driver.clone(),
        kvm: Kvm::look(Path::new("/")),
        force_kvm: config.force_kvm,
        walls: Walls::look(config.jail),
        qemu,
        firecracker,
        jailer,
        firecracker_loader,
        e2fsck: find("e2fsck"),
        debugfs: find("debugfs"),
        mmdebstrap: find("mmdebstrap"),
        ids: subids::check(),
        memory_available: memory_available(),
        is_root: rustix::process::geteuid().is_root(),
    }
}

fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022";
        assert_eq!(Version::find(qemu), Some(Version(7, 2, 22)));
        assert_eq!(Version::find("Firecracker v1.16.1\n\nSupported snapshot"), Some(Version(1, 16, 1)));
        assert_eq!(Version::find("QEMU emulator version 10.0"), Some(Version(10, 0, 0)));
        assert_eq!(Version::find("Firecracker v1.17.0-dev"), Some(Version(1, 17, 0)));
        assert_eq!(Version::find("no version here. At all"), None);
        assert!(Version(1, 9, 0) < Version(1, 16, 1));
    }
}
