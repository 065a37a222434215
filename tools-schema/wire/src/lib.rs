//! Transport of the links between daemon and guest, used by both ends: socket halves, lines, the outer form of JSON-RPC messages, and frames. It does
//! not know what the messages mean.

pub mod duplex;
pub mod frames;
pub mod lines;
pub mod rpc;
