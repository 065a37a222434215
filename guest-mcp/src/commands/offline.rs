//! Detects commands that failed because the VM has no network. The result then names the cause, which is hard to see in the output.

use std::path::Path;

/// What programs print without a network: libc's and BusyBox's resolvers, apt, curl, git, pip, Node.js, Go.
const SIGNS: [&[u8]; 10] = [
    b"Temporary failure in name resolution",
    b"Temporary failure resolving",
    b"Could not resolve host",
    b"Could not resolve '",
    b"Name or service not known",
    b"No address associated with hostname",
    b"etwork is unreachable",
    b"wget: bad address",
    b"getaddrinfo EAI_AGAIN",
    b"dial tcp: lookup ",
];
/// The directory of the kernel's network interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Returns whether a command's output shows that it lacked a network, and the VM has none.
pub(super) fn is_why(output: &[u8]) -> bool {
    SIGNS.iter().any(|sign| output.windows(sign.len()).any(|window| window == *sign))
        && !has_interface(Path::new(INTERFACES))
}

/// Returns whether an interface has a device behind it; the loopback interface and tunnels have none.
fn has_interface(directory: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else { return true };
    entries.flatten().any(|entry| entry.path().join("device").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_with_a_device_are_a_network() {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("lo")).unwrap();
        assert!(!has_interface(base.path()));
        std::fs::create_dir_all(base.path().join("eth0/device")).unwrap();
        assert!(has_interface(base.path()));
        // Without /sys, a network is assumed.
        assert!(has_interface(&base.path().join("nothing")));
    }
}
