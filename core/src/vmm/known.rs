//! The shims that this daemon has met: whose processes its socket does not serve, whatever they call themselves.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use nexus_net_wire::peer;

use super::control::ShimIdentity;
use super::process::NAME_WITHOUT_VMM;

/// How many shims are remembered before those are looked for that can be forgotten.
const KNOWN_MAX: usize = 4096;

static KNOWN: Mutex<Known> = Mutex::new(Known { shims: BTreeMap::new(), look_at: KNOWN_MAX });

/// When the shim with a pid started. One that has ended stays for as long as its session has processes.
#[derive(Debug)]
struct Known {
    shims: BTreeMap<u32, u64>,
    /// With how many of them it is looked again which can be forgotten.
    look_at: usize,
}

impl Known {
    fn note(&mut self, pid: u32, started: u64) {
        if self.shims.len() >= self.look_at {
            // A shim leads its session, so one that runs is in its own. Without a list all stay.
            if let Some(sessions) = peer::sessions() {
                self.shims.retain(|pid, _| sessions.contains(pid));
            }
            // With many that stay it is not looked each time.
            self.look_at = KNOWN_MAX.max(2 * self.shims.len());
        }
        self.shims.insert(pid, started);
    }
}

/// Notes a shim that runs. That of an ordinary process of the host is left out.
pub(super) fn meet(shim: ShimIdentity) {
    let name = std::fs::read(format!("/proc/{}/comm", shim.pid)).unwrap_or_default();
    if name.trim_ascii_end() == NAME_WITHOUT_VMM.to_bytes() {
        return;
    }
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).note(shim.pid, shim.start_time);
}

/// Returns whether a process is a shim or a VMM, or was started by one; by the names of its parents, and by what none of them can change: which processes
/// are shims of this daemon, and who leads the process's session.
pub fn is_of_vm(pid: u32) -> bool {
    let started = |shim: u32| KNOWN.lock().unwrap_or_else(PoisonError::into_inner).shims.get(&shim).copied();
    peer::is_of_vm(pid) || peer::is_of_shim(pid, started)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};

    use super::*;

    /// Pids that no process has.
    const NONE: u32 = 1 << 23;

    fn fill(known: &mut Known) {
        for pid in (NONE..).take(2 * KNOWN_MAX + 2) {
            known.note(pid, 1);
            assert!(known.shims.len() <= KNOWN_MAX + 1, "{}", known.shims.len());
        }
    }

    #[test]
    fn a_shim_that_has_ended_is_known_for_as_long_as_its_session_has_processes() {
        // What its leader leaves behind becomes a child of this process.
        set_child_subreaper(Some(getpid())).unwrap();
        let script = "sleep 1000 > /dev/null 2>&1 & echo $$ $!";
        let output = Command::new("setsid").args(["sh", "-c", script]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let pids: Vec<u32> = text.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        let [leader, orphan] = pids[..] else { panic!("{text}") };
        let mut known = Known { shims: BTreeMap::new(), look_at: KNOWN_MAX };
        known.note(leader, 7);
        fill(&mut known);
        assert_eq!(known.shims.get(&leader), Some(&7));
        let pid = Pid::from_raw(i32::try_from(orphan).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        waitpid(Some(pid), WaitOptions::empty()).unwrap();
        fill(&mut known);
        assert_eq!(known.shims.get(&leader), None);
    }
}
