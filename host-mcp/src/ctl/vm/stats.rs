//! `nexusctl vm stats`: the load of VMs, as their guests report it, once.

use std::time::Duration;

use nexus_schema::id::VmKind;
use nexus_schema::tools::os::{OsInfo, OsInfoOutput, OsInfoParams};
use nexus_schema::tools::vm::{VmState, VmSummary};
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

/// Which VMs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VMs: names or ids [default: all running ones]
    #[arg(value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// Also VMs that are not running
    #[arg(short, long)]
    all: bool,
    /// No effect: this is the default
    #[arg(long, hide = true)]
    no_stream: bool,
}

/// A VM, and its guest's answer.
struct Measured {
    vm: VmSummary,
    os: Option<OsInfoOutput>,
}

/// Shows them.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let mut vms = listed(&mut client, ListArgs::default()).await?.rows;
    let is_it = |vm: &VmSummary, wanted: &Reference<VmKind>| match wanted {
        Reference::Id(id) => vm.id == *id,
        Reference::Name(name) => vm.name == *name,
    };
    for wanted in &args.vms {
        if !vms.iter().any(|vm| is_it(vm, wanted)) {
            // Lets the daemon report the error for an unknown VM.
            super::inspect_one(&mut client, wanted.clone()).await?;
        }
    }
    match args.vms.is_empty() {
        true => vms.retain(|vm| args.all || is_up(vm.state)),
        false => vms.retain(|vm| args.vms.iter().any(|wanted| is_it(vm, wanted))),
    }
    let mut measured = Vec::new();
    for vm in vms {
        let os = match vm.state {
            VmState::Ready => measure(&mut client, &vm).await?,
            _ => None,
        };
        measured.push(Measured { vm, os });
    }
    match app.ui.format {
        Format::Json => {
            let vms: Vec<_> = measured.iter().map(|m| json!({ "vm": m.vm, "os": m.os })).collect();
            app.ui.json(&raw(&json!({ "vms": vms }))?)?;
        }
        Format::Quiet => crate::ctl::list::ids(&app.ui, measured.iter().map(|m| m.vm.id))?,
        Format::Human if measured.is_empty() => app.ui.say("no running VMs"),
        Format::Human => app.ui.table(table(&measured))?,
    }
    Ok(0)
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
    let mut table = Table::with_headings(&["NAME", "STATE", "UP", "CPUS", "LOAD", "MEMORY", "DISK"])
        .dropping(&["CPUS", "UP", "LOAD", "DISK", "MEMORY"]);
    for Measured { vm, os } in measured {
        let of = |free: u64, total: u64| {
            format!("{} of {}", format::size(total.saturating_sub(free)), format::size(total))
        };
        let or_none = |text: Option<String>| Text::from(text.unwrap_or_else(|| "-".into()));
        let os = os.as_ref();
        table.row([
            (&vm.name).into(),
            Text::new(vm.state, show::mood(vm.state)),
            // Rounded to whole seconds. The guest's clock is not trusted: the cast saturates and never panics.
            or_none(os.map(|os| format::millis((os.uptime_s * 1000.0) as u64))),
            vm.vcpus.into(),
            or_none(os.map(|os| format!("{:.2}", os.load[0]))),
            os.map_or_else(
                || format!("- of {}", format::size(vm.memory.as_bytes())),
                |os| of(os.memory_available_bytes, os.memory_total_bytes),
            )
            .into(),
            or_none(os.map(|os| of(os.disk_available_bytes, os.disk_total_bytes))),
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
        let measured =
            [Measured { vm: vm("a", "ready"), os: Some(os) }, Measured { vm: vm("b", "starting"), os: None }];
        insta::assert_snapshot!(table(&measured).render(None, false), @"
        NAME  STATE     UP          CPUS  LOAD  MEMORY              DISK
        a     ready     1 min 15 s  2     0.50  100 MiB of 500 MiB  1 GiB of 8 GiB
        b     starting  -           2     -     - of 512 MiB        -
        ");
    }
}
