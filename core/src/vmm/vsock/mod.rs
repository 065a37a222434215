//! The vsock device for QEMU, which speaks Firecracker's hybrid Unix-socket protocol. It has one of two transports: the queues of a vhost-user
//! device, or, for VMs that are to be checkpointed, the ports of a virtio-serial device.
//!
//! It runs in a VM's shim, on its own threads. A host program connects to `<uds>`, writes `CONNECT <port>\n`, and reads
//! `OK <n>\n` once a program in the guest has accepted; the guest's connections to the host's port N arrive at `<uds>_<N>`.
//! Connections, their credit and the sockets are `nexus-vsock`'s. It must not depend on what is sent over it, on the store, or on other VMs.
//!
//! ```text
//!  host program      Unix socket             shared memory         guest program
//!      │                                                               │
//!      └──> nexus_vsock::Device ── ring ── vring <──── QEMU ── driver ─┘
//!                    │              ^
//!                    │           backend <─── vhost-user socket
//!                    └── serial <─── socket pairs, one per port ─── QEMU ── driver
//!  ring        packets in and out of rings      vring       a ring that survives stale kicks
//!  backend     vhost-user, threads, start, stop serial      ports, sessions, a thread
//! ```
//! `virtio-queue` logs without a limit through the `log` crate: a process that runs a backend must not forward these messages.

mod backend;
mod ring;
mod serial;
mod vring;

pub use backend::Backend;
pub use serial::SerialLink;
