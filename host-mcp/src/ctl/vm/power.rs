//! `nexusctl vm start|stop|restart|kill`.

use clap::Args;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;
use nexus_schema::tools::op::ALREADY;
use nexus_schema::tools::vm::{VmDetails, VmStart, VmStartParams, VmState, VmStop, VmStopParams};

use crate::ctl::App;
use crate::ctl::client::Client;
use crate::ctl::each::each;
use crate::ctl::error::Error;
use crate::ctl::follow::{self, Followed, Wait};
use crate::ctl::format;
use crate::ctl::ui::Format;
use crate::ctl::vm::subject;

/// Which VMs to start or start again.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// The VMs: names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    #[command(flatten)]
    wait: Wait,
}

/// Which VMs to stop and how.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// The VMs: names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// Cut the power at once: unwritten data is lost
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: Wait,
}

/// Which VMs to kill.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// The VMs: names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    #[command(flatten)]
    wait: Wait,
}

/// Starts VMs.
pub(crate) async fn start(app: &App, args: StartArgs) -> Result<u8, Error> {
    each(app, args.vms, async |client, vm| {
        let started = start_one(app, client, &vm, args.wait).await?;
        moved(app, &vm, &started)
    })
    .await
}

/// Shuts VMs down, or cuts their power.
pub(crate) async fn stop(app: &App, args: StopArgs) -> Result<u8, Error> {
    each(app, args.vms, async |client, vm| {
        let stopped = stop_one(app, client, &vm, args.force, args.wait).await?;
        moved(app, &vm, &stopped)
    })
    .await
}

/// Cuts the power of VMs.
pub(crate) async fn kill(app: &App, args: KillArgs) -> Result<u8, Error> {
    stop(app, StopArgs { vms: args.vms, force: true, wait: args.wait }).await
}

/// Shuts down running VMs, and starts them again.
pub(crate) async fn restart(app: &App, args: StopArgs) -> Result<u8, Error> {
    each(app, args.vms, async |client, vm| {
        // It must be stopped before it is started, however long the start is followed.
        stop_one(app, client, &vm, args.force, Wait::default()).await?;
        let started = start_one(app, client, &vm, args.wait).await?;
        moved(app, &vm, &started)
    })
    .await
}

async fn start_one(
    app: &App,
    client: &mut Client,
    vm: &Reference<VmKind>,
    wait: Wait,
) -> Result<Followed<VmDetails>, Error> {
    let params = VmStartParams { vm: vm.clone(), wait_s: Some(0) };
    follow::start::<VmStart, _>(client, &app.ui, &params, wait).await
}

async fn stop_one(
    app: &App,
    client: &mut Client,
    vm: &Reference<VmKind>,
    force: bool,
    wait: Wait,
) -> Result<Followed<VmDetails>, Error> {
    let params = VmStopParams { vm: vm.clone(), force: force.then_some(true), wait_s: Some(0) };
    follow::start::<VmStop, _>(client, &app.ui, &params, wait).await
}

/// Shows the new state of a VM.
fn moved(app: &App, vm: &Reference<VmKind>, followed: &Followed<VmDetails>) -> Result<(), Error> {
    match (app.ui.format, &followed.outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw),
        (Format::Quiet, Some(details)) => app.ui.line(&details.id.to_string()),
        (Format::Quiet, None) => app.ui.line(subject(&followed.outcome).0),
        (Format::Human, Some(details)) if followed.outcome.progress.step == ALREADY => {
            app.ui.line(&format!("{} was already {}", details.name, details.state))
        }
        (Format::Human, Some(details)) => {
            let took = details.timings.filter(|_| details.state == VmState::Ready);
            let took = took.map(|t| format!(" (in {})", format::millis(t.total_ms))).unwrap_or_default();
            app.ui.line(&format!("{} {}{took}", details.name, details.state))
        }
        (Format::Human, None) => app.ui.line(&format!("{vm} {}", followed.outcome.state.as_str())),
    }
}
