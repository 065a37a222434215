//! Identifies the boot of the host.

use std::sync::OnceLock;

/// The id that the kernel generated at boot; `None` if it is not available.
pub(crate) fn of_host() -> Option<&'static str> {
    static ID: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let id = text.trim();
        let is_sound = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        is_sound.then(|| id.to_owned())
    };
    ID.get_or_init(read).as_deref()
}
