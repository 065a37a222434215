//! Templates, builds, settings and room on the disk, through a daemon whose VMs are ordinary processes.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod builds;
mod place;
mod plans;
mod providers;
mod settings;
mod space;
