//! The domain of Nexus and its side effects on the host.
//!
//! Tools see the [`Nexus`] facade only. Below it are rooms in layers, and no circle among them; `tests/tidy` holds the edges
//! that are allowed:
//!
//! ```text
//! facade ─> vm ─> context ─> provision, op ─> asset, image ─> drive, guest, vmm ─> ext4, store ─> progress, config ─> os
//! ```
//!
//! `asset`, `image`, `drive`, `vmm` and `guest` do things and never see the store; `vm` decides and records; `store` holds all
//! SQL; `os` holds paths and external programs. Nothing here touches the terminal, the environment or the command line.

pub mod asset;
pub mod config;
mod context;
pub mod drive;
mod ext4;
mod facade;
pub mod guest;
pub mod image;
pub mod op;
pub mod os;
pub mod progress;
mod provision;
pub mod store;
mod vm;
pub mod vmm;

pub use config::Config;
pub use facade::{CallContext, CallRecord, Caller, GuestHandle, Nexus, OpenError};
