//! What both ends of a link between daemon and guest need of a socket: its two ends, lines, and the outside of the messages in
//! them. It knows nothing of what they say.

pub mod duplex;
pub mod lines;
pub mod rpc;
