//! What nexusd and `nexus-net` say to each other: JSON lines over a private Unix socket. No IO but [`Client`]'s reading and writing, and how
//! both open a TAP ([`tap`]).
//!
//! ```text
//! nexusd                                         nexus-net
//!   {"id":1,"request":{"hello":{"protocol":1}}}    ─>
//!                                        <─  {"id":1,"answer":{"hello":{"protocol":1,"pid":4711,...}}}
//!   {"id":2,"request":{"configure":{...}}}         ─>
//!                                        <─  {"id":2,"error":{"code":"no_nf_tables","message":...,"hint":...}}
//!   {"id":3,"request":{"watch":{}}}                ─>
//!                                        <─  {"id":3,"answer":{"watch":{}}}
//!                                        <─  {"event":{"denied":{...}}}
//! ```
//! Several clients may be connected. The answers of one connection come in the order of its requests; events come in between once
//! `watch` was answered. Every request may be repeated: it says what is to be, not what to change.
//!
//! The number [`PROTOCOL`] changes when a request or a field of a request is added or changes. Fields of answers and events, and kinds of
//! events, may be added without that; a reader ignores what it does not know there. Recorded lines are in `net/wire/tests/recorded`.

mod address;
mod answer;
mod client;
mod line;
mod request;
pub mod tap;

pub use address::{Cidr, Mac, ParseAddressError};
pub use answer::{
    Answer, Attached, Cleaned, Configured, Counters, Denial, Detached, ErrorCode, Event, Hello, NetError,
    Protocol, Retained, State, Updated, VmState, Watching,
};
pub use client::{Client, ClientError, Received};
pub use line::{Call, LINE_MAX, LineError, Reply, decode, encode};
pub use request::{Dns, Instance, InstanceId, ParseInstanceIdError, Request, Subnet, Vm};

/// The generation of the protocol.
pub const PROTOCOL: u32 = 1;
