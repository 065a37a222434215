//! The identity of a process: its user, and which of root's capabilities it keeps.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// A user and a group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
}

/// The user that owns nothing: the kernel's default overflow id, `nobody` on every distribution.
pub(crate) const NOBODY: User = User { uid: 65534, gid: 65534 };

impl User {
    /// Becomes this user permanently. Makes system calls only, and affects only the calling thread.
    pub(super) fn become_it(self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }
}

/// The highest possible number of a capability.
const LAST: u32 = 63;

/// Removes all capabilities except `keep` from the bounding set, which limits what programs executed by this thread may gain.
/// Makes system calls only, like everything here.
pub(super) fn drop_bounding(keep: CapabilitySet) -> io::Result<()> {
    for number in 0..=LAST {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Either the kernel has no more capabilities, or this process may not drop them; its programs cannot gain any then.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Removes all capabilities except `keep` from the other sets. `EPERM` if the thread lacks one of `keep`.
pub(super) fn keep_only(keep: CapabilitySet) -> io::Result<()> {
    match rustix::thread::clear_ambient_capability_set() {
        // Kernels before 4.3 have no such set.
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
