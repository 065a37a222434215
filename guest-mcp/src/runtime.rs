//! The runtime of an agent and of a holder: one thread for all that waits, and a small pool for what may block on a disk.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// How long a thread of the pool waits for work. One at least is to be there always: when memory is short no new one can be made, and
/// asking for one would be the end of whoever asks.
const KEEP_ALIVE: Duration = Duration::from_hours(24 * 365);
/// The stack of a thread of the pool, in bytes.
const STACK: usize = 256 << 10;

/// A runtime with at most so many threads in its pool.
pub(crate) fn with_pool(threads: usize) -> io::Result<Runtime> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(threads)
        .thread_keep_alive(KEEP_ALIVE)
        .thread_stack_size(STACK)
        .build()?;
    // The first thread of the pool, made while there is memory.
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}
