//! Transport of the links between daemon and guest, used by both ends: socket halves, lines, the outer form of JSON-RPC messages, frames,
//! buffers and pipes for them, and how output of programs is made readable. It does not know what the messages mean.

pub mod block;
pub mod duplex;
pub mod fold;
pub mod frames;
pub mod lines;
mod pipe;
pub mod rpc;
