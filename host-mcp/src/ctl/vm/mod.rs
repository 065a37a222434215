//! `nexusctl vm`: VMs from creation to deletion.

mod console;
mod files;
mod list;
mod logs;
mod network;
mod power;
mod publish;
mod show;
mod stats;
mod wait;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use nexus_schema::id::VmKind;
use nexus_schema::link::InitMode;
use nexus_schema::tools::vm::{
    DeletedVm, DriverChoice, IdleAction, UndeletedVm, VmCreate, VmCreateParams, VmDelete, VmDeleteParams,
    VmDetails, VmHistory, VmHistoryParams, VmInspect, VmInspectParams, VmRename, VmRenameParams, VmState,
    VmTransition, VmUpdate, VmUpdateParams,
};
use nexus_schema::{ByteSize, Name, Reference, TimeSpan, Tool, tools::OpOutcome};

pub(crate) use list::{ListArgs, PsArgs, list, ps};
pub(crate) use logs::{Args as LogsArgs, run as logs};
pub(crate) use network::Args as NetworkArgs;
pub(crate) use power::{
    KillArgs, PauseArgs, StartArgs, StopArgs, SuspendArgs, kill, pause, restart, resume, start, stop,
};
pub(crate) use show::of_inspected_network;
pub(crate) use stats::{Args as StatsArgs, run as stats};
pub(crate) use wait::{Args as WaitArgs, run as wait};

use super::App;
use super::args::{pair, word};
use super::checkpoint::{ForkArgs, RollbackArgs, fork, rollback};
use super::client::{Client, Options, Reply, raw};
use super::confirm::{Yes, confirmed};
use super::each::{each, show_deleted};
use super::error::Error;
use super::follow::{self, New};
use super::hint::About;
use super::list::Paging;
use super::source::{self, located};
use super::ui::Format;
use super::{list as lists, mistakes, moment};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a VM and start it
    Create(Box<CreateArgs>),
    /// Create a VM from a provider's root filesystem
    FromRootfs(Box<source::Of<source::Rootfs, CreateOptions>>),
    /// Create a VM from an OCI image
    FromOci(Box<source::Of<source::Oci, CreateOptions>>),
    /// Create a VM from a template, which is built if necessary
    FromTemplate(Box<source::Of<source::Template, CreateOptions>>),
    /// Create a VM from an image
    FromImage(Box<source::Of<source::Image, CreateOptions>>),
    /// List VMs
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// List running VMs
    Ps(PsArgs),
    /// Show everything about a VM
    #[command(visible_alias = "show")]
    Inspect(OneVm),
    /// Start VMs
    Start(StartArgs),
    /// Shut VMs down
    Stop(StopArgs),
    /// Shut VMs down and start them again
    Restart(StopArgs),
    /// Pause VMs: their processors stop, their memory stays
    Pause(SuspendArgs),
    /// Resume paused VMs
    Resume(PauseArgs),
    /// Take a VM back to one of its checkpoints
    Rollback(RollbackArgs),
    /// Make VMs that go on from a running VM, or from a checkpoint
    Fork(ForkArgs),
    /// Wait for a VM: a state, a port, a file or a command's end
    Wait(WaitArgs),
    /// Cut the power of VMs: unwritten data is lost
    Kill(KillArgs),
    /// Delete VMs with their drives
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Change a VM's labels, protection, lifetime and network
    Update(UpdateArgs),
    /// Rename a VM
    Rename(RenameArgs),
    /// Make a port of a VM reachable on this host
    Publish(publish::PublishArgs),
    /// Stop publishing a port
    Unpublish(publish::UnpublishArgs),
    /// Show state, load, memory, disk and network of VMs, again and again
    Stats(StatsArgs),
    /// Show a VM's console
    Logs(LogsArgs),
    /// Follow a VM's serial console, without escape sequences unless --raw; ctrl-c ends it
    Console(console::Args),
    /// Show what happened to a VM
    History(HistoryArgs),
}

/// One VM.
#[derive(Debug, Args)]
pub(crate) struct OneVm {
    /// The VM: its name or id
    vm: Reference<VmKind>,
}

/// What a new VM is to be.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    options: CreateOptions,
    /// What to create it from: debian, busybox, oci:IMAGE, rootfs:alpine@3.21, template:NAME, file:PATH, or your own image [default: debian]
    #[arg(long, visible_alias = "image", value_name = "SOURCE")]
    from: Option<String>,
    /// The same for a root filesystem on this host: a directory, a tar archive or an ext4 image
    #[arg(long, value_name = "PATH", conflicts_with = "from")]
    rootfs: Option<PathBuf>,
}

impl CreateArgs {
    /// The source, and the rest.
    fn split(self) -> (Option<String>, CreateOptions) {
        (self.rootfs.map(|path| format!("file:{}", path.display())).or(self.from), self.options)
    }
}

/// What it is to be, apart from its source.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// The kernel: an installed one's name or id, or a file's path [default: the distribution's]
    #[arg(long)]
    kernel: Option<String>,
    /// Virtual CPUs [default: 1]
    #[arg(long, visible_alias = "cpus")]
    vcpus: Option<u32>,
    /// Memory [default: 1GiB]
    #[arg(short, long, value_name = "SIZE", value_parser = mistakes::memory)]
    memory: Option<ByteSize>,
    /// Size of the root drive, sparse [default: 8GiB]
    #[arg(long, value_name = "SIZE", value_parser = mistakes::disk)]
    disk: Option<ByteSize>,
    /// The VMM [default: auto]
    #[arg(long, value_parser = word::<DriverChoice>(&["auto", "firecracker", "qemu"]))]
    driver: Option<DriverChoice>,
    /// What is PID 1: agent, or system (the image's own init) [default: agent]
    #[arg(long, value_parser = word::<InitMode>(&["agent", "system"]))]
    init: Option<InitMode>,
    #[command(flatten)]
    network: network::Args,
    /// The hostname inside [default: the VM's name]
    #[arg(long)]
    hostname: Option<String>,
    /// An environment variable of every command in the VM
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A file to write before the VM is ready for the first time, from a local file with its mode
    #[arg(long, value_name = "PATH=FILE", value_parser = pair)]
    file: Vec<(String, String)>,
    /// A label
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// Refuse its deletion until the protection is removed
    #[arg(long)]
    protect: bool,
    /// Do not start it
    #[arg(long)]
    no_start: bool,
    /// Delete it so long from now, such as 2h; a protected one is only stopped [default: never]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    ttl: Option<TimeSpan>,
    /// Stop it once nothing has been under way in it for so long, such as 30m [default: never]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    idle_stop: Option<TimeSpan>,
    /// What --idle-stop does: stop it, or suspend it until the next call wakes it, with --checkpoints only [default: stop]
    #[arg(long, value_name = "ACTION", value_parser = word::<IdleAction>(&["stop", "suspend"]))]
    idle_action: Option<IdleAction>,
    /// Make it so that checkpoints of it can be taken; with firecracker they can anyway
    #[arg(long)]
    checkpoints: bool,
    /// Run this shell line in it, show what it wrote, and delete the VM
    #[arg(long, value_name = "LINE", conflicts_with_all = ["no_start", "protect"])]
    run: Option<String>,
    #[command(flatten)]
    new: New,
}

/// Which VMs to delete and how.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The VMs: names or ids
    #[arg(required_unless_present = "tag", conflicts_with = "tag", value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// All VMs with this label; if repeated, with all of these labels
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// Also if it is running
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    yes: Yes,
}

/// What to change.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// A label to set
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// A label to remove
    #[arg(long, value_name = "KEY")]
    untag: Vec<String>,
    /// Refuse its deletion
    #[arg(long, conflicts_with = "unprotect")]
    protect: bool,
    /// Allow its deletion again
    #[arg(long)]
    unprotect: bool,
    /// Delete it so long from now, such as 2h; 0 for never
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    ttl: Option<TimeSpan>,
    /// Stop it once nothing has been under way in it for so long, such as 30m; 0 for never
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    idle_stop: Option<TimeSpan>,
    /// What --idle-stop does: stop it, or suspend it until the next call wakes it
    #[arg(long, value_name = "ACTION", value_parser = word::<IdleAction>(&["stop", "suspend"]))]
    idle_action: Option<IdleAction>,
    #[command(flatten)]
    network: network::Args,
    #[command(flatten)]
    yes: Yes,
}

/// Which VM, and its name from now on.
#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Its new name
    #[arg(value_name = "NEW_NAME")]
    name: Name,
}

/// Whose history.
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// The VM: its name or id; the id also works after it was deleted
    vm: Reference<VmKind>,
    #[command(flatten)]
    paging: Paging,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Create(args) => {
            let (from, options) = args.split();
            create(app, from, options).await
        }
        Command::FromRootfs(args) => create_from(app, args.split()).await,
        Command::FromOci(args) => create_from(app, args.split()).await,
        Command::FromTemplate(args) => create_from(app, args.split()).await,
        Command::FromImage(args) => create_from(app, args.split()).await,
        Command::List(args) => list(app, args).await,
        Command::Inspect(args) => inspect(app, args).await,
        Command::Ps(args) => ps(app, args).await,
        Command::Start(args) => start(app, args).await,
        Command::Stop(args) => stop(app, args).await,
        Command::Restart(args) => restart(app, args).await,
        Command::Pause(args) => pause(app, args).await,
        Command::Resume(args) => resume(app, args).await,
        Command::Rollback(args) => rollback(app, args).await,
        Command::Fork(args) => fork(app, args).await,
        Command::Wait(args) => wait(app, args).await,
        Command::Kill(args) => kill(app, args).await,
        Command::Delete(args) => delete(app, args).await,
        Command::Update(args) => update(app, args).await,
        Command::Rename(args) => rename(app, args).await,
        Command::Publish(args) => publish::publish(app, args).await,
        Command::Unpublish(args) => publish::unpublish(app, args).await,
        Command::Stats(args) => stats(app, args).await,
        Command::Logs(args) => logs(app, args).await,
        Command::Console(args) => console::run(app, args).await,
        Command::History(args) => history(app, args).await,
    }
}

async fn create_from(app: &App, (from, options): (String, CreateOptions)) -> Result<u8, Error> {
    create(app, Some(from), options).await
}

async fn create(app: &App, from: Option<String>, args: CreateOptions) -> Result<u8, Error> {
    let wait = args.new.wait;
    let params = create_params(from, args)?;
    let mut client = app.connect().await?;
    let created = follow::create::<VmCreate, _>(&mut client, &app.ui, &params, wait).await?;
    let Some(followed) = created else {
        return Ok(0);
    };
    let outcome = &followed.outcome;
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => app.ui.line(subject(outcome).0)?,
        Format::Human => match &outcome.result {
            Some(VmDetails { run: Some(run), .. }) => {
                app.ui.bytes(run.stdout.as_bytes())?;
                app.ui.error_bytes(run.stderr.as_bytes())?;
            }
            Some(vm) => {
                app.ui.table(show::created(vm))?;
                if app.ui.stderr_is_terminal && vm.state == VmState::Ready {
                    app.ui.say(&format!("work in it with `nexusctl guest run {} -- COMMAND`", vm.name));
                }
            }
            None => app.ui.line(subject(outcome).1)?,
        },
    }
    let run = outcome.result.as_ref().and_then(|vm| vm.run.as_ref());
    Ok(run.map_or(0, |run| run.status.unwrap_or(u8::MAX)))
}

fn create_params(from: Option<String>, args: CreateOptions) -> Result<VmCreateParams, Error> {
    let files = args.file.into_iter().map(|(path, file)| Ok((path, files::read(file.into())?)));
    let files = files.collect::<Result<_, Error>>()?;
    Ok(VmCreateParams {
        name: args.new.name(),
        from: from.map(located),
        kernel: args.kernel.map(located),
        vcpus: args.vcpus,
        memory: args.memory,
        disk: args.disk,
        driver: args.driver,
        init: args.init,
        network: args.network.params(),
        hostname: args.hostname,
        env: args.env.into_iter().collect(),
        files,
        tags: args.tag.into_iter().collect(),
        protected: args.protect.then_some(true),
        start: args.no_start.then_some(false),
        ttl: args.ttl,
        idle_stop: args.idle_stop,
        idle_action: args.idle_action,
        checkpoints: args.checkpoints.then_some(true),
        run: args.run,
        dry_run: args.new.dry_run.then_some(true),
        wait_s: Some(0),
        idempotency_key: args.new.idempotency_key,
    })
}

/// Id and name of what an operation works on, if known.
fn subject<R>(outcome: &OpOutcome<R>) -> (&str, &str) {
    let id = outcome.subject_id.as_deref().unwrap_or_default();
    (id, outcome.subject_name.as_deref().unwrap_or(id))
}

async fn inspect_one(client: &mut Client, vm: Reference<VmKind>) -> Result<(Reply, VmDetails), Error> {
    let params = VmInspectParams { vm, verbose: None };
    let reply = client.call_with::<VmInspect>(&params, Options::default()).await?;
    let vm = reply.facts(VmInspect::NAME, VmInspect::SHAPE)?;
    Ok((reply, vm))
}

async fn inspect(app: &App, args: OneVm) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let (reply, vm) = inspect_one(&mut client, args.vm).await?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => app.ui.line(&vm.id.to_string())?,
        Format::Human => app.ui.table(show::details(&vm, app.ui.now()))?,
    }
    Ok(0)
}

/// Deletes VMs.
pub(crate) async fn delete(app: &App, args: DeleteArgs) -> Result<u8, Error> {
    let force = args.force.then_some(true);
    let show = |gone: &[DeletedVm]| {
        gone.iter().try_for_each(|gone| show_deleted(app, gone, gone.id, &format!("{} deleted", gone.name)))
    };
    if args.tag.is_empty() {
        return each(app, args.vms, async |client, vm| {
            let params = VmDeleteParams { vm: Some(vm), force, ..VmDeleteParams::default() };
            let gone = confirmed(app, args.yes, async |confirm| {
                client.call::<VmDelete>(&VmDeleteParams { confirm, ..params.clone() }).await
            });
            show(&gone.await?.deleted)
        })
        .await;
    }
    let params = VmDeleteParams { tags: args.tag.into_iter().collect(), force, ..VmDeleteParams::default() };
    let mut client = app.connect().await?;
    let output = confirmed(app, args.yes, async |confirm| {
        client.call::<VmDelete>(&VmDeleteParams { confirm, ..params.clone() }).await
    });
    let output = output.await?;
    show(&output.deleted)?;
    if output.deleted.is_empty() && output.failed.is_empty() {
        match app.ui.format {
            Format::Json => app.ui.line("[]")?,
            Format::Quiet | Format::Human => app.ui.say("no VM has all of these labels"),
        }
    }
    let failures = output.failed.into_iter().map(|UndeletedVm { name, error, .. }| {
        Error::from(error).about(&About::subject(VmDelete::NAME, Some(name.as_str())))
    });
    let codes: Vec<u8> = failures
        .map(|error| {
            app.ui.fail(&error);
            error.exit_code()
        })
        .collect();
    Ok(codes.first().copied().unwrap_or(0))
}

async fn update(app: &App, args: UpdateArgs) -> Result<u8, Error> {
    let protected = match (args.protect, args.unprotect) {
        (true, _) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    let network = args.network.params();
    let has_limit = args.ttl.is_some() || args.idle_stop.is_some() || args.idle_action.is_some();
    if args.tag.is_empty() && args.untag.is_empty() && protected.is_none() && network.is_none() && !has_limit
    {
        return Err(Error::usage(
            "nothing to change: give --tag, --untag, --protect, --unprotect, --ttl, --idle-stop, --idle-action, --network, --preset, --allow or --deny",
        ));
    }
    let has_network = network.is_some();
    let params = VmUpdateParams {
        tags: args.tag.into_iter().collect(),
        remove_tags: args.untag,
        protected,
        network,
        ttl: args.ttl,
        idle_stop: args.idle_stop,
        idle_action: args.idle_action,
        ..VmUpdateParams::of(args.vm)
    };
    let mut client = app.connect().await?;
    let vm = confirmed(app, args.yes, async |confirm| {
        client.call::<VmUpdate>(&VmUpdateParams { confirm, ..params.clone() }).await
    });
    let vm = vm.await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&vm)?)?,
        Format::Quiet => app.ui.line(&vm.id.to_string())?,
        Format::Human => {
            let protection = if vm.protected { "protected" } else { "not protected" };
            app.ui.line(&format!("{} {}, tags: {}", vm.name, protection, show::tags(&vm.tags)))?;
            if has_limit {
                app.ui.line(&format!("{} {}", vm.name, show::limits(&vm, app.ui.now())))?;
            }
            if has_network {
                app.ui.table(show::of_network(&vm, app.ui.now()))?;
            }
        }
    }
    Ok(0)
}

/// Renames a VM.
pub(crate) async fn rename(app: &App, args: RenameArgs) -> Result<u8, Error> {
    let params = VmRenameParams { vm: args.vm.clone(), name: args.name, if_boot_id: None };
    let vm = app.connect().await?.call::<VmRename>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&vm)?)?,
        Format::Quiet => app.ui.line(&vm.id.to_string())?,
        Format::Human => {
            app.ui.line(&format!("{} is now named {}", args.vm, vm.name))?;
            if list::is_up(vm.state) && vm.state != VmState::Ready {
                app.ui.say("unless it was set explicitly, its hostname changes at its next start");
            }
        }
    }
    Ok(0)
}

async fn history(app: &App, args: HistoryArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let vm = args.vm;
    let page = |limit, cursor| VmHistoryParams { vm: vm.clone(), limit: Some(limit), cursor };
    let listed =
        lists::all::<VmHistory, VmTransition>(&mut client, &args.paging, "transitions", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => lists::ids(&app.ui, listed.rows.iter().filter_map(|t| t.boot_id))?,
        Format::Human => {
            listed.show(&app.ui, show::transitions(&listed.rows, app.ui.now()), "no transitions")?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}
