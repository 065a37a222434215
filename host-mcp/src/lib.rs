//! The MCP host of Nexus: the daemon and the CLI.

pub mod dirs;
