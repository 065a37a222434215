//! The two btrfs ioctls that make subvolumes. Ordinary users may make them, and snapshot their own.

use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

/// `BTRFS_SUPER_MAGIC`, linux/magic.h.
pub(crate) const MAGIC: i64 = 0x9123_683e;
/// `BTRFS_FIRST_FREE_OBJECTID`: the inode of every subvolume's root.
pub(crate) const ROOT_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args_v2`, linux/btrfs.h.
#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

const SNAP_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(0x94, 23);
const SUBVOL_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(0x94, 24);

/// Makes an empty subvolume.
pub(crate) fn create(path: &Path) -> Result<(), Errno> {
    let parent = open(path.parent().ok_or(Errno::INVAL)?)?;
    let args = arguments(0, path)?;
    // SAFETY: BTRFS_IOC_SUBVOL_CREATE_V2 reads a `btrfs_ioctl_vol_args_v2`, which `VolArgsV2` is laid out as; the name in it
    // ends in a zero.
    unsafe { ioctl(parent, Setter::<SUBVOL_CREATE_V2, VolArgsV2>::new(args)) }
}

/// Makes a writable snapshot of the subvolume `of`.
pub(crate) fn snapshot(of: &Path, path: &Path) -> Result<(), Errno> {
    let parent = open(path.parent().ok_or(Errno::INVAL)?)?;
    let of = open(of)?;
    let args = arguments(i64::from(of.as_raw_fd()), path)?;
    // SAFETY: BTRFS_IOC_SNAP_CREATE_V2 reads a `btrfs_ioctl_vol_args_v2`, which `VolArgsV2` is laid out as; the name in it
    // ends in a zero, and `of` is open until after the call.
    unsafe { ioctl(parent, Setter::<SNAP_CREATE_V2, VolArgsV2>::new(args)) }
}

fn open(directory: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    openat(CWD, directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn arguments(fd: i64, path: &Path) -> Result<VolArgsV2, Errno> {
    let name = path.file_name().ok_or(Errno::INVAL)?.as_bytes();
    if name.len() > 255 {
        return Err(Errno::NAMETOOLONG);
    }
    let mut args = VolArgsV2 { fd, transid: 0, flags: 0, unused: [0; 4], name: [0; 4040] };
    args.name[..name.len()].copy_from_slice(name);
    Ok(args)
}
