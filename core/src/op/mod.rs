//! Long operations: progress that others can watch, and cancellation.

mod progress;

pub use progress::{Cancelled, Progress};
