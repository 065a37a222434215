//! Loads the kernel modules that came with the initramfs, in the order that it lists.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;

use super::BootError;
use crate::console::say;
use crate::os::read_small;

const DIRECTORY: &str = "/modules";
const ORDER: &str = "order";

/// Loads all of them. One that the kernel does not take is said and skipped: what needs it fails with a better reason.
pub(super) fn load() -> Result<(), BootError> {
    let directory = Path::new(DIRECTORY);
    let order = read_small(directory.join(ORDER), 64 << 10).unwrap_or_default();
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
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
    Ok(())
}
