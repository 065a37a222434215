//! Determines which role a process has, from its name and arguments.

use std::path::PathBuf;
use std::process::ExitCode;

use nexus_schema::link::{InitMode, PROTOCOL};

use crate::agent::{self, Place};
use crate::{console, holder, init, initramfs};

/// The version of this binary.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The path of the binary in a VM.
pub(crate) const BINARY: &str = "/run/nexus/nexus-guest";
/// The other names of the binary, in `/run/nexus/bin`.
pub(crate) const POWER_NAMES: [&str; 4] = ["halt", "poweroff", "reboot", "shutdown"];

/// The role of a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// `/init` of the initramfs; in init mode `agent` it then becomes PID 1 of the VM.
    Initramfs,
    /// Keeps an agent running beside the image's own init.
    Supervise,
    /// Shuts the VM down.
    Power {
        /// The name from [`POWER_NAMES`] that it was called by.
        name: &'static str,
        /// The arguments.
        arguments: Vec<String>,
    },
    /// The agent, in a VM or on a host.
    Agent {
        /// Where it runs.
        place: Place,
        /// The protocol generation that it claims to speak.
        protocol: u32,
    },
    /// Holds commands, so that they outlive the agent.
    Hold {
        /// The directory of its socket and its records.
        directory: PathBuf,
        /// Whether this is in a VM, not an ordinary process of a host.
        in_vm: bool,
    },
    /// Prints the version.
    Version,
}

/// Invalid arguments.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}\nusage: nexus-guest --unix DIR | --version")]
pub(crate) struct Usage {
    problem: String,
}

impl Role {
    /// Determines the role of this process.
    pub(crate) fn of_process() -> Result<Self, Usage> {
        let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
        let name = words.next().unwrap_or_default();
        Self::parse(&name, rustix::process::getpid().is_init(), words)
    }

    fn parse(name: &str, is_init: bool, mut words: impl Iterator<Item = String>) -> Result<Self, Usage> {
        // The kernel passes unknown words of its command line to `/init`.
        if is_init && name == "/init" {
            return Ok(Self::Initramfs);
        }
        let base = name.rsplit('/').next().unwrap_or_default();
        if let Some(name) = POWER_NAMES.into_iter().find(|power| *power == base) {
            return Ok(Self::Power { name, arguments: words.collect() });
        }
        let refuse = |problem: String| Usage { problem };
        let mut place = None;
        let mut protocol = PROTOCOL;
        while let Some(word) = words.next() {
            match word.as_str() {
                "--version" => return Ok(Self::Version),
                "--unix" => {
                    let directory = words.next().ok_or_else(|| refuse("--unix needs a directory".into()))?;
                    place = Some(Place::Process { directory: PathBuf::from(directory) });
                }
                "--protocol" => {
                    let number = words.next().and_then(|n| n.parse().ok());
                    protocol = number.ok_or_else(|| refuse("--protocol needs a number".into()))?;
                }
                "hold" | "hold-for-process" => {
                    let directory = words.next().ok_or_else(|| refuse("hold needs a directory".into()))?;
                    return Ok(Self::Hold { directory: PathBuf::from(directory), in_vm: word == "hold" });
                }
                "supervise" => return Ok(Self::Supervise),
                "agent" => place = Some(Place::Vm { init: InitMode::Agent }),
                "agent-beside" => place = Some(Place::Vm { init: InitMode::System }),
                other => return Err(refuse(format!("unknown argument `{other}`"))),
            }
        }
        let place = place.ok_or_else(|| refuse("nothing to do".into()))?;
        Ok(Self::Agent { place, protocol })
    }

    /// Runs the role.
    pub(crate) fn run(self) -> ExitCode {
        match self {
            Self::Initramfs => initramfs::run(),
            Self::Supervise => init::supervise(),
            Self::Power { name, arguments } => init::power::run(name, &arguments),
            Self::Agent { place, protocol } => agent::run(place, protocol),
            Self::Hold { directory, in_vm } => holder::run(directory, in_vm),
            Self::Version => {
                console::say(format_args!("nexus-guest {VERSION}"));
                ExitCode::SUCCESS
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Role, Usage> {
        let mut words = line.split_whitespace().map(String::from);
        let name = words.next().unwrap_or_default();
        Role::parse(&name, false, words)
    }

    #[test]
    fn arguments_name_the_role() {
        let unix = Place::Process { directory: ".".into() };
        assert_eq!(
            parse("nexus-guest --unix ."),
            Ok(Role::Agent { place: unix.clone(), protocol: PROTOCOL })
        );
        assert_eq!(parse("x --unix . --protocol 0"), Ok(Role::Agent { place: unix, protocol: 0 }));
        assert_eq!(parse("nexus-guest --version"), Ok(Role::Version));
        for bad in ["x", "x --unix", "x --protocol x", "x --nonsense", "x init", "/init"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_name_the_role() {
        let arguments = vec!["-f".to_owned()];
        assert_eq!(parse("/run/nexus/bin/reboot -f"), Ok(Role::Power { name: "reboot", arguments }));
        let none = std::iter::empty;
        assert_eq!(Role::parse("/init", true, none()), Ok(Role::Initramfs));
    }
}
