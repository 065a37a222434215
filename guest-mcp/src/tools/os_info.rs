//! `os_info`.

use nexus_schema::ToolError;
use nexus_schema::tools::os::{OsInfo, OsInfoOutput, OsInfoParams, SystemStatus};
use rustix::system::{Uname, uname};

use super::{Block, Call, Reply, Run, human_bytes};
use crate::os::{OsRelease, read_small, shell, uptime};
use crate::role::VERSION;
use crate::system;

/// The minimum clock skew that is reported, in milliseconds.
const SKEW_TOLD_MS: i64 = 1000;
/// Package managers by the paths of their programs.
const PACKAGE_MANAGERS: [(&str, &str); 8] = [
    ("/usr/bin/apt-get", "apt"),
    ("/sbin/apk", "apk"),
    ("/usr/bin/apk", "apk"),
    ("/usr/bin/dnf", "dnf"),
    ("/usr/bin/yum", "yum"),
    ("/usr/bin/pacman", "pacman"),
    ("/usr/bin/zypper", "zypper"),
    ("/usr/bin/xbps-install", "xbps"),
];

impl Run for OsInfo {
    async fn run(call: Call, OsInfoParams {}: OsInfoParams) -> Result<Reply<OsInfoOutput>, ToolError> {
        // The kernel has all of this in memory, so there is no need for another thread.
        let mut info = gather();
        info.clock_skew_ms = call.agent.clock_skew_ms();
        if call.agent.is_beside_init() {
            info.system = Some(system::status().await);
        }
        let header = format!(
            "{} · {} · {} CPU · {} of {} memory free",
            info.os.as_deref().unwrap_or("unknown system"),
            info.kernel,
            info.cpus,
            human_bytes(info.memory_available_bytes),
            human_bytes(info.memory_total_bytes),
        );
        let text = format!(
            "hostname {} · arch {} · init {} · shell {} · packages {} · disk {} of {} free · load {:.2} {:.2} {:.2} · \
             up {:.0} s · agent {}",
            info.hostname,
            info.arch,
            info.init,
            info.shell.as_deref().unwrap_or("none"),
            info.package_manager.as_deref().unwrap_or("none"),
            human_bytes(info.disk_available_bytes),
            human_bytes(info.disk_total_bytes),
            info.load[0],
            info.load[1],
            info.load[2],
            info.uptime_s,
            info.agent,
        );
        let told = [info.system.as_ref().map(about_system), info.clock_skew_ms.and_then(about_clock)];
        let mut reply = Reply::new(header, info);
        reply.blocks.push(Block::talk(text));
        reply.blocks.extend(told.into_iter().flatten().map(Block::talk));
        Ok(reply)
    }
}

fn about_system(status: &SystemStatus) -> String {
    let mut text = format!("system: {}", status.state.as_str());
    if !status.failed.is_empty() {
        text.push_str(&format!("; failed: {}", status.failed.join(", ")));
    }
    text
}

/// Describes a clock that is off by more than usual.
fn about_clock(skew_ms: i64) -> Option<String> {
    let way = if skew_ms < 0 { "behind" } else { "ahead of" };
    (skew_ms.abs() >= SKEW_TOLD_MS)
        .then(|| format!("the clock is {:.1} s {way} the host's", skew_ms.unsigned_abs() as f64 / 1000.0))
}

fn gather() -> OsInfoOutput {
    let uname = uname();
    let release = OsRelease::read();
    let system = rustix::system::sysinfo();
    let unit = u64::from(system.mem_unit.max(1));
    let total = system.totalram.saturating_mul(unit);
    let disk = rustix::fs::statvfs("/").ok();
    let disk_bytes = |blocks: fn(&rustix::fs::StatVfs) -> u64| {
        disk.as_ref().map_or(0, |disk| blocks(disk).saturating_mul(disk.f_frsize))
    };
    OsInfoOutput {
        hostname: text(&uname, Uname::nodename),
        os: release.pretty_name,
        os_id: release.id,
        os_version: release.version_id,
        kernel: text(&uname, Uname::release),
        arch: text(&uname, Uname::machine),
        cpus: cpus(),
        memory_total_bytes: total,
        memory_available_bytes: memory_available().unwrap_or(system.freeram.saturating_mul(unit)),
        disk_total_bytes: disk_bytes(|disk| disk.f_blocks),
        disk_available_bytes: disk_bytes(|disk| disk.f_bavail),
        // Fixed point with 16 fractional bits.
        load: system.loads.map(|load| (load as f64 / 65_536.0 * 100.0).round() / 100.0),
        uptime_s: (uptime().as_secs_f64() * 1000.0).round() / 1000.0,
        init: read_small("/proc/1/comm", 64).unwrap_or_default().trim().to_owned(),
        system: None,
        clock_skew_ms: None,
        shell: shell().map(str::to_owned),
        package_manager: PACKAGE_MANAGERS
            .iter()
            .find(|(program, _)| rustix::fs::access(*program, rustix::fs::Access::EXISTS).is_ok())
            .map(|(_, name)| (*name).to_owned()),
        agent: VERSION.to_owned(),
    }
}

fn text(uname: &Uname, field: fn(&Uname) -> &std::ffi::CStr) -> String {
    field(uname).to_string_lossy().into_owned()
}

fn cpus() -> u32 {
    let online =
        read_small("/sys/devices/system/cpu/online", 1 << 10).and_then(|list| count_list(list.trim()));
    online
        .or_else(|| std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok()))
        .unwrap_or(1)
}

/// Returns how many numbers a list such as `0-3,5` contains.
fn count_list(list: &str) -> Option<u32> {
    list.split(',').try_fold(0_u32, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

fn memory_available() -> Option<u64> {
    let text = read_small("/proc/meminfo", 4 << 10)?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        for (list, count) in
            [("0", Some(1)), ("0-3", Some(4)), ("0-3,5,7-8", Some(7)), ("", None), ("3-1", None)]
        {
            assert_eq!(count_list(list), count, "{list}");
        }
    }

    #[test]
    fn this_machine_has_plausible_facts() {
        let info = gather();
        assert!(info.cpus >= 1 && info.memory_total_bytes > 1 << 20 && info.disk_total_bytes > 0);
        assert!(info.memory_available_bytes <= info.memory_total_bytes);
        assert!(!info.kernel.is_empty() && !info.init.is_empty());
    }
}
