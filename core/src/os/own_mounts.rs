//! Private mounts that disappear with the process that made them.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// From now on, mounts made by this thread are visible only to it and to the threads and programs that it starts, and disappear
/// with the last of them. Mounts made by others stay visible. Makes system calls only, so it may be used between fork and exec.
///
/// # Errors
/// `EPERM` if the caller may not mount at all. `EINVAL` if `/` is not a mount point, as in a chroot: existing shared mounts
/// then stay shared, and everything else is done.
pub(crate) fn begin() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
}
