//! VMMs: the drivers `qemu`, `firecracker` and `process`, the shim that is a VMM's parent process, and checks of what the host can run.
//!
//! ```text
//! daemon                          shim (one per VM, outlives the daemon)              VMM
//! ShimClient::launch ─ plan.json ──> shim_main ── driver::prepare, spawn, bring up ────> runs the guest
//!      │ <──── one report line ──────┘ │ <── serial port, stderr (pipes) ───────────────┘
//!      └── s.sock: status, kill, … ──> │ ──> console.log, vmm.log, exit.json
//! ```
//! Nothing here uses the store. The VMM dies with its shim (PR_SET_PDEATHSIG). So once a shim has ended, its drives are free again.

mod adopt;
mod ask_agent;
mod cgroup;
pub mod console;
mod control;
pub mod doctor;
mod driver;
mod exit;
mod jail;
mod known;
mod log;
mod packed;
mod plan;
mod process;
mod ram;
mod save;
mod shim;
mod shim_client;
mod shown;
mod version;
pub mod vsock;
mod walls;
mod wire;

pub use control::{Saved, SavedQemu, ShimIdentity, Stall, VmmError};
pub use driver::Caps;
pub(crate) use driver::downloaded_programs;
pub(crate) use exit::write_atomic;
pub use exit::{Exit, MachineEnd, read_exit};
pub(crate) use jail::vmm_uid as uid_of;
pub use known::is_of_vm;
pub(crate) use packed::{Memory, header as packed_header, pack, pack_changes, unpack};
pub use plan::{Accel, LaunchPlan, Link, PlanDrive, PlanInterface, Restore, SavedKind};
pub(crate) use ram::{occupied, sha256_of_file, sha256_of_memory};
pub use shim::shim_main;
pub use shim_client::ShimClient;
pub(crate) use shim_client::{launched_boot, remove_sockets, shim_that_stays};
pub(crate) use shown::walls_of;
