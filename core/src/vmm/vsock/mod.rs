//! The vsock device for QEMU: a vhost-user backend that speaks Firecracker's hybrid Unix-socket protocol.
//!
//! It runs in a VM's shim, on its own threads. A host program connects to `<uds>`, writes `CONNECT <port>\n`, and reads
//! `OK <n>\n` once a program in the guest has accepted; the guest's connections to the host's port N arrive at `<uds>_<N>`.
//! The device follows virtio 1.2, section 5.10. It must not depend on what is sent over it, on the store, or on other VMs.
//!
//! ```text
//!  host program      Unix socket             shared memory         guest program
//!      │   ┌────────────────────────────────────────────┐               │
//!      └──>│ ports ── stream ─┐                         │               │
//!          │                  ├─ device ── ring ── vring │<── QEMU ── driver
//!          │       greeting ──┤               ^         │
//!          │     connection ──┘            backend <────│─── vhost-user socket
//!          └────────────────────────────────────────────┘
//!  packet      the header of a packet           connection  state and credit of one connection; pure
//!  greeting    the line `CONNECT <port>`; pure  stream      a host program's socket and its buffers
//!  ports       the Unix sockets' names          device      all connections, routing, timeouts
//!  ring        packets in and out of rings      vring       a ring that survives stale kicks
//!  backend     vhost-user, threads, start, stop
//! ```
//! The guest is assumed to be hostile. All that it can make grow has a limit (see the constants in `device` and `connection`),
//! all loops over its data are bounded, and the log messages that it can cause are rate-limited.
//!
//! `virtio-queue` logs without a limit through the `log` crate: a process that runs a backend must not forward these messages.

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
