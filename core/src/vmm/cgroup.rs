//! Resource limits of a VM: a control group with its shim and its VMM in it.
//!
//! Version 2 of the kernel's interface is used if it has the memory controller, else version 1, else none. A VM's group is
//! `nexus/NAME` below the root of each hierarchy; for an ordinary user, below the highest group that the system delegated to that
//! user. The daemon makes and removes the groups, since a shim has no permission to.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::plan::{Accel, LaunchPlan};

/// Name of the group of all VMs.
const ALL: &str = "nexus";
/// Memory of a VMM and its shim in addition to the guest's memory, in bytes.
const OVERHEAD: u64 = 256 << 20;
/// Additional memory of QEMU under software emulation, in bytes: its buffer for translated code holds 1 GiB.
const EMULATION: u64 = 1 << 30;
/// Maximum number of threads of a VMM and its shim in addition to one for each processor.
const THREADS: u32 = 160;
/// CPU weight per processor: the kernel's default of a group.
const WEIGHT: u64 = 100;

/// Limits of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    memory: u64,
    pids: u32,
    cpu_weight: u64,
}

impl Limits {
    pub(crate) fn of(plan: &LaunchPlan) -> Self {
        let guest = plan.memory.as_bytes();
        let emulation = if plan.accel == Accel::Tcg { EMULATION } else { 0 };
        Self {
            // Page tables and the like grow with the guest.
            memory: guest + guest / 16 + OVERHEAD + emulation,
            pids: plan.vcpus + THREADS,
            cpu_weight: (WEIGHT * u64::from(plan.vcpus)).min(10_000),
        }
    }

    /// Returns the files to write in a controller's directory, with their values: of each list, the first file that exists.
    fn files(self, controller: &str) -> Vec<(&'static [&'static str], String)> {
        match controller {
            "memory" => vec![(&["memory.max", "memory.limit_in_bytes"], self.memory.to_string())],
            "pids" => vec![(&["pids.max"], self.pids.to_string())],
            "cpu" => vec![
                (&["cpu.weight"], self.cpu_weight.to_string()),
                (&["cpu.shares"], (self.cpu_weight * 1024 / WEIGHT).to_string()),
            ],
            _ => vec![(
                &["io.weight", "io.bfq.weight", "blkio.weight", "blkio.bfq.weight"],
                WEIGHT.to_string(),
            )],
        }
    }
}

/// The control groups of this host in which this process can make groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Groups {
    version: u8,
    /// The directory of the VMs' groups, by controller. In version 2 it is the same for all.
    places: BTreeMap<&'static str, PathBuf>,
    /// Why controllers are missing.
    lacking: Vec<String>,
}

/// The controllers: their names in version 2 and in version 1.
const CONTROLLERS: [(&str, &str); 4] =
    [("memory", "memory"), ("pids", "pids"), ("cpu", "cpu"), ("io", "blkio")];

impl Groups {
    /// Finds the control groups of this host.
    pub(crate) fn look() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::find(&mounts, &own, rustix::process::geteuid().is_root())
    }

    /// Finds the control groups from the contents of `/proc/self/mountinfo` and `/proc/self/cgroup`.
    fn find(mounts: &str, own: &str, is_root: bool) -> Self {
        let mut found = Self::default();
        let hierarchies: Vec<(&str, &str, &str)> = mounts.lines().filter_map(hierarchy).collect();
        if let Some((_, place, _)) = hierarchies.iter().find(|(kind, place, _)| {
            *kind == "cgroup2"
                && words(&Path::new(place).join("cgroup.controllers")).contains(&"memory".to_owned())
        }) {
            found.version = 2;
            let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
            match parent_for(Path::new(place), path, is_root) {
                Some(parent) => found.take_v2(&parent),
                None => found.lacking.push("the system delegates no control group to this user".to_owned()),
            }
            return found;
        }
        if !is_root {
            found.lacking.push(
                "control groups of version 2 are missing, and those of version 1 are for root only"
                    .to_owned(),
            );
            return found;
        }
        for (name, old) in CONTROLLERS {
            let has = |options: &str| options.split(',').any(|word| word == old);
            match hierarchies.iter().find(|(kind, _, options)| *kind == "cgroup" && has(options)) {
                Some((_, place, _)) => {
                    found.version = 1;
                    found.places.insert(name, Path::new(place).join(ALL));
                }
                None => found.lacking.push(format!("there is no controller {old}")),
            }
        }
        found
    }

    /// Enables the available controllers below `parent`.
    fn take_v2(&mut self, parent: &Path) {
        let all = parent.join(ALL);
        if let Err(error) = make(&all) {
            return self.lacking.push(format!("make {}: {error}", all.display()));
        }
        for (name, _) in CONTROLLERS {
            let on = |place: &Path| {
                let file = place.join("cgroup.subtree_control");
                if words(&file).iter().any(|word| word == name) {
                    Ok(())
                } else {
                    std::fs::write(file, format!("+{name}"))
                }
            };
            match on(parent).and_then(|()| on(&all)) {
                Ok(()) => drop(self.places.insert(name, all.clone())),
                Err(error) => self.lacking.push(format!("{name}: {error}")),
            }
        }
    }

    /// Describes the control groups that were found, and lists what is missing.
    pub(crate) fn describe(&self) -> (Option<String>, Vec<String>) {
        let controllers: Vec<&str> = self.places.keys().copied().collect();
        let found = (!controllers.is_empty())
            .then(|| format!("control groups, version {} ({})", self.version, controllers.join(", ")));
        (found, self.lacking.clone())
    }

    /// Makes a VM's group with its limits. Returns what could not be set.
    pub(crate) fn limit(&self, name: &str, limits: Limits) -> Vec<String> {
        let mut lacking = self.lacking.clone();
        for (controller, place) in &self.places {
            let group = place.join(name);
            if let Err(error) = make(place).and_then(|()| make(&group)) {
                lacking.push(format!("{controller}: {error}"));
                continue;
            }
            let mut set = false;
            for (files, value) in limits.files(controller) {
                let Some(file) = files.iter().map(|file| group.join(file)).find(|file| file.exists()) else {
                    continue;
                };
                match std::fs::write(&file, &value) {
                    Ok(()) => set = true,
                    Err(error) => lacking.push(format!("{}: {error}", file.display())),
                }
            }
            if !set {
                lacking.push(format!("{controller}: this kernel's controller has no such limit"));
            }
        }
        lacking
    }

    /// Puts a process into a VM's group, with all its threads. Children that it starts later join the group too. May take some ten
    /// milliseconds.
    pub(crate) fn put(&self, name: &str, pid: u32) -> io::Result<()> {
        let mut places: Vec<&PathBuf> = self.places.values().collect();
        places.dedup();
        places
            .iter()
            .try_for_each(|place| std::fs::write(place.join(name).join("cgroup.procs"), pid.to_string()))
    }

    /// Removes a VM's group after its processes have ended.
    pub(crate) fn remove(&self, name: &str) {
        for place in self.places.values() {
            match std::fs::remove_dir(place.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::debug!(group = name, %error, "cannot remove a control group");
                }
                _ => {}
            }
        }
    }
}

/// Returns the name of the group of the VM in a directory, which is unique among all daemons of the host.
pub(crate) fn name_of(directory: &Path) -> Option<String> {
    let number = std::fs::metadata(directory).ok()?.ino();
    let name: String = directory.file_name()?.to_string_lossy().chars().take(32).collect();
    Some(format!("{name}-{number}"))
}

/// Returns the limits that apply to a process, by file name, as read from its groups.
pub(crate) fn limits_of(pid: u32) -> BTreeMap<String, String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let hierarchies: Vec<(&str, &str, &str)> = mounts.lines().filter_map(hierarchy).collect();
    let mut limits = BTreeMap::new();
    // `5:memory:/nexus/NAME`, or `0::/nexus/NAME` of version 2.
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if !path.contains(&format!("/{ALL}/")) {
            continue;
        }
        let place = hierarchies.iter().find(|(kind, _, options)| match controllers {
            "" => *kind == "cgroup2",
            first => {
                *kind == "cgroup" && options.split(',').any(|word| first.split(',').any(|one| one == word))
            }
        });
        let Some((_, place, _)) = place else { continue };
        for file in LIMITS {
            let group = Path::new(place).join(path.trim_start_matches('/'));
            if let Ok(value) = std::fs::read_to_string(group.join(file)) {
                limits.insert(file.to_owned(), value.trim().to_owned());
            }
        }
    }
    limits
}

/// Files with limits.
const LIMITS: [&str; 9] = [
    "memory.max",
    "memory.limit_in_bytes",
    "pids.max",
    "cpu.weight",
    "cpu.shares",
    "io.weight",
    "io.bfq.weight",
    "blkio.weight",
    "blkio.bfq.weight",
];

/// Returns the kind, mount point and options of a mounted hierarchy; see proc_pid_mountinfo(5).
fn hierarchy(line: &str) -> Option<(&str, &str, &str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let (kind, _, options) = (filesystem.next()?, filesystem.next()?, filesystem.next()?);
    kind.starts_with("cgroup").then_some((kind, mount.split(' ').nth(4)?, options))
}

/// Returns the group below which this process may make groups: the root group for root, else the highest that it may write to.
fn parent_for(mount: &Path, own: &str, is_root: bool) -> Option<PathBuf> {
    if is_root {
        return Some(mount.to_owned());
    }
    let own = mount.join(own.trim_start_matches('/'));
    let may = |place: &&Path| {
        let write = rustix::fs::Access::WRITE_OK;
        rustix::fs::access(*place, write).is_ok()
            && rustix::fs::access(place.join("cgroup.procs"), write).is_ok()
    };
    own.ancestors()
        .skip(1)
        .take_while(|place| place.starts_with(mount))
        .filter(may)
        .last()
        .map(Path::to_owned)
}

fn words(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn make(directory: &Path) -> io::Result<()> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::plan::tests::plan;

    #[test]
    fn version_2_is_used_where_it_limits_memory() {
        // The kernel's files, imitated with ordinary files: this host may have no controllers in version 2.
        let root = tempfile::tempdir().unwrap();
        let place = root.path();
        std::fs::write(place.join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        std::fs::write(place.join("cgroup.subtree_control"), "cpu memory pids\n").unwrap();
        std::fs::create_dir(place.join("nexus")).unwrap();
        std::fs::write(place.join("nexus/cgroup.subtree_control"), "cpu memory pids io\n").unwrap();
        let mounts = format!(
            "31 23 0:27 / {} rw - cgroup2 cgroup2 rw\n30 2 0:2 / /x rw - cgroup cgroup rw,memory\n",
            place.display()
        );
        let groups = Groups::find(&mounts, "0::/a/b\n", true);
        assert_eq!(groups.version, 2);
        assert_eq!(groups.places.len(), 4);
        let group = place.join("nexus/vm");
        std::fs::create_dir(&group).unwrap();
        for file in ["memory.max", "pids.max", "cpu.weight"] {
            std::fs::write(group.join(file), "max").unwrap();
        }
        let lacking = groups.limit("vm", Limits::of(&plan()));
        assert_eq!(lacking, ["io: this kernel's controller has no such limit"]);
        let read = |file: &str| std::fs::read_to_string(group.join(file)).unwrap();
        assert_eq!(read("memory.max"), (((512 + 32 + 256 + 1024) << 20) as u64).to_string());
        assert_eq!((read("pids.max"), read("cpu.weight")), ("161".to_owned(), "100".to_owned()));
    }

    #[test]
    fn without_version_2_root_uses_version_1_and_others_use_none() {
        let mounts = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n33 31 0:3 / /c rw - cgroup cgroup rw,cpu,cpuacct\n";
        let groups = Groups::find(mounts, "4:memory:/\n", true);
        assert_eq!(groups.version, 1);
        assert_eq!(groups.places["memory"], Path::new("/sys/fs/cgroup/memory/nexus"));
        assert_eq!(groups.places["cpu"], Path::new("/c/nexus"));
        assert_eq!(groups.lacking, ["there is no controller pids", "there is no controller blkio"]);
        let groups = Groups::find(mounts, "4:memory:/\n", false);
        assert!(groups.places.is_empty() && groups.lacking.len() == 1);
    }

    #[test]
    fn a_process_of_this_host_is_limited_and_let_go() {
        let groups = Groups::look();
        let (found, lacking) = groups.describe();
        let Some(found) = found.filter(|_| rustix::process::geteuid().is_root()) else {
            return eprintln!("SKIPPED: this host has no control groups for this user: {lacking:?}");
        };
        let directory = tempfile::tempdir().unwrap();
        let name = name_of(directory.path()).unwrap();
        groups.limit(&name, Limits::of(&plan()));
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        groups.put(&name, child.id()).unwrap();
        let limits = limits_of(child.id());
        assert!(limits.contains_key("pids.max") || !found.contains("pids"), "{found}: {limits:?}");
        if let Some(memory) = limits.get("memory.max").or_else(|| limits.get("memory.limit_in_bytes")) {
            assert_eq!(memory, &Limits::of(&plan()).memory.to_string());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        groups.remove(&name);
        for place in groups.places.values() {
            assert!(!place.join(&name).exists());
        }
    }
}
