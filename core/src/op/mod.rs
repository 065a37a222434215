//! Long operations: rows that survive their client and the daemon, progress that others can watch, and cancellation.

mod log;
mod once;
mod progress;
mod runner;

pub(crate) use log::{Log, read as read_log};
pub(crate) use once::{Begun, once};
pub use progress::{Cancelled, Progress};
pub(crate) use runner::{Ops, StoredResult, store_error, summary};
