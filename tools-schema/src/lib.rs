//! The vocabulary of Nexus: the names of its tools, their arguments, their results and their errors.
//!
//! The daemon, the CLI and the guest share this crate. It does no IO; it only defines and parses these types, and refuses malformed ones.
#![forbid(unsafe_code)]

pub mod access;
pub mod advice;
pub mod arch;
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
pub mod span;
pub mod stream;
pub mod time;
pub mod tool;
pub mod tools;
pub mod toolset;
pub mod trace;

pub use arch::Arch;
pub use driver::DriverKind;
pub use error::{ErrorCode, ToolError};
pub use id::Id;
pub use name::{Name, Reference};
pub use size::ByteSize;
pub use span::TimeSpan;
pub use time::Timestamp;
pub use tool::{Effect, ResultShape, Tool, ToolInfo};
pub use trace::TraceContext;
