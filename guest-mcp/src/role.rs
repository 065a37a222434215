//! Which of its roles a process has, from its name and arguments.

use std::path::PathBuf;
use std::process::ExitCode;

use nexus_schema::link::{InitMode, PROTOCOL};

use crate::agent::{self, Place};
use crate::console;

/// What the binary is called in messages, and its version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What this process is here for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The agent in a VM or beside one.
    Agent {
        /// Where it runs.
        place: Place,
        /// The protocol generation that it claims to speak.
        protocol: u32,
    },
    /// Prints the version.
    Version,
}

/// Arguments that make no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}\nusage: nexus-guest --unix DIR | --version")]
pub(crate) struct Usage {
    problem: String,
}

impl Role {
    /// The role of this process.
    pub(crate) fn of_process() -> Result<Self, Usage> {
        let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
        let _name = words.next();
        Self::parse(words)
    }

    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Usage> {
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
                "agent" => place = Some(Place::Vm { init: InitMode::Agent }),
                "agent-beside" => place = Some(Place::Vm { init: InitMode::System }),
                other => return Err(refuse(format!("unknown argument `{other}`"))),
            }
        }
        let place = place.ok_or_else(|| refuse("nothing to do".into()))?;
        Ok(Self::Agent { place, protocol })
    }

    /// Does what the role is for.
    pub(crate) fn run(self) -> ExitCode {
        match self {
            Self::Agent { place, protocol } => agent::run(place, protocol),
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
        Role::parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn arguments_name_the_role() {
        let unix = Place::Process { directory: ".".into() };
        assert_eq!(parse("--unix ."), Ok(Role::Agent { place: unix.clone(), protocol: PROTOCOL }));
        assert_eq!(parse("--unix . --protocol 0"), Ok(Role::Agent { place: unix, protocol: 0 }));
        assert_eq!(parse("--version"), Ok(Role::Version));
        for bad in ["", "--unix", "--protocol x", "--nonsense"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
