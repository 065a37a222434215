//! The domain of Nexus and its side effects on the host.
//!
//! Tools see the [`Nexus`] facade only. Below it, rooms that do not know each other: `asset`, `image`, `drive`, `vmm` and
//! `guest` do things and never see the store; `vm` decides and records; `store` holds all SQL; `os` holds paths and
//! external programs. Nothing here touches the terminal, the environment or the command line.

pub mod asset;
pub mod config;
pub mod drive;
pub mod guest;
pub mod image;
pub mod nexus;
pub mod op;
pub mod os;
mod stock;
pub mod store;
pub mod vm;
pub mod vmm;

pub use config::Config;
pub use nexus::{CallContext, CallRecord, Caller, GuestHandle, Nexus, OpenError};
