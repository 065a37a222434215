//! Which processes came and went.

use std::collections::HashSet;

use nexus_schema::link::{COMMAND_LINE_MAX, GuestProcess, PROCESSES_MAX};
use nexus_schema::tools::checkpoint::{ComparedProcess, ProcessChanges};

use super::shown;

/// How many are listed of each kind.
const LISTED_MAX: usize = 20;

/// What a guest says of its processes, as far as it may say it.
pub(crate) fn bounded(mut processes: Vec<GuestProcess>) -> Vec<GuestProcess> {
    processes.truncate(PROCESSES_MAX);
    for process in &mut processes {
        process.command.truncate(process.command.floor_char_boundary(COMMAND_LINE_MAX));
    }
    processes
}

/// The differences of two lists; `None` if one of them is not known.
pub(super) fn changes(old: &[GuestProcess], new: &[GuestProcess]) -> Option<ProcessChanges> {
    if old.is_empty() || new.is_empty() {
        return None;
    }
    let (ended, more_ended) = missing(old, new);
    let (started, more_started) = missing(new, old);
    let is_full = old.len().max(new.len()) >= PROCESSES_MAX;
    Some(ProcessChanges {
        started,
        ended,
        old_memory_kib: memory(old),
        new_memory_kib: memory(new),
        is_cut: more_ended || more_started || is_full,
    })
}

/// Those that the other list does not have, and whether there are more of them.
fn missing(all: &[GuestProcess], other: &[GuestProcess]) -> (Vec<ComparedProcess>, bool) {
    let there: HashSet<(u32, u64)> = other.iter().map(|process| (process.pid, process.started)).collect();
    let mut gone = all.iter().filter(|process| !there.contains(&(process.pid, process.started)));
    let listed = gone.by_ref().take(LISTED_MAX).map(|process| ComparedProcess {
        pid: process.pid,
        command: shown::line(&process.command),
        memory_kib: process.memory_kib,
    });
    (listed.collect(), gone.next().is_some())
}

fn memory(processes: &[GuestProcess]) -> u64 {
    processes.iter().fold(0, |sum, process| sum.saturating_add(process.memory_kib))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, started: u64) -> GuestProcess {
        GuestProcess { pid, command: format!("p{pid}\n"), started, memory_kib: 100 }
    }

    #[test]
    fn a_number_that_another_process_got_is_another_process() {
        let old = [process(1, 5), process(7, 50), process(8, 60)];
        let new = [process(1, 5), process(7, 900)];
        let found = changes(&old, &new).unwrap();
        let pids = |all: &[ComparedProcess]| all.iter().map(|process| process.pid).collect::<Vec<_>>();
        assert_eq!((pids(&found.started), pids(&found.ended)), (vec![7], vec![7, 8]));
        assert_eq!((found.old_memory_kib, found.new_memory_kib, found.is_cut), (300, 200, false));
        assert_eq!(found.started[0].command, "p7\\x0a");
        assert_eq!(changes(&[], &new), None);
    }

    #[test]
    fn lists_are_bounded() {
        let many: Vec<_> = (1..2_000).map(|pid| process(pid, 1)).collect();
        let found = changes(&bounded(many), &[process(5_000, 1)]).unwrap();
        assert_eq!((found.ended.len(), found.is_cut), (LISTED_MAX, true));
        let long = GuestProcess { command: "ü".repeat(500), ..process(1, 1) };
        assert_eq!(bounded(vec![long])[0].command.len(), COMMAND_LINE_MAX);
    }
}
