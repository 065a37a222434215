//! Long operations: rows that outlive their client and the daemon, with progress that others can watch, and cancellation.
//! Also the caller of a call, because every call may start or join an operation.

mod call;
mod caught;
mod near;
mod once;
mod runner;

pub use call::CallContext;
pub(crate) use call::described;
pub(crate) use caught::{caught, message_of};
pub(crate) use near::did_you_mean;
pub(crate) use once::{Begun, once};
pub(crate) use runner::{Ops, StoredResult, no_op, store_error, summary};
