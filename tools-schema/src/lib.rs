//! The vocabulary of Nexus: what its tools are called, what they take, what they give back and how they fail.
//!
//! This crate is shared by the daemon, the CLI and the guest. It does no IO and starts nothing; it only names things,
//! parses them and refuses what is malformed.
#![forbid(unsafe_code)]

pub mod access;
pub mod arguments;
pub mod driver;
pub mod egress;
pub mod error;
pub mod id;
pub mod limits;
pub mod link;
pub mod name;
pub mod network;
pub mod schema;
pub mod service;
pub mod size;
pub mod stream;
pub mod time;
pub mod tool;
pub mod tools;
pub mod toolset;

pub use driver::DriverKind;
pub use error::{ErrorCode, ToolError};
pub use id::Id;
pub use name::{Name, Reference};
pub use size::ByteSize;
pub use time::Timestamp;
pub use tool::{Effect, ResultShape, Tool, ToolInfo};
