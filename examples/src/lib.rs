//! Shared by the Rust examples: a small MCP client, and the output of its conversation.

#![expect(clippy::print_stdout, reason = "to be read is these programs' purpose")]

pub mod client;
pub mod show;

pub use client::{Client, ClientError};
