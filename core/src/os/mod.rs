//! The operating system's side of things: where files are, which programs are called, and the small things that all rooms share. No room of this crate is
//! below it.

pub(crate) mod boot_id;
pub mod busy_poll;
pub(crate) mod clock;
pub(crate) mod confine;
pub(crate) mod disk;
pub mod failpoint;
pub(crate) mod fold;
pub(crate) mod given;
pub mod leftover;
pub mod lock;
pub mod memory;
#[cfg(test)]
pub(crate) mod mounted;
pub(crate) mod own_mounts;
pub mod paths;
pub mod process;
pub mod random;
pub(crate) mod regular;
pub(crate) mod remove;
pub(crate) mod reserve;
pub(crate) mod shown;
pub mod socket;
pub mod subids;
pub mod subvolume;
pub(crate) mod tap;
pub mod tls;
pub mod tool;
pub mod tsc;
