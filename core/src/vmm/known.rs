//! The shims that this daemon has met: whose processes its socket does not serve, whatever they call themselves.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use nexus_net_wire::peer;

use super::control::ShimIdentity;
use super::process::NAME_WITHOUT_VMM;
use crate::os::process;

/// How many shims are remembered before those that have ended are forgotten.
const KNOWN_MAX: usize = 4096;

/// When the shim with a pid started. One that has ended stays, for its session may still have processes.
static KNOWN: Mutex<BTreeMap<u32, u64>> = Mutex::new(BTreeMap::new());

/// Notes a shim that runs. That of an ordinary process of the host is left out.
pub(super) fn meet(shim: ShimIdentity) {
    let name = std::fs::read(format!("/proc/{}/comm", shim.pid)).unwrap_or_default();
    if name.trim_ascii_end() == NAME_WITHOUT_VMM.to_bytes() {
        return;
    }
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() >= KNOWN_MAX {
        known.retain(|pid, started| {
            process::stat(*pid).is_ok_and(|stat| stat.is_some_and(|stat| stat.start_time == *started))
        });
    }
    known.insert(shim.pid, shim.start_time);
}

/// Returns whether a process is a shim or a VMM, or was started by one; by the names of its parents, and by what none of them can change: which processes
/// are shims of this daemon, and who leads the process's session.
pub fn is_of_vm(pid: u32) -> bool {
    let started = |shim: u32| KNOWN.lock().unwrap_or_else(PoisonError::into_inner).get(&shim).copied();
    peer::is_of_vm(pid) || peer::is_of_shim(pid, started)
}
