//! What carries the connections between host and guest: the shim's part of it, and QEMU's devices.

use std::os::fd::OwnedFd;
use std::path::Path;

use nexus_vsock::Nonce;
use nexus_vsock::serial::PORTS;

use super::machine::Machine;
use crate::os::paths::vm_files;
use crate::os::socket::connect_in;
use crate::vmm::driver::DriverError;
use crate::vmm::plan::Link;
use crate::vmm::vsock::{Backend, SerialLink};

/// The shim's part. It ends on drop.
pub(super) enum GuestLink {
    /// The vsock device itself.
    Vsock(#[expect(dead_code, reason = "it works until it is dropped")] Backend),
    /// What speaks over the ports of a virtio-serial device.
    Serial(SerialLink),
}

impl GuestLink {
    /// Starts it. Also returns the descriptors to pass to QEMU, [`descriptors`] of them.
    pub(super) fn start(link: Link, cid: u32) -> Result<(Self, Vec<OwnedFd>), DriverError> {
        let failed = |source| DriverError::Vsock { source };
        let uds = Path::new(vm_files::VSOCK);
        match link {
            Link::Vsock => {
                let backend = Backend::start(cid, Path::new(vm_files::VHOST), uds).map_err(failed)?;
                let device = connect_in(Path::new("."), vm_files::VHOST)
                    .map_err(|source| DriverError::Connection { source })?;
                Ok((Self::Vsock(backend), vec![device.into()]))
            }
            Link::Serial => {
                let (serial, ports) = SerialLink::start(uds).map_err(failed)?;
                Ok((Self::Serial(serial), ports.into()))
            }
        }
    }

    /// Asks the guest to begin new sessions with this nonce, after it was restored.
    pub(super) fn relink(&self, nonce: &str) -> Result<(), DriverError> {
        let Self::Serial(serial) = self else {
            return Err(DriverError::Unsupported { what: "a vsock device" });
        };
        let nonce = nonce
            .parse::<Nonce>()
            .map_err(|error| DriverError::Vsock { source: std::io::Error::other(error) })?;
        serial.relink(nonce);
        Ok(())
    }
}

/// Returns how many descriptors [`GuestLink::start`] makes.
pub(super) const fn descriptors(link: Link) -> i32 {
    match link {
        Link::Vsock => 1,
        Link::Serial => 3,
    }
}

/// Adds the devices to a command line. `first` is the number of the first descriptor in QEMU.
pub(super) fn devices(link: Link, first: i32, board: &mut Machine, mut option: impl FnMut(&str, String)) {
    match link {
        Link::Vsock => {
            option("-chardev", format!("socket,id=vsock,fd={first}"));
            option("-device", board.device("vhost-user-vsock-device,chardev=vsock"));
        }
        Link::Serial => {
            // Port 0 is kept for a console.
            let device = format!("virtio-serial-device,id=link,max_ports={}", PORTS.len() + 1);
            option("-device", board.device(&device));
            for (index, (name, fd)) in PORTS.into_iter().zip(first..).enumerate() {
                let number = index + 1;
                option("-chardev", format!("socket,id=port{number},fd={fd}"));
                option(
                    "-device",
                    format!("virtserialport,bus=link.0,nr={number},chardev=port{number},name={name}"),
                );
            }
        }
    }
}
