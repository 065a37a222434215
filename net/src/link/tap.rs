//! TAP devices: the one place of this process that makes and opens them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nexus_net_wire::tap;
use nix::libc;
use rustix::fs::OFlags;

/// The kernel puts the lowest free number there.
const PATTERN: &str = "nx%d";

mod ioctl {
    nix::ioctl_write_int_bad!(set_persistent, 0x4004_54cb);
    nix::ioctl_write_int_bad!(set_owner, 0x4004_54cc);
}

/// A TAP that is open here, and goes with this value unless it was kept.
#[derive(Debug)]
pub(crate) struct Tap {
    device: OwnedFd,
    name: String,
}

impl Tap {
    /// Makes one. `NotFound`: the kernel has no TAP devices, or not here.
    pub(crate) fn make() -> io::Result<Self> {
        Self::open(PATTERN)
    }

    /// Opens one that is there. `ResourceBusy`: a VMM has it open.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let (device, name) = tap::open(name, OFlags::empty())?;
        Ok(Self { device, name })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Lets a user open it.
    pub(crate) fn set_owner(&self, uid: u32) -> io::Result<()> {
        let uid = libc::c_int::from_ne_bytes(uid.to_ne_bytes());
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_owner(self.device.as_raw_fd(), uid) }?;
        Ok(())
    }

    /// Lets it stay when nobody has it open any more.
    pub(crate) fn keep(&self) -> io::Result<()> {
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_persistent(self.device.as_raw_fd(), 1) }?;
        Ok(())
    }
}
