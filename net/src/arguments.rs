//! The command line: which of the processes of this program this is.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::own::Namespaces;

/// What the process does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Serves one nexusd. With `is_apart` it does so in a network namespace of its own.
    Serve { socket: PathBuf, is_apart: bool },
    /// Checks whether the host lets an ordinary user have such a namespace.
    Check,
    /// Holds the namespace.
    Hold { record: OsString, namespaces: Namespaces },
    /// Connects the namespace of a process with the host's network.
    Uplink { record: OsString, program: OsString, into: OsString },
}

impl Task {
    /// Parses the arguments without the program's name; `None` if they are not valid.
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        let arguments: Vec<OsString> = arguments.collect();
        let words: Vec<&str> = arguments.iter().map(|word| word.to_str().unwrap_or_default()).collect();
        Some(match (words.as_slice(), arguments.as_slice()) {
            (["--check"], _) => Self::Check,
            (["--own", _], [_, socket]) => Self::Serve { socket: socket.into(), is_apart: true },
            (["--hold", ..], [_, record, word]) => {
                Self::Hold { record: record.clone(), namespaces: Namespaces::of(word)? }
            }
            (["--uplink", ..], [_, record, program, into]) => {
                Self::Uplink { record: record.clone(), program: program.clone(), into: into.clone() }
            }
            ([word], [socket]) if !word.starts_with("--") => {
                Self::Serve { socket: socket.into(), is_apart: false }
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Task> {
        Task::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn tasks_are_told_apart() {
        let serve = |is_apart| Some(Task::Serve { socket: "net.sock".into(), is_apart });
        assert_eq!(parsed("net.sock"), serve(false));
        assert_eq!(parsed("--own net.sock"), serve(true));
        assert_eq!(parsed("--check"), Some(Task::Check));
        let hold = |namespaces| Some(Task::Hold { record: "holder".into(), namespaces });
        assert_eq!(parsed("--hold holder new"), hold(Namespaces::New));
        assert_eq!(parsed("--hold holder same"), hold(Namespaces::Same));
        assert!(matches!(parsed("--uplink - slirp4netns 12"), Some(Task::Uplink { .. })));
        for wrong in ["", "--own", "--help", "a b", "--hold holder", "--hold holder other", "--check it"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }
}
