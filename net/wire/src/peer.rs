//! Who is at the other end of a Unix socket. VMMs run as the user of their daemon where that is an ordinary one, so the mode of a socket does not
//! keep out a VMM that a guest has taken over: its processes are told by their parents and their session.

use std::collections::BTreeSet;
use std::ffi::CStr;

/// The name of shims, the parents of VMMs. A process cannot change the name of another one, nor whose child it is. Once its VMM runs, a shim cannot change
/// its own either: its filter of system calls refuses that.
pub const SHIM: &CStr = c"nexus-shim";

/// How many parents are looked at.
const PARENTS_MAX: usize = 64;

/// Returns whether a process is a VMM or was started by one: whether a shim is among its parents. A process that has ended counts as one, since
/// nobody can tell. A shim itself is none: it takes its VM's TAP before there is a VMM.
pub fn is_of_vmm(pid: u32) -> bool {
    is_below_shim(pid, look)
}

/// Returns whether a process is a shim, or [`is_of_vmm`].
pub fn is_of_vm(pid: u32) -> bool {
    look(pid).is_some_and(|own| own.is_shim()) || is_of_vmm(pid)
}

/// Returns whether a process belongs to a shim that is known, whatever they call themselves: it is one, has one among its parents, or is in the session of
/// one. `started` is when the shim with a pid started (field 22 of `/proc/PID/stat`), if there is or was one. A shim leads a session, which nothing
/// below it can leave: the filter of a VMM has no setsid(2). So an orphan of a shim that has ended is told, too. A process that has ended counts as one
/// that belongs to a shim.
pub fn is_of_shim(pid: u32, started: impl Fn(u32) -> Option<u64>) -> bool {
    let Some(own) = look(pid) else { return true };
    // No other process gets the number of a session that has processes.
    let leads = |at: u64| look(own.session).is_none_or(|leader| leader.started == at);
    started(pid) == Some(own.started)
        || started(own.session).is_some_and(leads)
        || is_below(pid, look, |pid, parent| started(pid) == Some(parent.started))
}

/// Returns the sessions that have processes, by their leaders' pids, as far as this user sees processes. `None` if they cannot be listed.
pub fn sessions() -> Option<BTreeSet<u32>> {
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    Some(pids.filter_map(|pid| Some(look(pid)?.session)).collect())
}

/// A process, as `/proc/PID/stat` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Looked {
    name: String,
    parent: u32,
    session: u32,
    /// In clock ticks since the host's boot.
    started: u64,
}

impl Looked {
    fn is_shim(&self) -> bool {
        self.name.as_bytes() == SHIM.to_bytes()
    }
}

/// Returns a process; `None` if it has ended, or is hidden from this user.
fn look(pid: u32) -> Option<Looked> {
    // A process may give itself a name that is not UTF-8.
    parse(&String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/stat")).ok()?))
}

fn parse(stat: &str) -> Option<Looked> {
    // A name may have brackets itself.
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let mut fields = rest.split_ascii_whitespace().skip(1);
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(15)?.parse().ok()?;
    Some(Looked { name: name.to_owned(), parent, session, started })
}

fn is_below_shim(pid: u32, look: impl Fn(u32) -> Option<Looked>) -> bool {
    is_below(pid, look, |_, parent| parent.is_shim())
}

/// Whether one of a process's parents is a shim.
fn is_below(pid: u32, look: impl Fn(u32) -> Option<Looked>, is_shim: impl Fn(u32, &Looked) -> bool) -> bool {
    let Some(mut child) = look(pid) else { return true };
    let mut at = pid;
    for _ in 0..PARENTS_MAX {
        if child.parent <= 1 {
            return false;
        }
        match look(child.parent) {
            Some(parent) if is_shim(child.parent, &parent) => return true,
            Some(parent) => {
                at = child.parent;
                child = parent;
            }
            // Its child still has it as the parent, so it runs: as another user, whose processes are hidden here.
            None if look(at).is_some_and(|again| again.parent == child.parent) => return false,
            // It has ended meanwhile, and its children have another parent.
            None => match look(pid) {
                Some(again) => (at, child) = (pid, again),
                None => return true,
            },
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn looked(name: &str, parent: u32) -> Option<Looked> {
        Some(Looked { name: name.to_owned(), parent, session: 7, started: 99 })
    }

    #[test]
    fn names_with_brackets_are_read() {
        let rest = "R 42 6 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 99 4096 1";
        assert_eq!(parse(&format!("7 (a) S (b)) {rest}")), looked("a) S (b)", 42));
        assert_eq!(parse(&format!("7 a {rest}")), None);
    }

    #[test]
    fn what_has_a_shim_among_its_parents_is_a_vmms() {
        let host = |pid| match pid {
            100 => looked("nexusd", 1),
            101 => looked("nexus-shim", 100),
            102 => looked("qemu-system-x86", 101),
            103 => looked("sh", 102),
            // Of a host that hides the processes of other users: 200 is root's.
            201 => looked("bash", 200),
            202 => looked("nexusctl", 201),
            300 => looked("loops", 301),
            301 => looked("loops", 300),
            _ => None,
        };
        for (pid, expected) in
            [(100, false), (101, false), (102, true), (103, true), (202, false), (300, true), (999, true)]
        {
            assert_eq!(is_below_shim(pid, host), expected, "{pid}");
        }
    }

    #[test]
    fn a_parent_that_ends_meanwhile_hides_nobody() {
        let looks = Cell::new(0);
        let host = |pid| {
            looks.set(looks.get() + 1);
            match pid {
                // Its first parent ends after the first look; then the shim takes it over.
                104 if looks.get() == 1 => looked("sh", 103),
                104 => looked("sh", 101),
                101 => looked("nexus-shim", 1),
                _ => None,
            }
        };
        assert!(is_below_shim(104, host));
    }

    /// Starts a script, and returns with its first line of output.
    fn shell(script: &str) -> (Child, String) {
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (child, line)
    }

    #[test]
    fn a_process_whose_name_is_no_text_is_seen() {
        let (mut named, _) = shell(r"printf '\377' >/proc/$$/comm; echo; read -r end");
        let seen = look(named.id());
        drop(named.stdin.take());
        named.wait().unwrap();
        assert_eq!(seen.map(|seen| seen.parent), Some(std::process::id()));
    }

    /// What a guest does that has taken its shim over: the shim has another name, and what it started is nobody's child.
    #[test]
    fn a_shim_and_its_orphans_are_told_without_its_name() {
        let mut shim = Command::new("setsid")
            .args([
                "sh",
                "-c",
                "printf other >/proc/$$/comm; sh -c 'sleep 1000 >/dev/null & echo $!'; read -r end",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(shim.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let orphan: u32 = line.trim().parse().unwrap();
        let (leader, at) = (shim.id(), look(shim.id()).unwrap().started);
        let told = |pid: u32, at: u64| is_of_shim(pid, |shim| (shim == leader).then_some(at));
        let by_name = [leader, orphan].map(is_of_vm);
        let known = [told(leader, at), told(orphan, at), told(std::process::id(), at)];
        // Another process had the number before.
        let reused = [told(leader, at - 1), told(orphan, at - 1)];
        drop(shim.stdin.take());
        shim.wait().unwrap();
        let left = told(orphan, at);
        Command::new("kill").arg(orphan.to_string()).status().unwrap();
        assert_eq!(by_name, [false, false]);
        assert_eq!((known, reused, left), ([true, true, false], [false, false], true));
    }

    #[test]
    fn real_processes_are_told_apart() {
        assert!(!is_of_vmm(std::process::id()) && !is_of_vm(std::process::id()));
        let (mut shim, line) =
            shell("printf nexus-shim >/proc/$$/comm; sleep 1000 & echo $!; read -r end; kill $!");
        let vmm: u32 = line.trim().parse().unwrap();
        let told = [vmm, shim.id()].map(|pid| (is_of_vmm(pid), is_of_vm(pid)));
        drop(shim.stdin.take());
        shim.wait().unwrap();
        assert_eq!(told, [(true, true), (false, true)]);
        assert!(is_of_vmm(shim.id()), "it has ended");
    }
}
