//! The vsock device for QEMU: a vhost-user backend that speaks Firecracker's hybrid Unix-socket protocol.
//!
//! It runs in a VM's shim, on threads of its own. A host program connects to `<uds>`, writes `CONNECT <port>\n`, and reads
//! `OK <n>\n` once a program in the guest has accepted; the guest's connections to the host's port N arrive at `<uds>_<N>`.
//! The device follows virtio 1.2, section 5.10. It may not know what is said over it, nor the store, nor any VM but its own.
//!
//! ```text
//!  host program      Unix socket             shared memory         guest program
//!      │   ┌────────────────────────────────────────────┐               │
//!      └──>│ ports ── stream ─┐                         │               │
//!          │                  ├─ device ── ring ── vring │<── QEMU ── driver
//!          │       greeting ──┤               ^         │
//!          │     connection ──┘            backend <────│─── vhost-user socket
//!          └────────────────────────────────────────────┘
//!  packet      the header of a packet           connection  states and credit of one connection; pure
//!  greeting    the line `CONNECT <port>`; pure  stream      a host program's socket and its buffers
//!  ports       the Unix sockets' names          device      all connections, routing, timeouts
//!  ring        packets in and out of rings      vring       a ring that a stale kick cannot end
//!  backend     vhost-user, threads, start, stop
//! ```
//! The guest is hostile by assumption. All that it can make grow has a bound (see the constants in `device` and
//! `connection`), all loops over what it writes are bounded, and what it provokes is logged once in a while.
//!
//! `virtio-queue` reports the same through the `log` crate: a process that runs a backend must not forward that.

mod backend;
mod connection;
mod device;
mod greeting;
mod packet;
mod ports;
mod ring;
mod stream;
mod throttle;
mod vring;

pub use backend::Backend;
