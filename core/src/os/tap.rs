//! TAP devices of the host: the host's end of a VM's network interface.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nexus_net_wire::hand;
use nexus_net_wire::tap::{self, NAME_MAX};
use rustix::fs::OFlags;

use super::paths::TUN;
use super::socket::connect_in;

/// Timeout of `nexus-net` to hand a device over.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Opens an existing TAP device, by its name in this process's network namespace. No other process can open it until the
/// descriptor is closed.
pub(crate) fn connect(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains(['\0', '%', '/']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a valid device name"));
    }
    if rustix::net::netdevice::name_to_index(&any_socket()?, name).is_err() {
        // Otherwise the kernel would create a new device.
        return Err(io::Error::new(io::ErrorKind::NotFound, "no such device"));
    }
    Ok(tap::open(name, OFlags::NONBLOCK)?.0)
}

/// Takes an existing TAP device, already open, from the `nexus-net` whose sockets are in `directory`: it is in a network namespace of its own.
/// No other process can open the device until the descriptor is closed.
pub(crate) fn take(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let stream = connect_in(directory, hand::SOCKET)?;
    stream.set_read_timeout(Some(HAND_OVER))?;
    stream.set_write_timeout(Some(HAND_OVER))?;
    hand::take(&stream, name)
}

fn any_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// Checks whether this process may use TAP devices at all; the error says why not.
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
}
