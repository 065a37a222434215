//! `nexusctl vm start|stop|restart|kill|pause|resume`.

use clap::Args;
use nexus_schema::Reference;
use nexus_schema::id::{BootId, VmKind};
use nexus_schema::tools::op::ALREADY;
use nexus_schema::tools::vm::{
    VmDetails, VmPause, VmPauseParams, VmRestart, VmRestartParams, VmResume, VmResumeParams, VmStart,
    VmStartParams, VmState, VmStop, VmStopParams,
};

use crate::ctl::App;
use crate::ctl::client::{Client, raw};
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
    /// Start a suspended VM from its disk, and give its memory up
    #[arg(long)]
    cold: bool,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
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
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
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

/// Which VMs to pause or resume.
#[derive(Debug, Args)]
pub(crate) struct PauseArgs {
    /// The VMs: names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
}

/// Which VMs to pause, and how.
#[derive(Debug, Args)]
pub(crate) struct SuspendArgs {
    /// Save their memory to the disk and end their VMMs; the next call wakes them
    #[arg(long)]
    suspend: bool,
    #[command(flatten)]
    which: PauseArgs,
}

/// Starts VMs.
pub(crate) async fn start(app: &App, args: StartArgs) -> Result<u8, Error> {
    each(app, args.vms.clone(), async |client, vm| {
        let started = start_one(app, client, &vm, &args).await?;
        moved(app, &vm, &started)
    })
    .await
}

/// Shuts VMs down, or cuts their power.
pub(crate) async fn stop(app: &App, args: StopArgs) -> Result<u8, Error> {
    each(app, args.vms.clone(), async |client, vm| {
        let stopped = stop_one(app, client, &vm, &args).await?;
        moved(app, &vm, &stopped)
    })
    .await
}

/// Cuts the power of VMs.
pub(crate) async fn kill(app: &App, args: KillArgs) -> Result<u8, Error> {
    stop(app, StopArgs { vms: args.vms, force: true, if_boot_id: None, wait: args.wait }).await
}

/// Shuts down running VMs, and starts them again.
pub(crate) async fn restart(app: &App, args: StopArgs) -> Result<u8, Error> {
    each(app, args.vms, async |client, vm| {
        let force = args.force.then_some(true);
        let params = VmRestartParams { vm: vm.clone(), force, wait_s: Some(0), if_boot_id: args.if_boot_id };
        let restarted = follow::start::<VmRestart, _>(client, &app.ui, &params, args.wait).await?;
        moved(app, &vm, &restarted)
    })
    .await
}

/// Pauses or suspends VMs.
pub(crate) async fn pause(app: &App, args: SuspendArgs) -> Result<u8, Error> {
    let SuspendArgs { suspend, which: args } = args;
    each(app, args.vms, async |client, vm| {
        let params = VmPauseParams { vm, suspend: suspend.then_some(true), if_boot_id: args.if_boot_id };
        changed(app, &client.call::<VmPause>(&params).await?)
    })
    .await
}

/// Resumes paused VMs.
pub(crate) async fn resume(app: &App, args: PauseArgs) -> Result<u8, Error> {
    each(app, args.vms, async |client, vm| {
        let params = VmResumeParams { vm, if_boot_id: args.if_boot_id };
        changed(app, &client.call::<VmResume>(&params).await?)
    })
    .await
}

/// Shows the new state of a VM after a call that is no operation.
fn changed(app: &App, vm: &VmDetails) -> Result<(), Error> {
    match app.ui.format {
        Format::Json => app.ui.json(&raw(vm)?),
        Format::Quiet => app.ui.line(&vm.id.to_string()),
        Format::Human => app.ui.line(&format!("{} {}", vm.name, vm.state)),
    }
}

async fn start_one(
    app: &App,
    client: &mut Client,
    vm: &Reference<VmKind>,
    args: &StartArgs,
) -> Result<Followed<VmDetails>, Error> {
    let cold = args.cold.then_some(true);
    let params = VmStartParams { vm: vm.clone(), cold, wait_s: Some(0), if_boot_id: args.if_boot_id };
    follow::start::<VmStart, _>(client, &app.ui, &params, args.wait).await
}

async fn stop_one(
    app: &App,
    client: &mut Client,
    vm: &Reference<VmKind>,
    args: &StopArgs,
) -> Result<Followed<VmDetails>, Error> {
    let force = args.force.then_some(true);
    let params = VmStopParams { vm: vm.clone(), force, wait_s: Some(0), if_boot_id: args.if_boot_id };
    follow::start::<VmStop, _>(client, &app.ui, &params, args.wait).await
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
