//! Private mounts that disappear with the process that made them.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// From now on, mounts made by this thread are visible only to it and to the threads and programs that it starts, and disappear
/// with the last of them. Mounts made by others stay visible. Makes system calls only, so it may be used between fork and exec.
///
/// If `/` is not a mount point, as in a chroot, mounts that are shared stay so: what is mounted below them is visible to others too, until it
/// is unmounted.
///
/// # Errors
/// `EPERM` if the caller may not mount at all.
pub(crate) fn begin() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    match mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none) {
        Err(nix::Error::EINVAL) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_is_no_mount_point_is_no_obstacle() {
        // Only in this thread.
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_FS).unwrap();
            nix::unistd::chroot("/usr").unwrap();
            begin()
        });
        thread.join().unwrap().unwrap();
    }
}
