//! Transport of the links between daemon and guest, used by both ends: socket halves, lines, the outer form of JSON-RPC messages, frames, and
//! buffers for them. It does not know what the messages mean.

pub mod block;
pub mod duplex;
pub mod frames;
pub mod lines;
pub mod rpc;
