//! The host's side of the connections with guests: hello and bye, one multiplexed MCP connection into each guest, and separate streams.
//!
//! Everything that a guest sends is treated as hostile. The length of lines and results and the depth of JSON are limited, every wait
//! for a guest has a deadline, nothing that a guest sends causes a panic, and a guest's description of itself is shortened before
//! other modules see it. This module does not use the store, and does not decide who may call.

mod clock;
mod hello;
pub mod lines;
mod link;
pub mod result;
pub mod scan;
mod stream;
pub mod wire;

pub(crate) use clock::{ClockKeeper, set_clock};
pub use hello::{GuestEvent, HelloServer, Recorded, Restored};
pub use link::{
    CallId, CallMeta, CallSink, GuestProgress, Link, LinkError, LinkState, Offers, Question, Reply, UP_WAIT,
};
pub(crate) use link::{Dialled, Era, STANDSTILL};
pub(crate) use stream::{EARLY_MAX, Way, connect};
pub use stream::{GuestStream, StreamError};
