//! Filesystems for tests: made in a file and mounted by a loop device. They are unmounted and removed when the value is
//! dropped, or when the thread ends, because a killed test drops nothing.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::own_mounts;

/// A mounted filesystem.
#[derive(Debug)]
pub(crate) struct Mounted {
    base: TempDir,
    point: PathBuf,
}

impl Mounted {
    /// A new world-writable filesystem (`btrfs`, `xfs` or `ext4`) of this many mebibytes.
    pub(crate) fn fresh(kind: &str, mebibytes: u64) -> Self {
        Self::in_base(tempfile::tempdir().unwrap(), kind, mebibytes)
    }

    /// The same, with its file in a directory.
    pub(crate) fn fresh_in(directory: &Path, kind: &str, mebibytes: u64) -> Self {
        Self::in_base(tempfile::tempdir_in(directory).unwrap(), kind, mebibytes)
    }

    fn in_base(base: TempDir, kind: &str, mebibytes: u64) -> Self {
        let file = base.path().join("disk");
        std::fs::File::create_new(&file).unwrap().set_len(mebibytes << 20).unwrap();
        let quiet: &[&str] = match kind {
            "ext4" => &["-q", "-F", "-m", "0"],
            _ => &["-q", "-f"],
        };
        run(Command::new(format!("/sbin/mkfs.{kind}")).args(quiet).arg(&file));
        let mounted = Self::mount(base, &file, "rw");
        std::os::unix::fs::chown(mounted.path(), None, None).unwrap();
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        std::fs::set_permissions(mounted.path(), everybody).unwrap();
        mounted
    }

    /// The filesystem in a file, read-only.
    pub(crate) fn read_only(file: &Path) -> Self {
        Self::mount(tempfile::tempdir().unwrap(), file, "ro,noload")
    }

    /// The filesystem in a file.
    pub(crate) fn writable(file: &Path) -> Self {
        Self::mount(tempfile::tempdir().unwrap(), file, "rw")
    }

    fn mount(base: TempDir, file: &Path, options: &str) -> Self {
        keep_mounts_to_this_thread();
        let point = base.path().join("mount");
        std::fs::create_dir(&point).unwrap();
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(base.path(), everybody).unwrap();
        run(Command::new("/bin/mount").arg("-o").arg(format!("loop,{options}")).arg(file).arg(&point));
        Self { base, point }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.point
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The loop device is removed with the mount.
        let unmounted = Command::new("/bin/umount").arg(&self.point).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let lazily = Command::new("/bin/umount").arg("-l").arg(&self.point).status();
            eprintln!("{} unmounted lazily: {lazily:?}", self.base.path().display());
        }
    }
}

/// Further mounts are visible only to this thread, and to the threads and programs that it starts.
fn keep_mounts_to_this_thread() {
    thread_local!(static KEPT: Cell<bool> = const { Cell::new(false) });
    if !KEPT.replace(true) {
        own_mounts::begin().expect("this test has to run as root");
    }
}

/// Runs a program, which must succeed.
pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `work` as an ordinary user, whose uid it gets, on a new thread (with the threads and programs that it starts). The
/// test itself must run as root.
pub(crate) fn as_user<T: Send>(work: impl Future<Output = T> + Send) -> T {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    assert!(rustix::process::geteuid().is_root(), "this test has to run as root");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The uid of [`as_user`].
pub(crate) const USER: u32 = 54_321;

/// A temporary directory of that user.
pub(crate) fn directory_of_user() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(USER), Some(USER)).unwrap();
    directory
}
