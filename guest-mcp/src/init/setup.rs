//! How PID 1 sets up a bare root filesystem. Failures are reported, but the VM stays usable.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::process::{Resource, Rlimit};

use crate::agent::bring_up_loopback;
use crate::console::say;
use crate::os::{mount, read_small, reason};
use crate::places::mounted_on;

/// Source, mount point, type and options of each filesystem, parents first.
const MOUNTS: [(&str, &str, &str, &str); 6] = [
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", "mode=755"),
    ("devpts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    // Without favordynmods (Linux 6.0) each command would wait for an RCU grace period to enter its cgroup.
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate,favordynmods"),
];
/// Links in /dev that udev would make.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];
/// The highest limit of file descriptors that a process may set for itself.
const DESCRIPTORS_MAX: u64 = 524_288;

/// Sets the system up.
pub(super) fn set_up() {
    for (source, place, kind, options) in MOUNTS {
        if mounted_on(Path::new(place)).is_some() {
            continue;
        }
        let mut result = mount(source, place, kind, options);
        if result.is_err() && kind == "cgroup2" {
            result = mount(source, place, kind, "");
        }
        if let Err(error) = result {
            say(format_args!("{}", nexus_schema::error::chain(&error)));
        }
    }
    for (target, link) in LINKS {
        // The image may already have it.
        let _ = symlink(target, link);
    }
    // Keeps the image's own, if there is one.
    if !Path::new("/run/lock").exists() {
        let lock = std::fs::create_dir_all("/run/lock")
            .and_then(|()| std::fs::set_permissions("/run/lock", std::fs::Permissions::from_mode(0o1777)));
        note("create /run/lock", lock);
    }
    note("bring up lo", bring_up_loopback());
    if let Some(name) = read_small("/etc/hostname", 256) {
        note("set the hostname", rustix::system::sethostname(name.trim().as_bytes()).map_err(Into::into));
    }
    let limit = Rlimit { current: Some(1024), maximum: Some(DESCRIPTORS_MAX) };
    note(
        "raise the limit of descriptors",
        rustix::process::setrlimit(Resource::Nofile, limit).map_err(Into::into),
    );
    // Turns Ctrl-Alt-Del into a signal instead of a reset.
    note(
        "catch Ctrl-Alt-Del",
        rustix::system::reboot(rustix::system::RebootCommand::CadOff).map_err(Into::into),
    );
}

fn note(what: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        say(format_args!("{what}: {}", reason(&error)));
    }
}
