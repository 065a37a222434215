//! The protocol between nexusd and `nexus-net`: JSON lines over a private Unix socket. The only IO is [`Client`]'s reading and writing, and
//! the opening of TAPs ([`tap`]), handing them over ([`hand`]) and telling VMMs among the clients ([`peer`]), which both do.
//!
//! ```text
//! nexusd                                         nexus-net
//!   {"id":1,"request":{"hello":{"protocol":2}}}    ─>
//!                                        <─  {"id":1,"answer":{"hello":{"protocol":2,"pid":4711,...}}}
//!   {"id":2,"request":{"configure":{...}}}         ─>
//!                                        <─  {"id":2,"error":{"code":"no_nf_tables","message":...,"hint":...}}
//!   {"id":3,"request":{"watch":{}}}                ─>
//!                                        <─  {"id":3,"answer":{"watch":{}}}
//!                                        <─  {"event":{"denied":{...}}}
//! ```
//! Several clients may be connected. A connection's answers arrive in the order of its requests; events can arrive in between once
//! `watch` was answered. Every request is idempotent: it describes the desired state, not a change.
//!
//! The number [`PROTOCOL`] changes when a request or a field of a request is added or changed. Fields of answers and events, and kinds of
//! events, may be added without that; readers ignore unknown ones. Recorded lines are in `net/wire/tests/recorded`.

mod address;
mod answer;
mod check;
mod client;
pub mod hand;
mod line;
pub mod peer;
mod request;
pub mod tap;

pub use address::{Cidr, Mac, ParseAddressError};
pub use answer::{
    Answer, Attached, Cleaned, Configured, Counters, Denial, Detached, ErrorCode, Event, Hello, NetError,
    Protocol, Retained, State, Updated, VmState, Watching,
};
pub use check::{Check, Lack};
pub use client::{Client, ClientError, Received};
pub use line::{Call, LINE_MAX, LineError, Reply, decode, encode};
pub use request::{CONNECTIONS_MAX, Dns, Instance, InstanceId, ParseInstanceIdError, Request, Subnet, Vm};

/// The generation of the protocol.
pub const PROTOCOL: u32 = 2;
