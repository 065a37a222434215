//! The MCP host of Nexus: the daemon and the CLI.
//!
//! Requests of clients arrive through [`endpoint`] or [`stream`]. Calls of guest tools go raw through `forward` to the
//! guest's link; [`server`] handles everything else with [`tools`], which are methods of [`nexus_core::Nexus`].
//! What a guest offers by itself goes through `own`.

mod bridge;
mod confirm;
pub mod ctl;
pub mod daemon;
pub mod dirs;
pub mod endpoint;
mod expiry;
mod forward;
mod greeting;
pub mod host;
pub mod log;
pub mod man;
mod metrics;
mod notes;
mod offers;
mod otlp;
mod own;
mod page;
pub mod server;
pub mod settings;
pub mod stream;
mod tasks;
pub mod tools;

/// Shared by both programs for reading lines and waiting for answers.
pub(crate) use nexus_core::host::{busy_poll, duplex, frames, lines, rpc};
