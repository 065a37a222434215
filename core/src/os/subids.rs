//! Subordinate ids of a user: the users of its namespaces are mapped to them. `mmdebstrap` needs some.

use std::path::Path;

use super::paths::{NAME_SERVICES, SUBORDINATE_IDS};

/// The minimum number: a system's own users go up to `nobody`, 65534.
const LEAST: u64 = 65_535;

/// A user without enough subordinate ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("user {user} has no range of 65536 subordinate ids in /{file}")]
pub struct Lacking {
    /// Its name, or its id if it has no name.
    pub user: String,
    /// The file that lacks them.
    pub file: &'static str,
}

impl Lacking {
    /// How to fix it.
    pub fn fix(&self) -> String {
        format!("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {}", self.user)
    }
}

/// Whether the current user has enough; root needs none.
pub fn check() -> Result<(), Lacking> {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Ok(());
    }
    let name = nix::unistd::User::from_uid(uid.as_raw().into()).ok().flatten().map(|user| user.name);
    check_in(Path::new("/"), uid.as_raw(), name.as_deref())
}

/// The same for any user, with the files of a host below `root`.
fn check_in(root: &Path, uid: u32, name: Option<&str>) -> Result<(), Lacking> {
    let text = |file: &str| std::fs::read_to_string(root.join(file)).unwrap_or_default();
    // Another service manages them; only that service could tell.
    if text(NAME_SERVICES).lines().any(|line| line.trim_start().starts_with("subid:")) {
        return Ok(());
    }
    let uid = uid.to_string();
    let is_own = |who: &str| who == uid || Some(who) == name;
    for file in SUBORDINATE_IDS {
        let enough = text(file).lines().any(|line| {
            let mut fields = line.trim().splitn(3, ':');
            let (who, _, count) = (fields.next(), fields.next(), fields.next());
            who.is_some_and(is_own)
                && count.and_then(|count| count.parse::<u64>().ok()).is_some_and(|count| count >= LEAST)
        });
        if !enough {
            return Err(Lacking { user: name.unwrap_or(&uid).to_owned(), file });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(subuid: &str, subgid: &str, services: &str) -> Result<(), Lacking> {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        for (file, text) in [("etc/subuid", subuid), ("etc/subgid", subgid), ("etc/nsswitch.conf", services)]
        {
            std::fs::write(root.path().join(file), text).unwrap();
        }
        check_in(root.path(), 1001, Some("me"))
    }

    #[test]
    fn a_user_needs_enough_of_both() {
        let lacking = |file| Err(Lacking { user: "me".to_owned(), file });
        let (mine, other) = ("you:1:65536\nme:100000:65536\n", "you:100000:65536\nmee:1:65536\n");
        assert_eq!(found(mine, mine, ""), Ok(()));
        assert_eq!(found("1001:100000:65536", mine, "passwd: files\n"), Ok(()));
        assert_eq!(found(other, mine, ""), lacking("etc/subuid"));
        assert_eq!(found(mine, other, ""), lacking("etc/subgid"));
        assert_eq!(found("me:100000:1000\n", mine, ""), lacking("etc/subuid"));
        assert_eq!(found("me:100000\nme\n\n:::", mine, ""), lacking("etc/subuid"));
        assert_eq!(found("", "", "subid: sss\n"), Ok(()));
        let error = check_in(Path::new("/nowhere"), 1001, None).unwrap_err();
        assert_eq!(error.to_string(), "user 1001 has no range of 65536 subordinate ids in /etc/subuid");
        assert!(error.fix().ends_with(" 1001"));
    }
}
