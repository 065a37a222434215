//! The host's side of the guest link: hello and bye, the one multiplexed MCP connection into each guest, and streams of their own.
//!
//! Everything that a guest says is hostile until proven otherwise. Lines, results and JSON depth are capped, nothing waits
//! for a guest without a deadline, nothing that a guest sends ends in a panic, and what it describes of itself is cut to
//! size before anyone else sees it. Nothing here sees the store; who may call is decided elsewhere.

mod clock;
mod hello;
pub mod lines;
mod link;
pub mod result;
pub mod scan;
mod stream;
pub mod wire;

pub(crate) use clock::ClockKeeper;
pub use hello::{GuestEvent, HelloServer};
pub(crate) use link::STANDSTILL;
pub use link::{CallId, CallMeta, CallSink, GuestProgress, Link, LinkError, LinkState, UP_WAIT};
pub use stream::{GuestStream, StreamError};
