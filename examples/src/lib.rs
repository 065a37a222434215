//! What the examples in Rust share: a small MCP client, and how its conversation looks.

#![expect(clippy::print_stdout, reason = "to be read is these programs' purpose")]

pub mod client;
pub mod show;

pub use client::{Client, ClientError};
