//! Shared by the tests of the built system.

#![expect(clippy::print_stderr, reason = "a failing test says what its daemon said")]

pub mod client;
pub mod daemon;
pub mod link;
pub mod linux;
pub mod mirror;
pub mod netns;
pub mod order;
pub mod registry;
pub mod saved;
pub mod schema;
pub mod tars;
pub mod tutorial;
pub mod ubuntu;
pub mod vsock;
pub mod wait;
pub mod web;
