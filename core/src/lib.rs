//! The domain of Nexus and its side effects on the host.
//!
//! Tools see the [`Nexus`] facade only. Below it are rooms in layers, and no circle among them; `tests/tidy` holds the edges
//! that are allowed:
//!
//! ```text
//! facade ─> publish, vm ─> context ─> provision, op ─> asset, image ─> drive, egress, net, guest, vmm ─> ext4, event ─> access ─> store ─> progress, config ─> os
//! ```
//!
//! `asset`, `image`, `drive`, `vmm` and `guest` do things and never see the store; `vm` decides and records; `store` holds all
//! SQL; `os` holds paths and external programs. Nothing here touches the terminal, the environment or the command line.

mod access;
mod asset;
mod config;
mod context;
mod drive;
mod egress;
mod event;
mod ext4;
mod facade;
mod guest;
mod image;
mod net;
mod op;
mod os;
mod progress;
mod provision;
mod publish;
mod store;
mod tree;
mod vm;
mod vmm;

pub use access::{Authorised, Caller, Grant};
pub use asset::provider_mistakes;
pub use config::{AssetConfig, AuditFile, Config, DriverSetting, Environment, FetchSettings, Secret};
pub use facade::{
    Busy, CallContext, CallRecord, GuestHandle, Measures, News, Nexus, OpenError, StreamLife, StreamRefusal,
    VmStream, add_database_check,
};
pub use os::tls::Trust;
pub use vmm::doctor::examine;
pub use vmm::shim_main;

/// The guest link, as those use it who pass calls on.
pub mod link {
    pub use crate::guest::lines::Outbox;
    pub use crate::guest::{
        CallId, CallMeta, CallSink, GuestProgress, GuestStream, Link, LinkError, Offers, Question, Reply,
        StreamError, UP_WAIT, result, scan, wire,
    };
}

/// What a server on this host needs of the operating system.
pub mod host {
    pub use crate::asset::Sha256;
    pub use crate::os::random::{same_secret, token as random_token};
    pub use crate::os::{busy_poll, failpoint, memory, shares, socket, users};
    pub use crate::vmm::is_of_vm;
    pub use nexus_wire::{duplex, frames, lines, rpc};
}

/// What the tests and benchmarks of this workspace look into; no part of the library's face, and free to change.
#[doc(hidden)]
pub mod internals {
    pub use crate::asset::debian::Archive;
    pub use crate::drive::{Copy, Drives, create_home};
    pub use crate::guest::{GuestEvent, HelloServer};
    pub use crate::os::paths::vm_files;
    pub use crate::os::process;
    pub use crate::os::tsc;
    pub use crate::progress::Progress;
    pub use crate::store::{Store, StoreError, assets, builds, drives, images, ops, vms};
    pub use crate::vmm::vsock::{Backend, SerialLink};
    pub use crate::vmm::{
        Accel, Caps, Exit, LaunchPlan, Link, PlanDrive, Restore, Saved, SavedKind, SavedQemu, ShimClient,
        ShimIdentity, Stall, VmmError, console, read_exit,
    };
}
