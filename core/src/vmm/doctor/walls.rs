//! The confinement that VMMs get on this host.

use nexus_schema::tools::system::DoctorStatus;

use crate::os::confine::landlock_abi;
use crate::vmm::cgroup::Groups;

/// Kinds of confinement of a VMM that this host supports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Walls {
    /// Whether the settings allow jails and limits.
    pub(super) jail: bool,
    /// Version of Landlock's interface, if the kernel has it.
    pub(super) landlock: Option<u32>,
    /// Description of the usable control groups.
    pub(super) groups: Option<String>,
    /// Missing control groups, with reasons.
    pub(super) lacking: Vec<String>,
}

impl Walls {
    pub(super) fn look(jail: bool) -> Self {
        let (groups, lacking) = Groups::look().describe();
        Self { jail, landlock: landlock_abi(), groups, lacking }
    }

    /// Returns the status of the confinement, its description, and a fix.
    pub(super) fn check(&self, is_root: bool) -> (DoctorStatus, String, Option<String>) {
        let mut have = Vec::new();
        let mut lack = self.lacking.clone();
        if is_root && self.jail {
            have.push(
                "each VM has its own user, root directory and network namespace, no capabilities, seccomp"
                    .to_owned(),
            );
        } else if is_root {
            lack.push("the setting `jail` is off: VMMs run as root".to_owned());
        } else {
            have.push("no capabilities, seccomp".to_owned());
            match self.landlock {
                Some(version) => have.push(format!("Landlock, version {version}")),
                None => {
                    lack.push("this kernel has no Landlock: a VMM can open all files of its user".to_owned())
                }
            }
        }
        match &self.groups {
            Some(groups) if self.jail => have.push(groups.clone()),
            _ => {}
        }
        let found = if lack.is_empty() {
            have.join("; ")
        } else {
            format!("{}; missing: {}", have.join("; "), lack.join("; "))
        };
        if is_root && !self.jail {
            let fix = "remove `jail = false` from the configuration".to_owned();
            return (DoctorStatus::Warn, found.trim_start_matches("; ").to_owned(), Some(fix));
        }
        let status = if lack.is_empty() { DoctorStatus::Ok } else { DoctorStatus::Note };
        (status, found, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walls_that_lack_are_said() {
        let all = Walls {
            jail: true,
            landlock: Some(6),
            groups: Some("control groups, version 2 (memory)".into()),
            lacking: vec![],
        };
        assert_eq!(all.check(true).0, DoctorStatus::Ok);
        assert!(all.check(false).1.contains("Landlock, version 6"));
        let (status, found, fix) = Walls { jail: false, ..all.clone() }.check(true);
        assert!(
            status == DoctorStatus::Warn && found.contains("VMMs run as root") && fix.is_some(),
            "{found}"
        );
        let (status, found, _) =
            Walls { landlock: None, groups: None, lacking: vec!["no groups".into()], ..all }.check(false);
        assert!(
            status == DoctorStatus::Note && found.contains("no Landlock") && found.contains("no groups"),
            "{found}"
        );
    }
}
