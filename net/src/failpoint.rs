//! Places at which debug builds end by SIGKILL where `NEXUS_NET_FAILPOINT` names them, for tests of what is left then.

/// Ends the process here if it is asked for.
#[cfg(debug_assertions)]
pub(crate) fn hit(point: &str) {
    use rustix::process::{Signal, getpid, kill_process};

    if std::env::var_os("NEXUS_NET_FAILPOINT").is_some_and(|wanted| wanted == point) {
        // It cannot fail: a process may always end itself.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// Ends the process here if it is asked for.
#[cfg(not(debug_assertions))]
pub(crate) const fn hit(_: &str) {}
