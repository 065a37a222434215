//! Guests that do not come up because of the emulator under them. They are started once more.
//!
//! *A lost timer.* Linux measures the frequency of its local APIC's timer against the TSC for a tenth of a second. Under software emulation the
//! TSC is the host's: if the emulator stands still right then, as on a busy host, the guest sees the TSC run on and the timer
//! not, takes the timer for broken and goes on without. With several processors it then waits for ever, with one it ticks by
//! an older timer (`calibrate_APIC_clock` of Linux's arch/x86/kernel/apic/apic.c). It prints what has happened, which the kernel's
//! command line of the driver `qemu` lets through.
//!
//! *A kernel that crashes.* With two emulated processors on a busy host, 3 of some 300 kernels died of an exception while they booted under
//! QEMU 7.2, each at another place; none of 100 did under QEMU 10. The VMM ends then.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the kernel prints that has lost its timer.
const TIMER_LOST: &[u8] = b"APIC frequency too slow, disabling apic timer";
/// What the kernel prints that crashes by itself. One that finds no init, say, prints something else.
const CRASHED: &[u8] = b"Kernel panic - not syncing: Fatal exception";
/// How often the console is looked at, while the kernel boots.
const LOOK: Duration = Duration::from_secs(1);
/// How much of the console is searched, in bytes from its end.
const SEARCHED: usize = 64 << 10;

/// Waits until the guest in a VM's directory says that it has lost its timer.
pub(super) async fn until_timer_lost(directory: PathBuf) {
    loop {
        tokio::time::sleep(LOOK).await;
        if says(directory.clone(), TIMER_LOST).await {
            return;
        }
    }
}

/// Whether the guest in a VM's directory says that its kernel crashed.
pub(super) async fn is_crashed(directory: &Path) -> bool {
    says(directory.to_owned(), CRASHED).await
}

async fn says(directory: PathBuf, words: &'static [u8]) -> bool {
    let search =
        move || memchr::memmem::find(&crate::vmm::console::tail(&directory, SEARCHED), words).is_some();
    tokio::task::spawn_blocking(search).await.unwrap_or(false)
}
