//! Guests that lose their timer while they boot.
//!
//! Linux measures the frequency of its local APIC's timer against the TSC for a tenth of a second. Under software emulation the
//! TSC is the host's: if the emulator stands still right then, as on a busy host, the guest sees the TSC run on and the timer
//! not, takes the timer for broken and goes on without. With several processors it then waits for ever, with one it ticks by
//! an older timer (`calibrate_APIC_clock` of Linux's arch/x86/kernel/apic/apic.c). It prints what has happened, which the kernel's
//! command line of the driver `qemu` lets through, and then the VM is started once more.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the kernel prints.
const LOST: &[u8] = b"APIC frequency too slow, disabling apic timer";
/// How often the console is looked at, while the kernel boots.
const LOOK: Duration = Duration::from_secs(1);
/// How much of the console is searched, in bytes from its end.
const SEARCHED: usize = 64 << 10;

/// Waits until the guest in a VM's directory says that it has lost its timer.
pub(super) async fn until_lost(directory: PathBuf) {
    loop {
        tokio::time::sleep(LOOK).await;
        let directory = directory.clone();
        if let Ok(true) = tokio::task::spawn_blocking(move || is_lost(&directory)).await {
            return;
        }
    }
}

fn is_lost(directory: &Path) -> bool {
    let console = crate::vmm::console::tail(directory, SEARCHED);
    memchr::memmem::find(&console, LOST).is_some()
}
