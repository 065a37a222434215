//! What both ends of a link between daemon and guest need of a socket: its two ends, lines, the outside of the messages in
//! them, frames, and buffers for them. It knows nothing of what they say.

pub mod block;
pub mod duplex;
pub mod frames;
pub mod lines;
pub mod rpc;
