//! The heap of this process: few arenas, large blocks mapped on their own, and what is free given back.

use std::sync::Once;

/// How many arenas the heap may have: each keeps free memory of its own.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;
/// From this size on, in bytes, blocks are mapped and unmapped on their own: glibc's default, without its growth.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Makes the allocator give large blocks back as soon as they are free, for the whole process, from now on. Best called
/// before the first thread is started; called more than once, it does nothing more.
///
/// glibc learns from each large block that is freed to keep the next one, up to tens of megabytes on every thread. After
/// one kernel was unpacked that is most of a daemon's memory, and the next kernel comes in a week or never.
pub fn keep_lean() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(target_env = "gnu")]
        // SAFETY: mallopt takes two numbers and no pointers, and locks the arena that it changes.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
        }
    });
}

/// Gives free memory back to the system; takes a millisecond or so.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number only; the allocator guards its own state.
    unsafe {
        libc::malloc_trim(0);
    }
}
