//! Whether an ordinary user's VMs can have a network: what `nexus-net --check` finds out by making one and removing it again.

use serde::{Deserialize, Serialize};

/// The result of `nexus-net --check`: a line of JSON on its stdout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// It works.
    Usable {
        /// What it works with, for people.
        found: String,
        /// What does not work, although the network does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lack: Option<Lack>,
    },
    /// It does not work.
    Unusable(Lack),
}

/// Something that the host lacks or forbids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lack {
    /// What fails, and why.
    pub why: String,
    /// What to change on the host.
    pub fix: String,
}

impl Check {
    /// Returns the result in a program's output, which may have other lines.
    pub fn find(output: &str) -> Option<Self> {
        output.lines().find_map(|line| serde_json::from_str(line).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_found_between_other_lines() {
        let lack = Lack { why: "no".into(), fix: "do".into() };
        for check in [
            Check::Usable { found: "slirp4netns 1.2.0".into(), lack: None },
            Check::Usable { found: "all".into(), lack: Some(lack.clone()) },
            Check::Unusable(lack),
        ] {
            let output = format!("a warning\n{}\nmore\n", serde_json::to_string(&check).unwrap());
            assert_eq!(Check::find(&output), Some(check));
        }
        assert_eq!(Check::find("usage: nexus-net SOCKET\n{}\n"), None);
    }
}
