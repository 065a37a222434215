//! TAP devices: the only code of this process that creates and opens them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nexus_net_wire::tap;
use nix::libc;
use rustix::fs::OFlags;

/// Name pattern of TAPs; the kernel fills in the lowest free number.
const PATTERN: &str = "nx%d";

mod ioctl {
    nix::ioctl_write_int_bad!(set_persistent, 0x4004_54cb);
    nix::ioctl_write_int_bad!(set_owner, 0x4004_54cc);
}

/// An open TAP. Dropping it removes the TAP, unless it is persistent.
#[derive(Debug)]
pub(crate) struct Tap {
    device: OwnedFd,
    name: String,
}

impl Tap {
    /// Creates a TAP. The error is `NotFound` if the kernel has no TAP devices, or `/dev/net/tun` is missing.
    pub(crate) fn make() -> io::Result<Self> {
        Self::open(PATTERN)
    }

    /// Opens an existing TAP. The error is `ResourceBusy` if a VMM has it open.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let (device, name) = tap::open(name, OFlags::empty())?;
        Ok(Self { device, name })
    }

    /// Returns its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sets the user who may open it.
    pub(crate) fn set_owner(&self, uid: u32) -> io::Result<()> {
        let uid = libc::c_int::from_ne_bytes(uid.to_ne_bytes());
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_owner(self.device.as_raw_fd(), uid) }?;
        Ok(())
    }

    /// Makes it persistent: it stays when no program has it open.
    pub(crate) fn keep(&self) -> io::Result<()> {
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_persistent(self.device.as_raw_fd(), 1) }?;
        Ok(())
    }
}
