//! `nexusctl checkpoint`: a VM's memory and drives at one moment. Also `vm fork` and `vm rollback`.

mod diff;

use clap::{Args, Subcommand};
use nexus_schema::id::{BootId, CheckpointKind, VmKind};
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::checkpoint::{
    CheckpointDelete, CheckpointDeleteParams, CheckpointDetails, CheckpointList, CheckpointListParams,
    RestoreContract, RestoreOutput, VmCheckpoint, VmCheckpointParams, VmFork, VmForkParams, VmRollback,
    VmRollbackParams,
};
use nexus_schema::{Name, Reference, TimeSpan, Timestamp};

use super::App;
use super::args::pair;
use super::confirm::{Yes, confirmed};
use super::each::{each, show_deleted};
use super::error::Error;
use super::follow::{self, Followed, Wait};
use super::format;
use super::list::{self, Paging};
use super::ui::{Format, Table};
use super::vm::NetworkArgs;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Take a checkpoint of a running VM, which goes on
    Create(CreateArgs),
    /// List checkpoints with their parents and sizes
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show which files and processes changed between two checkpoints, or from one until now
    Diff(diff::DiffArgs),
    /// Delete checkpoints
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// Of which VM, and what it is called.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// The checkpoint's name [default: generated]
    name: Option<Name>,
    /// A label; can be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// Delete it after this time, such as 2h [default: never]
    #[arg(long, value_name = "TIME")]
    ttl: Option<TimeSpan>,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
    #[command(flatten)]
    wait: Wait,
}

/// Which checkpoints to list.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only those of this VM
    vm: Option<Reference<VmKind>>,
    #[command(flatten)]
    paging: Paging,
}

/// Which checkpoints go.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The checkpoints: ids, or names that only one checkpoint has
    #[arg(required = true, value_name = "CHECKPOINT")]
    checkpoints: Vec<Reference<CheckpointKind>>,
    #[command(flatten)]
    yes: Yes,
}

/// Which VM goes back to what.
#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// A checkpoint of this VM: its name or id
    checkpoint: Reference<CheckpointKind>,
    /// Do not keep the present as a checkpoint for an hour
    #[arg(long)]
    discard: bool,
    /// Only if this is the VM's boot
    #[arg(long, value_name = "BOOT_ID")]
    if_boot_id: Option<BootId>,
    #[command(flatten)]
    yes: Yes,
    #[command(flatten)]
    wait: Wait,
}

/// What is forked, and how often.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The VM to fork as it is now; with --checkpoint, the VM whose checkpoint it is. One of both is needed
    #[arg(required_unless_present = "checkpoint")]
    vm: Option<Reference<VmKind>>,
    /// The name of a new VM; can be given several times [default: generated]
    #[arg(long, value_name = "NAME")]
    name: Vec<Name>,
    /// Fork from this checkpoint instead: its id, or its name
    #[arg(long)]
    checkpoint: Option<Reference<CheckpointKind>>,
    /// How many VMs to make, at most 16 [default: as many as names, or 1]
    #[arg(short = 'c', long, value_name = "NUMBER")]
    count: Option<u32>,
    /// A label of the new VMs; can be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// Delete them after this time, such as 2h [default: never]
    #[arg(long, value_name = "TIME")]
    ttl: Option<TimeSpan>,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    wait: Wait,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Create(args) => create(app, args).await,
        Command::List(args) => list(app, args).await,
        Command::Diff(args) => diff::run(app, args).await,
        Command::Delete(args) => delete(app, args).await,
    }
}

async fn create(app: &App, args: CreateArgs) -> Result<u8, Error> {
    let params = VmCheckpointParams {
        vm: args.vm,
        name: args.name,
        tags: args.tag.into_iter().collect(),
        ttl: args.ttl,
        if_boot_id: args.if_boot_id,
        wait_s: Some(0),
    };
    let mut client = app.connect().await?;
    let taken = follow::start::<VmCheckpoint, _>(&mut client, &app.ui, &params, args.wait).await?;
    let outcome: &OpOutcome<CheckpointDetails> = &taken.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&taken.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(checkpoint)) => {
            app.ui.table(table(std::slice::from_ref(checkpoint), app.ui.now()))?;
            app.ui.say(&format!(
                "{} stood still for {}",
                checkpoint.vm_name,
                format::millis(checkpoint.pause_ms)
            ));
        }
        (Format::Human, None) => app.ui.line(outcome.subject_name.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let ListArgs { vm, paging } = args;
    let page = |limit, cursor| CheckpointListParams { vm: vm.clone(), limit: Some(limit), cursor };
    let listed =
        list::all::<CheckpointList, CheckpointDetails>(&mut client, &paging, "checkpoints", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|checkpoint| checkpoint.id))?,
        Format::Human => {
            let nothing = "no checkpoints; take one with `nexusctl checkpoint create VM`";
            listed.show(&app.ui, table(&listed.rows, app.ui.now()), nothing)?;
            for checkpoint in &listed.rows {
                if let Some(problem) = &checkpoint.problem {
                    app.ui.warn(&format!(
                        "{} cannot be restored: {}",
                        checkpoint.name,
                        format::tame(problem)
                    ));
                }
            }
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn delete(app: &App, args: DeleteArgs) -> Result<u8, Error> {
    each(app, args.checkpoints, async |client, checkpoint| {
        let params = CheckpointDeleteParams { checkpoint, confirm: None };
        let gone = confirmed(app, args.yes, async |confirm| {
            client.call::<CheckpointDelete>(&CheckpointDeleteParams { confirm, ..params.clone() }).await
        });
        let gone = gone.await?;
        let line = format!("{} deleted ({} freed)", gone.name, format::size(gone.freed_bytes));
        show_deleted(app, &gone, gone.id, &line)
    })
    .await
}

/// Takes a VM back to a checkpoint.
pub(crate) async fn rollback(app: &App, args: RollbackArgs) -> Result<u8, Error> {
    let params = VmRollbackParams {
        vm: args.vm,
        checkpoint: args.checkpoint,
        keep_current: args.discard.then_some(false),
        if_boot_id: args.if_boot_id,
        wait_s: Some(0),
        confirm: None,
    };
    let mut client = app.connect().await?;
    let done = confirmed(app, args.yes, async |confirm| {
        let params = VmRollbackParams { confirm, ..params.clone() };
        follow::start::<VmRollback, RestoreOutput>(&mut client, &app.ui, &params, args.wait).await
    });
    show(app, &done.await?)
}

/// Forks VMs.
pub(crate) async fn fork(app: &App, args: ForkArgs) -> Result<u8, Error> {
    let params = VmForkParams {
        vm: args.vm,
        checkpoint: args.checkpoint,
        count: args.count,
        names: args.name,
        tags: args.tag.into_iter().collect(),
        ttl: args.ttl,
        network: args.network.params(),
        wait_s: Some(0),
    };
    let mut client = app.connect().await?;
    let done = follow::start::<VmFork, RestoreOutput>(&mut client, &app.ui, &params, args.wait).await?;
    show(app, &done)
}

/// Shows the VMs that go on from a checkpoint, and what that means for them.
fn show(app: &App, done: &Followed<RestoreOutput>) -> Result<u8, Error> {
    match (app.ui.format, &done.outcome.result) {
        (Format::Json, _) => app.ui.json(&done.raw)?,
        (Format::Quiet, Some(output)) => list::ids(&app.ui, output.vms.iter().map(|vm| vm.id))?,
        (Format::Quiet, None) => app.ui.line(&done.outcome.op_id.to_string())?,
        (Format::Human, Some(output)) => {
            for vm in &output.vms {
                app.ui.line(&format!("{} ready (in {})", vm.name, format::millis(vm.ready_ms)))?;
            }
            if let Some(vm) = output.vms.first() {
                app.ui.say(&told(&vm.contract));
            }
            if let Some(before) = output.before {
                app.ui.say(&format!("what was taken back is kept for an hour as checkpoint {before}"));
            }
        }
        (Format::Human, None) => app.ui.line(done.outcome.state.as_str())?,
    }
    Ok(0)
}

/// A contract in a sentence for each of its parts.
fn told(contract: &RestoreContract) -> String {
    let parts = [
        ("kept", &contract.kept),
        ("renewed", &contract.renewed),
        ("closed", &contract.closed),
        ("not renewed", &contract.not_renewed),
    ];
    let parts: Vec<String> = parts
        .into_iter()
        .filter(|(_, words)| !words.is_empty())
        .map(|(what, words)| format!("{what}: {}", format::tame(&words.join(", "))))
        .collect();
    parts.join("; ")
}

fn table(checkpoints: &[CheckpointDetails], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["NAME", "ID", "VM", "PARENT", "MEMORY", "DISK", "TAKEN", "EXPIRES"])
            .dropping(&["EXPIRES", "PARENT", "ID"]);
    for checkpoint in checkpoints {
        let parent = checkpoint.parent_id.map_or_else(|| "-".to_owned(), |id| id.to_string());
        let name = checkpoint.name.to_string();
        let memory = format::size(checkpoint.memory_bytes);
        table.row([
            if checkpoint.current { format!("{name} (current)") } else { name }.into(),
            checkpoint.id.to_string().into(),
            checkpoint.vm_name.to_string().into(),
            parent.into(),
            if checkpoint.unpacked_bytes.is_some() { format!("{memory} packed") } else { memory }.into(),
            format::size(checkpoint.disk_bytes).into(),
            format::ago(checkpoint.created_at, now).into(),
            checkpoint.expires_at.map_or_else(|| "-".to_owned(), |at| at.to_string()).into(),
        ]);
    }
    table
}
