//! The processes of a VM, for those who compare its checkpoints.

use nexus_schema::link::{COMMAND_LINE_MAX, GuestProcess, PROCESSES_MAX};

use crate::os::read_small;

/// The flag of the kernel's own threads (`PF_KTHREAD`).
const KERNEL_THREAD: u64 = 0x20_0000;
/// KiB of a page in the kernels that VMs run.
const PAGE_KIB: u64 = 4;

/// Lists the processes with the lowest numbers, without threads of the kernel and without those that have ended. Blocks.
pub(super) fn list() -> Vec<GuestProcess> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().filter_map(process).take(PROCESSES_MAX).collect()
}

fn process(pid: u32) -> Option<GuestProcess> {
    let stat = read_small(format!("/proc/{pid}/stat"), 4096)?;
    let (name, started, memory_kib) = parse(&stat)?;
    let line = read_small(format!("/proc/{pid}/cmdline"), 4096).unwrap_or_default();
    let line = line.replace('\0', " ");
    let mut command = if line.trim().is_empty() { name.to_owned() } else { line.trim().to_owned() };
    command.truncate(command.floor_char_boundary(COMMAND_LINE_MAX));
    Some(GuestProcess { pid, command, started, memory_kib })
}

/// The name, the start and the memory in a `/proc/PID/stat`; `None` for what is not listed. A name may have any characters.
fn parse(stat: &str) -> Option<(&str, u64, u64)> {
    let (before, after) = stat.rsplit_once(") ")?;
    let (_, name) = before.split_once(" (")?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    if matches!(*fields.first()?, "Z" | "X") || number(6)? & KERNEL_THREAD != 0 {
        return None;
    }
    Some((name, number(19)?, number(21)?.saturating_mul(PAGE_KIB)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed_with_its_command_line() {
        let own = process(std::process::id()).unwrap();
        assert!(own.command.len() <= COMMAND_LINE_MAX && own.started > 0 && own.memory_kib > 0, "{own:?}");
        let name = std::env::args().next().unwrap();
        assert!(name.starts_with(own.command.split(' ').next().unwrap()), "{own:?} is not {name}");
        let all = list();
        assert!(!all.is_empty() && all.len() <= PROCESSES_MAX);
        assert!(all.is_sorted_by_key(|process| process.pid));
    }

    #[test]
    fn lines_of_the_kernel_are_parsed() {
        let rest = "1 7 7 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 1 0 4242 9000000 250 18446744073709551615";
        assert_eq!(parse(&format!("7 (a) (b) S {rest}")), Some(("a) (b", 4242, 1000)));
        assert_eq!(parse(&format!("7 (gone) Z {rest}")), None);
        assert_eq!(parse(&format!("2 (kthreadd) S {}", rest.replace("4194560", "2129984"))), None);
        assert_eq!(parse("7 (cut) S 1 2"), None);
    }
}
