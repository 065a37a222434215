//! `nexusctl vm list`, and `nexusctl ps` for running ones.

use std::collections::BTreeMap;

use clap::Args;
use nexus_schema::tools::vm::{VmList, VmListParams, VmState, VmSummary};
use serde_json::{Map, Value};

use super::show;
use crate::ctl::App;
use crate::ctl::args::{pair, word};
use crate::ctl::client::{Client, raw};
use crate::ctl::error::Error;
use crate::ctl::format;
use crate::ctl::list::{self, Listed, Paging};
use crate::ctl::ui::Format;

/// Which VMs to list.
#[derive(Debug, Default, Args)]
pub(crate) struct ListArgs {
    /// Only VMs in this state
    #[arg(long, value_parser = word::<VmState>(&["creating", "created", "starting", "running", "ready", "unreachable", "paused",
        "stopping", "suspended", "stopped", "crashed", "failed"]))]
    state: Option<VmState>,
    /// Only VMs with this label
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    #[command(flatten)]
    paging: Paging,
}

/// Which VMs to list.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also VMs that are not running
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    which: ListArgs,
}

/// Lists VMs.
pub(crate) async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let is_whole = args.state.is_none() && args.tag.is_empty();
    let listed = listed(&mut client, args).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|vm| vm.id))?,
        Format::Human => {
            let nothing = match is_whole {
                true => "no VMs; create one with `nexusctl vm create`",
                false => "no matching VMs",
            };
            listed.show(&app.ui, show::summaries(&listed.rows, app.ui.now()), nothing)?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

/// Lists running VMs, or all on request.
pub(crate) async fn ps(app: &App, args: PsArgs) -> Result<u8, Error> {
    if args.all || args.which.state.is_some() {
        return list(app, args.which).await;
    }
    let mut client = app.connect().await?;
    let listed = listed(&mut client, args.which).await?;
    let (running, down): (Vec<_>, Vec<_>) = listed.rows.iter().cloned().partition(|vm| is_up(vm.state));
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&only_running(&listed)?)?)?,
        Format::Quiet => list::ids(&app.ui, running.iter().map(|vm| vm.id))?,
        Format::Human => {
            if !running.is_empty() {
                app.ui.table(show::summaries(&running, app.ui.now()))?;
            }
            match (running.len(), down.len()) {
                (0, 0) => app.ui.say("no VMs; create one with `nexusctl vm create`"),
                (0, n) => {
                    app.ui.say(&format!("no running VMs; {} not running: `nexusctl ps -a`", is_or_are(n)))
                }
                (_, 0) => {}
                (_, n) => app.ui.say(&format!("{} not running: `nexusctl ps -a`", is_or_are(n))),
            }
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

/// All requested VMs.
pub(super) async fn listed(client: &mut Client, args: ListArgs) -> Result<Listed<VmSummary>, Error> {
    let tags: BTreeMap<_, _> = args.tag.into_iter().collect();
    let page =
        |limit, cursor| VmListParams { state: args.state, tags: tags.clone(), limit: Some(limit), cursor };
    list::all::<VmList, VmSummary>(client, &args.paging, "vms", page).await
}

/// Whether a VM's machine is running, about to run, or suspended.
pub(super) fn is_up(state: VmState) -> bool {
    match state {
        VmState::Creating
        | VmState::Starting
        | VmState::Running
        | VmState::Ready
        | VmState::Unreachable
        | VmState::Paused
        | VmState::Stopping
        | VmState::Suspended => true,
        VmState::Created | VmState::Stopped | VmState::Crashed | VmState::Failed => false,
    }
}

/// The unchanged result, without stopped VMs.
fn only_running(listed: &Listed<VmSummary>) -> Result<Map<String, Value>, Error> {
    let garbled = |source| Error::Garbled { during: "vm_list".into(), source };
    let mut whole: Map<String, Value> = serde_json::from_str(listed.raw.get()).map_err(garbled)?;
    if let Some(Value::Array(vms)) = whole.get_mut("vms") {
        let mut up = listed.rows.iter().map(|vm| is_up(vm.state));
        vms.retain(|_| up.next().unwrap_or(true));
    }
    Ok(whole)
}

fn is_or_are(count: usize) -> String {
    let count = count as u64;
    format!("{} {}", format::count(count, "VM"), if count == 1 { "is" } else { "are" })
}
