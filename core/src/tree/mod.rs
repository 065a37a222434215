//! Trees of files between the host and VMs: which places of the host a client may name, and the streams that carry the trees.
//!
//! What comes from a guest is unpacked as anything hostile is: only under the name that was asked for, without setuid bits and
//! devices, and never so that the host's disk is full. It knows nothing of operations or rows.

mod copy;
mod guest;
mod places;

pub(crate) use copy::{In, Out};
pub(crate) use guest::Guest;
pub(crate) use places::{HostPath, Places};
