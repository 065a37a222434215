//! Long operations: rows that survive their client and the daemon, progress that others can watch, and cancellation; and who
//! calls, since every call may begin or join one.

mod call;
mod caught;
mod near;
mod once;
mod runner;

pub(crate) use call::described;
pub use call::{CallContext, Caller};
pub(crate) use caught::{caught, message_of};
pub(crate) use near::did_you_mean;
pub(crate) use once::{Begun, once};
pub(crate) use runner::{Ops, StoredResult, store_error, summary};
