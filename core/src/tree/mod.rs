//! Trees of files between the host and VMs: which places of the host a client may use, and the streams that carry the trees.
//!
//! Data from a guest is treated as hostile: it is unpacked only below the requested name, without setuid bits and devices, and
//! without filling the host's disk. This module does not know operations or rows.

mod copy;
mod guest;
mod new_file;
mod places;

pub(crate) use copy::{In, Out};
pub(crate) use guest::Guest;
pub(crate) use new_file::NewFile;
pub(crate) use places::{HostPath, Places};
