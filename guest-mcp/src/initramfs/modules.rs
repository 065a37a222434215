//! Loads the kernel modules of the initramfs, in the listed order.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;

use super::BootError;
use crate::console::say;
use crate::os::read_small;

const DIRECTORY: &str = "/modules";
const ORDER: &str = "order";
/// The devices of the virtio bus; the file `device` of each holds its type.
const DEVICES: &str = "/sys/bus/virtio/devices";
/// Modules that are loaded only for a device of a type (virtio 1.2, section 5), as the kernel writes it: network interfaces, serial
/// ports, vsock.
const ONLY_FOR: [(&str, &[&str]); 3] = [
    ("0x0001", &["failover", "net_failover", "virtio_net"]),
    ("0x0003", &["virtio_console"]),
    ("0x0013", &["vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"]),
];

/// Loads the needed modules. A module that the kernel refuses is reported and skipped; what depends on it fails with a better
/// reason. Returns how many modules came with the initramfs.
pub(super) fn load() -> Result<usize, BootError> {
    let directory = Path::new(DIRECTORY);
    let order = read_small(directory.join(ORDER), 64 << 10).unwrap_or_default();
    let names = || order.lines().map(str::trim).filter(|name| !name.is_empty());
    for name in names() {
        // Checked for each of them, because one of the first modules provides the bus itself.
        let needed_for = ONLY_FOR.iter().find(|(_, modules)| modules.contains(&plain(name)));
        if needed_for.is_some_and(|(kind, _)| !has_device(kind)) {
            continue;
        }
        let path = directory.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(BootError::File { what: "open the module", path, source }),
        };
        match rustix::system::finit_module(&file, c"", 0) {
            // Built in, or loaded already.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => say(format_args!("load the module {name}: {error}")),
        }
    }
    Ok(names().count())
}

/// Returns a module's name: `virtio_net` for `04-virtio_net.ko`.
fn plain(file: &str) -> &str {
    let name = file.strip_suffix(".ko").unwrap_or(file);
    name.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches('-')
}

/// Returns whether there is a device of this type; also true if that is unknown.
fn has_device(wanted: &str) -> bool {
    let Ok(devices) = std::fs::read_dir(DEVICES) else { return true };
    devices
        .flatten()
        .any(|device| read_small(device.path().join("device"), 64).is_none_or(|kind| kind.trim() == wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_their_names() {
        assert_eq!(plain("04-virtio_net.ko"), "virtio_net");
        assert_eq!(plain("failover.ko"), "failover");
    }
}
