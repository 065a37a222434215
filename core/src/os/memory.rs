//! Keeps the heap of this process small: few arenas, large blocks mapped separately, and free memory returned.

use std::sync::Once;

/// The maximum number of arenas; each keeps free memory of its own.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;
/// Blocks of this size in bytes, and larger ones, are mapped and unmapped separately. This is glibc's default, without
/// its dynamic growth.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Makes the allocator of the whole process return large blocks as soon as they are freed. Call it before the first
/// thread is started; further calls have no effect.
///
/// By default, glibc raises its threshold whenever a large block is freed, and so keeps up to tens of megabytes per
/// thread. After unpacking one kernel that would be most of a daemon's memory, although the next kernel may come in a week or never.
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

/// Returns free memory to the system; takes about a millisecond.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number only; the allocator guards its own state.
    unsafe {
        libc::malloc_trim(0);
    }
}
