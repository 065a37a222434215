//! The MCP host of Nexus: the daemon and the CLI.
//!
//! A client's line or request comes in through [`endpoint`] or [`stream`]. Calls of guest tools go raw through `forward` to
//! the guest's link; everything else is served by [`server`], whose [`tools`] are methods of [`nexus_core::Nexus`].

mod bridge;
pub mod ctl;
pub mod daemon;
pub mod dirs;
pub mod endpoint;
mod forward;
mod greeting;
pub mod host;
pub mod log;
pub mod server;
pub mod settings;
pub mod stream;
pub mod tools;

/// How both programs read lines and wait for an answer.
pub(crate) use nexus_core::host::{busy_poll, duplex, frames, lines, rpc};
