//! Mounts that nobody else sees, and that are gone with whoever made them.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// From now on, what this thread mounts is seen only by it and by the threads and programs that it starts, and is gone with the
/// last of them. What others mount is still seen. Makes system calls only, so that it may stand between fork and exec.
///
/// # Errors
/// `EPERM` for who may not mount either. `EINVAL` where `/` is no mount point, as in a chroot: then what was to be shared with others
/// still is, and the rest is done.
pub(crate) fn begin() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
}
