//! `nexusctl vm stats`: what VMs use of the host, and what their guests report, again and again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::tools::os::{OsInfo, OsInfoOutput, OsInfoParams};
use nexus_schema::tools::vm::{VmState, VmSummary, VmUsage};
use nexus_schema::{Reference, Tool};
use serde_json::json;

use super::list::{ListArgs, is_up, listed};
use super::show;
use crate::ctl::App;
use crate::ctl::client::{Client, Options, raw};
use crate::ctl::error::Error;
use crate::ctl::format;
use crate::ctl::ui::{Format, Table, Text};

/// The timeout for a guest's answer; a busy guest is shown without data.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a sample lasts.
const SAMPLE: Duration = Duration::from_secs(1);

/// Which VMs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VMs: names or ids [default: all running ones]
    #[arg(value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// Also VMs that are not running
    #[arg(short, long)]
    all: bool,
    /// Show them once; this is the default unless stdout is a terminal
    #[arg(long)]
    no_stream: bool,
    /// Show them again and again, until ctrl-c; with --json a line each time
    #[arg(long, conflicts_with = "no_stream")]
    stream: bool,
}

/// A VM, what it uses of the host, and its guest's answer.
struct Measured {
    vm: VmSummary,
    host: Option<Host>,
    os: Option<OsInfoOutput>,
}

/// What a VM uses of the host.
#[derive(Debug, Clone, Copy, serde::Serialize)]
struct Host {
    #[serde(flatten)]
    usage: VmUsage,
    /// How busy its CPUs are, of which each counts 100; since the sample before.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_percent: Option<f64>,
    sent_bytes: u64,
    received_bytes: u64,
}

/// The CPU time of each VM in its boot at the last sample, and when that was.
type Before = HashMap<(VmId, Option<BootId>), (u64, Instant)>;

/// Shows them.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let mut before = Before::new();
    let is_stream =
        args.stream || (app.ui.stdout_is_terminal && !args.no_stream && app.ui.format == Format::Human);
    // Without a sample before, the load of the CPUs is not known.
    let vms = chosen(&mut client, &args).await?;
    for vm in &vms {
        host_of(&mut client, vm, &mut before).await?;
    }
    loop {
        tokio::time::sleep(SAMPLE).await;
        let mut measured = Vec::new();
        for vm in chosen(&mut client, &args).await? {
            let host = host_of(&mut client, &vm, &mut before).await?;
            let os = match vm.state {
                VmState::Ready => measure(&mut client, &vm).await?,
                _ => None,
            };
            measured.push(Measured { vm, host, os });
        }
        show(app, &measured, is_stream)?;
        if !is_stream {
            return Ok(0);
        }
    }
}

/// The VMs to show.
async fn chosen(client: &mut Client, args: &Args) -> Result<Vec<VmSummary>, Error> {
    let mut vms = listed(client, ListArgs::default()).await?.rows;
    let is_it = |vm: &VmSummary, wanted: &Reference<VmKind>| match wanted {
        Reference::Id(id) => vm.id == *id,
        Reference::Name(name) => vm.name == *name,
    };
    for wanted in &args.vms {
        if !vms.iter().any(|vm| is_it(vm, wanted)) {
            // Lets the daemon report the error for an unknown VM.
            super::inspect_one(client, wanted.clone()).await?;
        }
    }
    match args.vms.is_empty() {
        true => vms.retain(|vm| args.all || is_up(vm.state)),
        false => vms.retain(|vm| args.vms.iter().any(|wanted| is_it(vm, wanted))),
    }
    Ok(vms)
}

fn show(app: &App, measured: &[Measured], is_stream: bool) -> Result<(), Error> {
    match app.ui.format {
        Format::Json => {
            let vms: Vec<_> =
                measured.iter().map(|m| json!({ "vm": m.vm, "host": m.host, "os": m.os })).collect();
            let whole = raw(&json!({ "vms": vms }))?;
            if is_stream { app.ui.line(whole.get()) } else { app.ui.json(&whole) }
        }
        Format::Quiet => crate::ctl::list::ids(&app.ui, measured.iter().map(|m| m.vm.id)),
        Format::Human => {
            if is_stream && app.ui.stdout_is_terminal {
                // To the top left, and what is below cleared.
                app.ui.bytes(b"\x1b[H\x1b[2J")?;
            }
            match measured.is_empty() {
                true => {
                    app.ui.say("no running VMs");
                    Ok(())
                }
                false => app.ui.table(table(measured)),
            }
        }
    }
}

/// What a VM uses of the host; `None` if it was deleted meanwhile.
async fn host_of(client: &mut Client, vm: &VmSummary, before: &mut Before) -> Result<Option<Host>, Error> {
    let details = match super::inspect_one(client, Reference::Id(vm.id)).await {
        Ok((_, details)) => details,
        Err(error @ (Error::Interrupted | Error::Lost { .. })) => return Err(error),
        Err(_) => return Ok(None),
    };
    let Some(usage) = details.usage else { return Ok(None) };
    let now = Instant::now();
    let last = usage.cpu_ms.and_then(|cpu_ms| before.insert((vm.id, details.boot_id), (cpu_ms, now)));
    let cpu_percent = last.zip(usage.cpu_ms).and_then(|((last, at), cpu_ms)| {
        let passed = now.duration_since(at).as_secs_f64() * 1000.0;
        (passed > 0.0).then(|| (cpu_ms.saturating_sub(last) as f64 / passed * 1000.0).round() / 10.0)
    });
    let counts = &details.network.counts;
    Ok(Some(Host {
        usage,
        cpu_percent,
        sent_bytes: counts.sent_bytes,
        received_bytes: counts.received_bytes,
    }))
}

/// A guest's answer; `None` if it times out or is invalid.
async fn measure(client: &mut Client, vm: &VmSummary) -> Result<Option<OsInfoOutput>, Error> {
    let options = Options { deadline: PATIENCE, progress: None };
    let reply = client.call_guest::<OsInfo>(&vm.id.to_string(), &OsInfoParams {}, options).await;
    match reply.and_then(|reply| reply.facts(OsInfo::NAME, OsInfo::SHAPE)) {
        Ok(os) => Ok(Some(os)),
        Err(error @ (Error::Interrupted | Error::Lost { .. })) => Err(error),
        Err(_) => Ok(None),
    }
}

fn table(measured: &[Measured]) -> Table {
    let mut table = Table::with_headings(&[
        "NAME",
        "STATE",
        "UP",
        "CPUS",
        "CPU",
        "LOAD",
        "MEMORY",
        "HOST MEM",
        "DISK",
        "ON HOST",
        "NET OUT / IN",
    ])
    .dropping(&["CPUS", "UP", "LOAD", "ON HOST", "DISK", "HOST MEM", "NET OUT / IN", "MEMORY"]);
    for Measured { vm, host, os } in measured {
        let of = |free: u64, total: u64| {
            format!("{} of {}", format::size(total.saturating_sub(free)), format::size(total))
        };
        let or_none = |text: Option<String>| Text::from(text.unwrap_or_else(|| "-".into()));
        let (host, os) = (host.as_ref(), os.as_ref());
        table.row([
            (&vm.name).into(),
            Text::new(vm.state, show::mood(vm.state)),
            // Rounded to whole seconds. The guest's clock is not trusted: the cast saturates and never panics.
            or_none(os.map(|os| format::millis((os.uptime_s * 1000.0) as u64))),
            vm.vcpus.into(),
            or_none(host.and_then(|host| host.cpu_percent).map(|percent| format!("{percent:.1} %"))),
            or_none(os.map(|os| format!("{:.2}", os.load[0]))),
            os.map_or_else(
                || format!("- of {}", format::size(vm.memory.as_bytes())),
                |os| of(os.memory_available_bytes, os.memory_total_bytes),
            )
            .into(),
            or_none(host.and_then(|host| host.usage.memory_bytes).map(format::size)),
            or_none(os.map(|os| of(os.disk_available_bytes, os.disk_total_bytes))),
            or_none(host.map(|host| format::size(host.usage.disk_bytes))),
            or_none(host.map(|host| {
                format!("{} / {}", format::size(host.sent_bytes), format::size(host.received_bytes))
            })),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guests_say_is_shown_and_what_is_unknown_is_not_made_up() {
        let vm = |name: &str, state: &str| -> VmSummary {
            serde_json::from_value(
                json!({ "id": "bbbbbbbbbbbbe", "name": name, "state": state, "image": "busybox", "vcpus": 2,
                "memory": "512MiB", "created_at": "2026-01-02T03:00:00Z", "protected": false, "tags": {} }),
            )
            .unwrap()
        };
        let os = serde_json::from_value(json!({
            "hostname": "a", "kernel": "6.1", "arch": "x86_64", "cpus": 2, "memory_total_bytes": 500 << 20,
            "memory_available_bytes": 400 << 20, "disk_total_bytes": 8_u64 << 30, "disk_available_bytes": 7_u64 << 30,
            "load": [0.5, 0.25, 0.0], "uptime_s": 75.5, "init": "agent", "agent": "0.1.0"
        }))
        .unwrap();
        let usage = VmUsage { cpu_ms: Some(1), memory_bytes: Some(200 << 20), disk_bytes: 1 << 30 };
        let host = Host { usage, cpu_percent: Some(12.5), sent_bytes: 1 << 20, received_bytes: 0 };
        let measured = [
            Measured { vm: vm("a", "ready"), host: Some(host), os: Some(os) },
            Measured { vm: vm("b", "starting"), host: None, os: None },
        ];
        insta::assert_snapshot!(table(&measured).render(None, false), @"
        NAME  STATE     UP          CPUS  CPU     LOAD  MEMORY              HOST MEM  DISK            ON HOST  NET OUT / IN
        a     ready     1 min 15 s  2     12.5 %  0.50  100 MiB of 500 MiB  200 MiB   1 GiB of 8 GiB  1 GiB    1 MiB / 0 B
        b     starting  -           2     -       -     - of 512 MiB        -         -               -        -
        ");
    }
}
