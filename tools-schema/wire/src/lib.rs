//! What both ends of a link between daemon and guest need of a socket. It knows nothing of what is said there.

pub mod duplex;
