//! VMMs: the drivers `qemu` and `firecracker`, the shim that is a VMM's parent, and what the host can run.
//!
//! Nothing here sees the store. The daemon holds a `ShimHandle` per running VM; the shim process holds the VMM.

mod plan;
pub mod vsock;

pub use plan::{Accel, DriverKind, LaunchPlan, PlanDrive};
