//! Loads the kernel modules that came with the initramfs, in the order that it lists.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;

use super::BootError;
use crate::console::say;
use crate::os::read_small;

const DIRECTORY: &str = "/modules";
const ORDER: &str = "order";
/// Where the devices of the virtio bus are; each has a file `device` with what kind it is of.
const DEVICES: &str = "/sys/bus/virtio/devices";
/// What kind a network interface is of (virtio 1.2, section 5), as the kernel writes it.
const NETWORK: &str = "0x0001";
/// What is loaded only for network interfaces.
const FOR_NETWORK: [&str; 3] = ["failover", "net_failover", "virtio_net"];

/// Loads those that are needed. One that the kernel does not take is said and skipped: what needs it fails with a better reason.
/// Returns how many came with the initramfs.
pub(super) fn load() -> Result<usize, BootError> {
    let directory = Path::new(DIRECTORY);
    let order = read_small(directory.join(ORDER), 64 << 10).unwrap_or_default();
    let names = || order.lines().map(str::trim).filter(|name| !name.is_empty());
    for name in names() {
        // Asked for each, since the bus itself comes with one of the first.
        if FOR_NETWORK.contains(&plain(name)) && !has_network() {
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

/// A module's name: `virtio_net` for `04-virtio_net.ko`.
fn plain(file: &str) -> &str {
    let name = file.strip_suffix(".ko").unwrap_or(file);
    name.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches('-')
}

/// Whether there is a network interface, or it cannot be told.
fn has_network() -> bool {
    let Ok(devices) = std::fs::read_dir(DEVICES) else { return true };
    devices
        .flatten()
        .any(|device| read_small(device.path().join("device"), 64).is_none_or(|kind| kind.trim() == NETWORK))
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
