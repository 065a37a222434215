//! Boots that fail because of the emulator, not the guest. The daemon retries them once.
//!
//! *A lost timer.* Linux measures the frequency of its local APIC's timer against the TSC for a tenth of a second. Under software emulation the
//! TSC is the host's. If the emulator is stalled right then, as on a busy host, the guest sees that the TSC advances and the timer
//! does not. It assumes that the timer is broken and disables it. With several processors the guest then hangs forever; with one it uses
//! an older timer (`calibrate_APIC_clock` of Linux's arch/x86/kernel/apic/apic.c). The kernel logs this, and the kernel
//! command line of the driver `qemu` keeps that log level on.
//!
//! *A kernel that crashes.* With two emulated processors on a busy host, 3 of some 300 kernels died of an exception while they booted under
//! QEMU 7.2, each at a different place; none of 100 did under QEMU 10. The VMM then exits.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Message of a kernel that has lost its timer.
const TIMER_LOST: &[u8] = b"APIC frequency too slow, disabling apic timer";
/// Message of a kernel that crashes by itself. Other panics, such as a missing init, have other messages.
const CRASHED: &[u8] = b"Kernel panic - not syncing: Fatal exception";
/// Interval between two checks of the console while the kernel boots.
const LOOK: Duration = Duration::from_secs(1);
/// Part of the console that is searched, in bytes from its end.
const SEARCHED: usize = 64 << 10;

/// Waits until the console in a VM's directory shows that the guest has lost its timer.
pub(super) async fn until_timer_lost(directory: PathBuf) {
    loop {
        tokio::time::sleep(LOOK).await;
        if says(directory.clone(), TIMER_LOST).await {
            return;
        }
    }
}

/// Returns whether the console in a VM's directory shows that the guest's kernel crashed.
pub(super) async fn is_crashed(directory: &Path) -> bool {
    says(directory.to_owned(), CRASHED).await
}

async fn says(directory: PathBuf, words: &'static [u8]) -> bool {
    let search =
        move || memchr::memmem::find(&crate::vmm::console::tail(&directory, SEARCHED), words).is_some();
    tokio::task::spawn_blocking(search).await.unwrap_or(false)
}
