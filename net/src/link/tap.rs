//! TAP devices, by their ioctls: the one place of this process that opens `/dev/net/tun`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;

use nix::libc;

/// Where the kernel makes them.
const TUN: &str = "/dev/net/tun";
/// The kernel puts the lowest free number there.
const PATTERN: &[u8] = b"nx%d";

/// `struct ifreq`, as far as TUNSETIFF looks at it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, super::Request);
    nix::ioctl_write_int_bad!(set_persistent, 0x4004_54cb);
    nix::ioctl_write_int_bad!(set_owner, 0x4004_54cc);
}

/// A TAP that is open here, and goes with this value unless it was kept.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Makes one. `NotFound`: the kernel has no TAP devices, or not here.
    pub(crate) fn make() -> io::Result<Self> {
        Self::open_as(PATTERN)
    }

    /// Opens one that is there. `ResourceBusy`: a VMM has it open.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        Self::open_as(name.as_bytes())
    }

    fn open_as(name: &[u8]) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(TUN)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let mut request = Request {
            name: [0; libc::IFNAMSIZ],
            flags: libc::c_short::try_from(flags).unwrap_or_default(),
            padding: [0; 22],
        };
        let name = name.get(..libc::IFNAMSIZ - 1).unwrap_or(name);
        request.name[..name.len()].copy_from_slice(name);
        // SAFETY: the descriptor is open, and the request is as long as the kernel's `struct ifreq`, into which it writes the name.
        unsafe { ioctl::set_interface(file.as_raw_fd(), &raw const request) }?;
        let end = request.name.iter().position(|byte| *byte == 0).unwrap_or(request.name.len());
        let name = String::from_utf8_lossy(&request.name[..end]).into_owned();
        Ok(Self { file, name })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Lets a user open it.
    pub(crate) fn set_owner(&self, uid: u32) -> io::Result<()> {
        let uid = libc::c_int::from_ne_bytes(uid.to_ne_bytes());
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_owner(self.file.as_raw_fd(), uid) }?;
        Ok(())
    }

    /// Lets it stay when nobody has it open any more.
    pub(crate) fn keep(&self) -> io::Result<()> {
        // SAFETY: the descriptor is that of a TAP, and the argument is a number.
        unsafe { ioctl::set_persistent(self.file.as_raw_fd(), 1) }?;
        Ok(())
    }
}
