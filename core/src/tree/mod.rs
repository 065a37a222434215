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

use nexus_schema::{ErrorCode, ToolError};

/// Adds the hint to the error of a file of the host: the one of its code is about files in VMs.
fn on_host(error: ToolError) -> ToolError {
    if error.hint.is_some() {
        return error;
    }
    match error.code {
        ErrorCode::FileNotFound => error.hint("this path is on the host: give one that exists there"),
        ErrorCode::FileRefused => {
            error.hint("this path is on the host: check its type, and that the user of nexusd may use it")
        }
        _ => error,
    }
}
