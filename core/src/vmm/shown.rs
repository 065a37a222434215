//! The confinement of a running VMM, as the kernel reports it for the process. The kernel does not report Landlock.

use std::os::unix::fs::MetadataExt;

use nexus_schema::tools::vm::VmWalls;

use super::cgroup;

/// Namespaces that are reported.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// Returns the confinement of a process; `None` if the process has ended.
pub(crate) fn walls_of(pid: u32) -> Option<VmWalls> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_ascii_whitespace().next()
    };
    let namespace = |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    let is_own = |kind: &&str| {
        let (theirs, ours) = (namespace(&pid.to_string(), kind), namespace("self", kind));
        theirs.is_some() && theirs != ours
    };
    let root = |path: &str| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let theirs = root(&format!("/proc/{pid}/root/"));
    let has_some = |name: &&str| field(name).and_then(|set| u64::from_str_radix(set, 16).ok()) != Some(0);
    Some(VmWalls {
        uid: field("Uid")?.parse().ok()?,
        no_new_privileges: field("NoNewPrivs") == Some("1"),
        capabilities: ["CapPrm", "CapEff"].iter().any(has_some),
        seccomp: field("Seccomp") == Some("2"),
        own_root: theirs.is_some() && theirs != root("/"),
        namespaces: NAMESPACES.iter().filter(|kind| is_own(kind)).map(|kind| (*kind).to_owned()).collect(),
        limits: cgroup::limits_of(pid),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_shares_everything_with_itself() {
        let walls = walls_of(std::process::id()).unwrap();
        assert_eq!(walls.uid, rustix::process::geteuid().as_raw());
        assert_eq!((walls.own_root, walls.namespaces), (false, vec![]));
        assert_eq!(walls_of(u32::MAX), None);
    }
}
