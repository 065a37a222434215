//! The operating system: locations of files, calls of external programs, and small utilities that all modules share. This module
//! imports no other module of the crate.

pub(crate) mod boot_id;
pub mod busy_poll;
pub(crate) mod clock;
pub(crate) mod confine;
pub(crate) mod cpu;
pub(crate) mod disk;
pub mod failpoint;
pub(crate) mod given;
pub mod leftover;
pub mod lock;
pub(crate) mod meminfo;
pub mod memory;
#[cfg(test)]
pub(crate) mod mounted;
pub(crate) mod own_address;
pub(crate) mod own_mounts;
pub(crate) mod passing;
pub mod paths;
pub mod process;
pub mod random;
pub(crate) mod regular;
pub(crate) mod remove;
pub(crate) mod reserve;
pub mod shares;
pub(crate) mod shown;
pub(crate) mod site;
pub mod socket;
pub mod subids;
pub mod subvolume;
pub(crate) mod tap;
pub mod tls;
pub mod tool;
pub mod tsc;
pub mod users;
