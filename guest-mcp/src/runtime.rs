//! The runtime of an agent or a holder: one thread for all asynchronous work, and a small thread pool for work that may block on a disk.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// How long an idle thread of the pool is kept. At least one must always exist: when memory is short no thread can be created, and the attempt would
/// panic.
const KEEP_ALIVE: Duration = Duration::from_hours(24 * 365);
/// The stack size of a thread of the pool, in bytes.
const STACK: usize = 256 << 10;

/// Creates a runtime with at most `threads` threads in its pool, for this thread, which must live as long as the process.
pub(crate) fn with_pool(threads: usize) -> io::Result<Runtime> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(threads)
        .thread_keep_alive(KEEP_ALIVE)
        .thread_stack_size(STACK)
        .build()?;
    crate::memory::keep_free_blocks();
    // Creates the first thread of the pool now, while there is memory.
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}
