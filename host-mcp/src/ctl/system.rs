//! `nexusctl doctor|status|version`: the host and the daemon.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nexus_schema::Tool;
use nexus_schema::tools::system::{Doctor, DoctorStatus, SystemInfo, SystemInfoOutput, SystemInfoParams};

use super::App;
use super::client::{Options, raw};
use super::error::Error;
use super::format;
use super::launch;
use super::ui::{Format, Mood, Table, Text};

/// The version of this build.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Shows what this host can run: asks the daemon, or runs `nexusd doctor` if no daemon is running.
pub(crate) async fn doctor(app: &App) -> Result<u8, Error> {
    let mut client = match app.connect_if_up().await {
        Ok(client) => client,
        Err(Error::DaemonDown { .. }) => return Err(become_doctor(app)),
        Err(error) => return Err(error),
    };
    let info = client.call::<SystemInfo>(&SystemInfoParams {}).await?;
    let doctor = &info.doctor;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(doctor)?)?,
        Format::Quiet => {}
        Format::Human => {
            app.ui.table(checks(doctor))?;
            app.ui.line(&verdict(doctor))?;
        }
    }
    Ok(if doctor.ok { 0 } else { 1 })
}

/// Replaces this process; returns only if that failed.
fn become_doctor(app: &App) -> Error {
    let daemon = launch::daemon_binary(&app.env);
    app.ui.say("the daemon is not running; checking the host without it");
    let mut command = Command::new(&daemon);
    command.arg("doctor");
    if app.ui.is_json() {
        command.arg("--json");
    }
    let source = command.exec();
    Error::File { what: "run", path: daemon, source }
}

fn checks(doctor: &Doctor) -> Table {
    let mut table =
        Table::with_headings(&["CHECK", "STATUS", "FOUND", "WHAT TO DO"]).prose(&["FOUND", "WHAT TO DO"]);
    for check in &doctor.checks {
        let (word, mood) = match check.status {
            DoctorStatus::Ok => ("ok", Mood::Good),
            DoctorStatus::Note => ("note", Mood::Plain),
            DoctorStatus::Warn => ("warn", Mood::Uneasy),
            DoctorStatus::Fail => ("FAIL", Mood::Bad),
        };
        let fix = check.fix.as_deref().unwrap_or_default();
        table.row([(&check.name).into(), Text::new(word, mood), (&check.found).into(), fix.into()]);
    }
    table
}

fn verdict(doctor: &Doctor) -> String {
    match (doctor.ok, &doctor.driver) {
        (true, Some(driver)) => {
            let accel = doctor.accel.as_deref().unwrap_or("unknown acceleration");
            format!("VMs run with {driver} ({accel}): {}", doctor.why)
        }
        (true, None) => format!("VMs can run here: {}", doctor.why),
        (false, _) => format!("VMs cannot run here: {}", doctor.why),
    }
}

/// Shows the daemon's state in short.
pub(crate) async fn status(app: &App) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let reply = client.call_with::<SystemInfo>(&SystemInfoParams {}, Options::default()).await?;
    let info: SystemInfoOutput = reply.facts(SystemInfo::NAME, SystemInfo::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => app.ui.line(&info.instance.to_string())?,
        Format::Human => {
            let mut table = summary(&info, app.ui.now());
            table.fact("socket", app.socket()?.display());
            app.ui.table(table)?;
        }
    }
    Ok(0)
}

fn summary(info: &SystemInfoOutput, now: nexus_schema::Timestamp) -> Table {
    let mut table = Table::of_facts();
    let started = format::ago(info.started_at, now);
    table.fact("daemon", format!("nexusd {}, pid {}, started {started}", info.version, info.pid));
    table.fact("instance", info.instance);
    let by_state: Vec<_> =
        info.vms.iter().filter(|(_, n)| **n > 0).map(|(s, n)| format!("{n} {s}")).collect();
    let total = info.vms.values().sum::<u64>();
    let vms = if by_state.is_empty() { "none".into() } else { format!("{total} ({})", by_state.join(", ")) };
    table.fact("vms", vms);
    table.fact("operations", format!("{} running", info.ops_running));
    table.fact("disk", format!("{} free at {}", format::size(info.disk_free_bytes), info.state_directory));
    for used in info.disk.iter().filter(|used| used.items > 0) {
        table.fact(&used.what, format!("{} in {}", format::size(used.bytes), used.items));
    }
    let mood = if info.doctor.ok { Mood::Good } else { Mood::Bad };
    table.fact("host", Text::new(verdict(&info.doctor), mood));
    table
}

/// Shows both versions.
pub(crate) async fn version(app: &App) -> Result<u8, Error> {
    let daemon = match app.connect_if_up().await {
        Ok(mut client) => Some(client.call::<SystemInfo>(&SystemInfoParams {}).await?.version),
        Err(Error::DaemonDown { .. }) => None,
        Err(error) => return Err(error),
    };
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&serde_json::json!({ "nexusctl": VERSION, "nexusd": daemon }))?)?,
        Format::Quiet => app.ui.line(VERSION)?,
        Format::Human => {
            app.ui.line(&format!("nexusctl {VERSION}"))?;
            app.ui.line(&format!("nexusd {}", daemon.as_deref().unwrap_or("is not running")))?;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn info() -> SystemInfoOutput {
        serde_json::from_value(json!({
            "version": "0.1.0", "instance": "bbbbbbbbbbbbe", "started_at": "2026-01-02T03:04:05Z", "pid": 7,
            "state_directory": "/var/lib/nexus", "guest_protocol": 1, "schema_version": 1,
            "vms": { "ready": 2, "stopped": 1, "failed": 0 }, "ops_running": 0, "disk_free_bytes": 21_474_836_480_u64,
            "doctor": { "ok": true, "driver": "qemu", "accel": "tcg", "why": "/dev/kvm belongs to kvm_pvm", "checks": [
                { "name": "kvm", "status": "note", "found": "kvm_pvm", "fix": "use a host with VT-x" },
                { "name": "qemu-system-x86_64", "status": "ok", "found": "7.2.22" }
            ]}
        }))
        .unwrap()
    }

    #[test]
    fn checks_say_what_to_do() {
        let doctor = info().doctor;
        insta::assert_snapshot!(checks(&doctor).render(None, false), @"
        CHECK               STATUS  FOUND    WHAT TO DO
        kvm                 note    kvm_pvm  use a host with VT-x
        qemu-system-x86_64  ok      7.2.22
        ");
        assert_eq!(verdict(&doctor), "VMs run with qemu (tcg): /dev/kvm belongs to kvm_pvm");
    }

    #[test]
    fn status_is_short() {
        let now = "2026-01-02T05:04:05Z".parse().unwrap();
        insta::assert_snapshot!(summary(&info(), now).render(None, false), @"
        daemon      nexusd 0.1.0, pid 7, started 2 h ago
        instance    bbbbbbbbbbbbe
        vms         3 (2 ready, 1 stopped)
        operations  0 running
        disk        20 GiB free at /var/lib/nexus
        host        VMs run with qemu (tcg): /dev/kvm belongs to kvm_pvm
        ");
    }
}
