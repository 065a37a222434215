//! What both ends of a link between daemon and guest need of a socket: its two ends, lines, the outside of the messages in
//! them, and frames. It knows nothing of what they say.

pub mod duplex;
pub mod frames;
pub mod lines;
pub mod rpc;
