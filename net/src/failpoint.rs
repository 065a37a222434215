//! Failpoints: debug builds kill themselves at the one that `NEXUS_NET_FAILPOINT` names, for tests of what is left then.

/// Kills the process if `NEXUS_NET_FAILPOINT` names this point.
#[cfg(debug_assertions)]
pub(crate) fn hit(point: &str) {
    use rustix::process::{Signal, getpid, kill_process};

    if std::env::var_os("NEXUS_NET_FAILPOINT").is_some_and(|wanted| wanted == point) {
        // Cannot fail: a process may always kill itself.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// Kills the process if `NEXUS_NET_FAILPOINT` names this point.
#[cfg(not(debug_assertions))]
pub(crate) const fn hit(_: &str) {}
