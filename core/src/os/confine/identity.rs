//! Who a process is: its user, and what root's powers are left to it.

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
    /// Becomes this user for good. Makes system calls only, and for the calling thread only.
    pub(super) fn become_it(self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }
}

/// The highest number that a capability can have.
const LAST: u32 = 63;

/// Takes all capabilities but `keep` out of what programs may get that the calling thread executes. Makes system calls only, as the
/// rest here.
pub(super) fn drop_bounding(keep: CapabilitySet) -> io::Result<()> {
    for number in 0..=LAST {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Past the last that this kernel knows; or not this process's to say, whose programs can gain none then.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Takes them out of all other sets. `EPERM` where `keep` has one that the thread does not have.
pub(super) fn keep_only(keep: CapabilitySet) -> io::Result<()> {
    match rustix::thread::clear_ambient_capability_set() {
        // Kernels before 4.3 have no such set.
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
