//! Connections between host and guest by the packets of virtio-vsock (virtio 1.2, section 5.10), whatever carries these: the queues of a vsock
//! device, or the ports of a virtio-serial device. Used by the shim of a VM and, for ports, by the agent in it.
//!
//! ```text
//!  near programs' sockets                                             transport
//!        │   ┌─────────────────────────────────────────────────────┐     │
//!        └──>│ front ── stream ─┐                                  │     │
//!            │                  ├─ device ── rings, or              │<────┘
//!            │       greeting ──┤            session (a byte stream) │
//!            │     connection ──┘                                  │
//!            └─────────────────────────────────────────────────────┘
//!  packet      the header of a packet           connection  state and credit of one connection; pure
//!  greeting    the line `CONNECT <port>`; pure  stream      a near program's socket and its buffers
//!  hybrid      the front of the host: sockets   device      all connections, routing, timeouts
//!  pairs       the front of the guest           session     packets in a byte stream; pure
//!  serial      the ports that carry them; pure  lane        one of these ports
//! ```
//! The far side is assumed to be hostile. All that it can make grow has a limit (see the constants in `device` and `connection`),
//! all loops over its data are bounded, and the log messages that it can cause are rate-limited.

mod connection;
mod device;
mod greeting;
mod hybrid;
mod lane;
mod packet;
mod pairs;
pub mod serial;
mod session;
mod stream;
mod throttle;

pub use connection::{BUFFER_SPACE, Cids};
pub use device::{Device, Front, Traits};
pub use hybrid::{Hybrid, SocketName, traits};
pub use lane::{Lane, Pause};
pub use packet::{HEADER_LEN, HOST_CID, Header, Operation, STREAM};
pub use pairs::Pairs;
pub use session::{Broken, FRAME_MAX, Nonce};
