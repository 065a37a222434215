//! The memory use of the daemon, a shim and a guest, and the size of the guest's binary.

use std::fs;
use std::time::Duration;

use nexus_tests::daemon::Daemon;
use serde_json::json;

use super::Options;
use super::table::Table;

const VMS: usize = 10;
const MIB: f64 = 1024.0;

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("Memory and size");
    let mut below = |what: &str, mib: f64, goal: f64| {
        table.judged(what, format!("{mib:.1} MiB"), "", "", (format!("< {goal} MiB"), mib < goal));
    };
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.must("vm_list", json!({}));
    below("nexusd idle, resident", settled(daemon.pid()), 25.0);

    let vms = if options.quick { 2 } else { VMS };
    let mut shims = Vec::new();
    for at in 0..vms {
        let vm = client.create(json!({ "name": format!("vm-{at}"), "from": "busybox", "memory": "128MiB" }));
        shims.push(vm["process"]["shim_pid"].as_u64().expect("a running VM has a shim") as u32);
    }
    below(&format!("nexusd with {vms} ready VMs, resident"), settled(daemon.pid()), 40.0);
    let shim = shims.iter().map(|shim| private_kib(*shim)).max().expect("there are VMs");
    below("shim, private, the largest", shim as f64 / MIB, 6.0);

    let agents = client.run("vm-0", "grep -h VmRSS $(grep -l '^Name:.nexus-guest' /proc/[0-9]*/status)");
    let resident = agents.stdout.lines().filter_map(kib).max().expect("the agent is a process");
    below("guest's agent, resident", resident as f64 / MIB, 8.0);
    below("guest's binary", nexus_host::daemon::AGENT.len() as f64 / MIB / MIB, 6.0);
    table
}

/// The memory of a process after it has settled, in MiB.
pub(crate) fn settled(process: u32) -> f64 {
    // Allocators return memory with a delay.
    std::thread::park_timeout(Duration::from_secs(2));
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("read a process's status");
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).and_then(kib);
    resident.expect("a process has resident memory") as f64 / MIB
}

/// The private memory of a process, in KiB.
pub(crate) fn private_kib(process: u32) -> u64 {
    let rollup =
        fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("read a process's memory");
    rollup.lines().filter(|line| line.starts_with("Private_")).filter_map(kib).sum()
}

/// The memory of a process in KiB; what it shares with others counts in part.
pub(crate) fn pss_kib(process: u32) -> u64 {
    let rollup =
        fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("read a process's memory");
    rollup.lines().filter(|line| line.starts_with("Pss:")).filter_map(kib).sum()
}

/// The peak memory of a process since the last call, in MiB.
pub(crate) fn peak_mib(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("read a process's status");
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).and_then(kib);
    // 5 resets the peak.
    fs::write(format!("/proc/{process}/clear_refs"), "5").expect("begin a process's mark anew");
    peak.expect("a process has a highest mark") as f64 / MIB
}

/// The number in a line like `VmRSS:      123 kB`.
fn kib(line: &str) -> Option<u64> {
    line.split_once(':')?.1.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_read() {
        assert_eq!(super::kib("VmRSS:\t    1234 kB"), Some(1234));
        assert_eq!(super::kib("Private_Hugetlb:       0 kB"), Some(0));
        assert_eq!(super::kib("Name:\tx"), None);
    }
}
