//! TAP devices of the host: a VM's end of its network interface.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use super::paths::TUN;

/// The longest name of a device, in bytes, with the zero at its end: `IFNAMSIZ`.
const NAME_MAX: usize = 16;
/// `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR` of linux/if_tun.h: frames of Ethernet, each behind a header of virtio.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq` of linux/if.h, as TUNSETIFF takes it.
#[repr(C)]
struct Request {
    name: [u8; NAME_MAX],
    flags: u16,
    unused: [u8; 22],
}

const TUNSETIFF: Opcode = opcode::write::<libc::c_int>(b'T', 202);

/// Connects to a TAP device that is there already, by its name in this process's network namespace. It is nobody else's until
/// the descriptor is closed.
pub(crate) fn connect(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains(['\0', '%', '/']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a device"));
    }
    if rustix::net::netdevice::name_to_index(&any_socket()?, name).is_err() {
        // It would be made, and nobody would know of it.
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such device"));
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open(TUN, flags, Mode::empty())?;
    let mut request = Request { name: [0; NAME_MAX], flags: FLAGS, unused: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a `struct ifreq` and writes its name back, which `Request` is laid out as; the name ends in a zero.
    unsafe { ioctl(&device, Updater::<TUNSETIFF, Request>::new(&mut request))? };
    Ok(device)
}

fn any_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// Whether this process may use TAP devices at all; why not, in words.
pub(crate) fn check() -> Result<(), String> {
    match File::options().read(true).write(true).open(TUN) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{TUN}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_not_made() {
        for name in ["", "nx%d", "0123456789abcdef", "a/b"] {
            assert_eq!(connect(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
        assert_eq!(connect("nx-none").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn requests_are_as_long_as_the_kernels() {
        assert_eq!(size_of::<Request>(), 40);
    }
}
