//! Kills programs that outlived their daemon. A killed daemon cannot stop them, and what they still write would disturb the
//! next daemon, which therefore kills them first.
//!
//! They are recognised by an environment variable, which their child processes inherit.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use std::time::Duration;

use super::process::{self, ProcessHandle};

/// The variable that says which process started a program: its pid and its start time.
pub const STARTED_BY: &str = "NEXUS_STARTED_BY";
/// How long a program may take to disappear after SIGKILL.
const GONE: Duration = Duration::from_secs(10);
/// How often to look again for programs that others started meanwhile.
const ROUNDS: usize = 20;

/// The value for programs that this process starts.
pub(crate) fn mark() -> &'static str {
    static MARK: OnceLock<String> = OnceLock::new();
    MARK.get_or_init(|| {
        let pid = std::process::id();
        let start_time = process::stat(pid).ok().flatten().map_or(0, |stat| stat.start_time);
        format!("{pid}:{start_time}")
    })
}

/// Kills the programs left by a dead daemon with this pid. Returns how many. Blocks.
pub(crate) fn end_of(daemon: u32) -> io::Result<usize> {
    let mut ended = 0;
    for _ in 0..ROUNDS {
        let left = left_by(daemon)?;
        if left.is_empty() {
            break;
        }
        for program in &left {
            program.kill()?;
        }
        for program in &left {
            if !program.wait_ended(GONE)? {
                tracing::warn!(pid = program.pid(), "cannot kill a program of an earlier daemon");
            }
        }
        ended += left.len();
    }
    Ok(ended)
}

fn left_by(daemon: u32) -> io::Result<Vec<ProcessHandle>> {
    let mut left = Vec::new();
    for entry in fs_err::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Opened before it is inspected, so that the inspection is of this very process.
        let Ok(Some(program)) = ProcessHandle::open(pid) else { continue };
        let Some((by, start_time)) = started_by(pid) else { continue };
        if by == daemon && ProcessHandle::open_identified(by, start_time)?.is_none() {
            left.push(program);
        }
    }
    Ok(left)
}

/// The process that started a program, according to its environment; `None` for programs not started by a daemon, and for
/// other users' programs.
fn started_by(pid: u32) -> Option<(u32, u64)> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mark = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(STARTED_BY.as_bytes())?.strip_prefix(b"="))?;
    let (by, start_time) = std::ffi::OsStr::from_bytes(mark).to_str()?.split_once(':')?;
    Some((by.parse().ok()?, start_time.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper(mark: &str) -> Child {
        Command::new("sleep").arg("1000").env(STARTED_BY, mark).spawn().unwrap()
    }

    #[test]
    fn what_a_dead_daemon_started_is_ended_and_nothing_else() {
        let mut dead = Command::new("sleep").arg("1000").spawn().unwrap();
        let (pid, stat) = (dead.id(), process::stat(dead.id()).unwrap().unwrap());
        let mut orphan = sleeper(&format!("{pid}:{}", stat.start_time));
        assert_eq!(end_of(pid).unwrap(), 0, "who started it is still there");
        dead.kill().unwrap();
        dead.wait().unwrap();

        let mut own = sleeper(mark());
        let mut stranger = sleeper("1:1x");
        assert_eq!(end_of(pid).unwrap(), 1);
        assert!(!orphan.wait().unwrap().success());
        assert_eq!(end_of(std::process::id()).unwrap(), 0);
        for other in [&mut own, &mut stranger] {
            assert!(other.try_wait().unwrap().is_none());
            other.kill().unwrap();
            other.wait().unwrap();
        }
        assert_eq!(end_of(pid).unwrap(), 0);
    }
}
