//! Shuts the system down: a series of steps with a deadline each, and finally a restart of the machine.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nexus_schema::link::ByeReason;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use rustix::system::RebootCommand;

use super::keeper::Keeper;
use super::{Signals, reap};
use crate::console::{self, say};
use crate::os::{mount_points, read_small};

/// How long the agent may take to say bye and exit.
pub(super) const AGENT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long processes may take to end after SIGTERM.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the kernel may take to kill them.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);
/// Filesystems without data that must be written.
const KEPT: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/"];

/// Shuts the system down. Returns only if the kernel refuses to restart the machine.
pub(super) fn take_down(signals: &mut Signals, keeper: &mut Keeper, reason: ByeReason) {
    keeper.signal(match reason {
        ByeReason::Reboot => Signal::USR1,
        ByeReason::Poweroff => Signal::USR2,
    });
    wait(signals, keeper, AGENT_TIMEOUT, |keeper, _| !keeper.is_running());
    for (signal, timeout) in [(Signal::TERM, TERMINATE_TIMEOUT), (Signal::KILL, KILL_TIMEOUT)] {
        // To all other processes; fails if there are none.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), as_nix(signal));
        if wait(signals, keeper, timeout, |_, has_children| !has_children) {
            break;
        }
    }
    rustix::fs::sync();
    unmount();
    rustix::fs::sync();
    console::flush();
    // Also for powering off: the VMM is started so that a restart ends it, and not every machine has ACPI.
    if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
        say(format_args!("cannot restart the machine: {error}"));
    }
}

fn as_nix(signal: Signal) -> nix::sys::signal::Signal {
    if signal == Signal::KILL { nix::sys::signal::Signal::SIGKILL } else { nix::sys::signal::Signal::SIGTERM }
}

/// Reaps until `is_over` is true (given the keeper and whether there are children), or until the timeout.
fn wait(
    signals: &mut Signals,
    keeper: &mut Keeper,
    timeout: Duration,
    is_over: impl Fn(&Keeper, bool) -> bool,
) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let has_children = loop {
            match reap() {
                Some(Some(ended)) => keeper.ended(ended),
                Some(None) => break true,
                None => break false,
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if is_over(keeper, has_children) {
            return true;
        }
        if left.is_zero() || signals.wait(Some(left)).is_err() {
            return false;
        }
    }
}

/// Unmounts what it can, and makes the rest read-only.
fn unmount() {
    let table = read_small("/proc/self/mountinfo", 4 << 20).unwrap_or_default();
    // Links are followed, as in the mount table.
    let kept = KEPT.map(|path| std::fs::canonicalize(path).unwrap_or_else(|_| path.into()));
    for place in to_unmount(&table, &kept) {
        // Anything still busy is used by a process that could not be killed.
        let _ = rustix::mount::unmount(place, UnmountFlags::empty());
    }
    if let Err(error) = rustix::mount::mount_remount("/", MountFlags::RDONLY, c"") {
        say(format_args!("make the root filesystem read-only: {error}"));
    }
}

/// Returns the mount points of a mount table without those of `kept` and what is below them, the latest mount first.
fn to_unmount(table: &str, kept: &[PathBuf]) -> Vec<PathBuf> {
    let mut places: Vec<_> = mount_points(table).collect();
    places.retain(|place| {
        !kept.iter().any(|kept| place == kept || (kept.parent().is_some() && place.starts_with(kept)))
    });
    places.reverse();
    places
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn mount_points_with_blanks_are_unmounted_the_latest_first() {
        let table = "21 1 254:0 / / rw - ext4 /dev/vda rw\n\
            22 21 0:5 / /dev rw - devtmpfs dev rw\n\
            23 22 0:6 / /dev/pts rw - devpts pts rw\n\
            24 21 254:16 / /mnt/my\\040data rw - ext4 /dev/vdb rw\n\
            25 24 0:30 / /mnt/my\\040data/deep rw - tmpfs tmpfs rw\n";
        let kept = [PathBuf::from("/"), PathBuf::from("/dev")];
        assert_eq!(to_unmount(table, &kept), [Path::new("/mnt/my data/deep"), Path::new("/mnt/my data")]);
    }
}
