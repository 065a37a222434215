//! The MCP host of Nexus: the daemon and the CLI.

pub mod dirs;
mod forward;
pub mod host;
pub mod server;
pub mod stream;
pub mod tools;
