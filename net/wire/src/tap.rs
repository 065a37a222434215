//! Opens TAP devices: for `nexus-net`, which creates them, and for the process that runs the VM.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// The device file for TAP devices.
pub const DEVICE: &str = "/dev/net/tun";

/// Maximum length of a network device's name, in bytes, including the terminating NUL: `IFNAMSIZ`.
pub const NAME_MAX: usize = 16;

/// `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR` of linux/if_tun.h: Ethernet frames, each after a virtio header.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq` of linux/if.h, with the fields that TUNSETIFF uses.
#[repr(C)]
struct Request {
    name: [u8; NAME_MAX],
    flags: u16,
    unused: [u8; 22],
}

const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);

/// Opens a TAP device by its name in this process's network namespace, or creates it there: for a name such as `nx%d` the one with the lowest
/// free number. Also returns its name. `more` are additional flags, such as `NONBLOCK`.
///
/// # Errors
/// `InvalidInput` if the name is empty or too long; `NotFound` if the kernel has no TAP devices, or [`DEVICE`] is missing; `ResourceBusy` if
/// another process has it open; otherwise the kernel's error.
pub fn open(name: &str, more: OFlags) -> io::Result<(OwnedFd, String)> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a valid device name"));
    }
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC | more, Mode::empty())?;
    let mut request = Request { name: [0; NAME_MAX], flags: FLAGS, unused: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a `struct ifreq` and writes the name back. `Request` has its layout, and the name ends with a NUL.
    unsafe { ioctl(&device, Updater::<TUNSETIFF, Request>::new(&mut request))? };
    let end = request.name.iter().position(|byte| *byte == 0).unwrap_or(NAME_MAX);
    Ok((device, String::from_utf8_lossy(&request.name[..end]).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_as_long_as_the_kernels() {
        assert_eq!(size_of::<Request>(), 40);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "0123456789abcdef", "a\0b"] {
            assert_eq!(
                open(name, OFlags::empty()).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{name}"
            );
        }
    }
}
