//! Long operations: rows that survive their client and the daemon, progress that others can watch, and cancellation.

mod progress;
mod runner;

pub use progress::{Cancelled, Progress};
pub(crate) use runner::{Ops, StoredResult, store_error, summary};
