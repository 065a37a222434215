//! The memory of this process.

use std::sync::Once;

/// Makes the allocator give large blocks back as soon as they are free, for the whole process, from now on. Called more
/// than once, it does nothing more.
///
/// glibc learns from each large block that is freed to keep the next one, up to tens of megabytes on every thread. After
/// one kernel was unpacked that is most of a daemon's memory, and the next kernel comes in a week or never.
pub fn keep_lean() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        /// From this size on blocks are mapped and unmapped on their own: glibc's default, without its growth.
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        const LARGE: libc::c_int = 128 << 10;
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: mallopt takes two numbers and no pointers, and locks the arena that it changes.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
        }
    });
}
