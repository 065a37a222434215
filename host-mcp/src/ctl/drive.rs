//! `nexusctl drive`: disks that VMs start from or keep their data on.

use clap::{Args, Subcommand};
use nexus_schema::id::{DriveKind, VmKind};
use nexus_schema::tools::drive::{
    DriveAttach, DriveAttachParams, DriveCreate, DriveCreateParams, DriveDelete, DriveDeleteParams,
    DriveDetach, DriveDetachParams, DriveDetails, DriveInspect, DriveInspectParams, DriveList,
    DriveListParams, DriveResize, DriveResizeOutput, DriveResizeParams,
};
use nexus_schema::{ByteSize, Reference, Timestamp, Tool};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::App;
use super::client::{Options, Reply};
use super::confirm::{Yes, confirmed};
use super::each::{each, show_deleted};
use super::error::Error;
use super::follow::{self, New};
use super::format;
use super::list::{self, Paging};
use super::source::{self, located};
use super::ui::{Format, Table};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a drive: empty, or a clone of an image or of another drive
    Create(CreateArgs),
    /// Create a drive from a provider's root filesystem
    FromRootfs(source::Of<source::Rootfs, CreateOptions>),
    /// Create a drive from an OCI image
    FromOci(source::Of<source::Oci, CreateOptions>),
    /// Create a drive from a template, which is built if necessary
    FromTemplate(source::Of<source::Template, CreateOptions>),
    /// Create a drive from an image
    FromImage(source::Of<source::Image, CreateOptions>),
    /// Clone a drive whose VM is stopped
    FromDrive(source::Of<source::Drive, CreateOptions>),
    /// List drives
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show everything about a drive
    #[command(visible_alias = "show")]
    Inspect(OneDrive),
    /// Attach a drive to a stopped VM
    Attach(AttachArgs),
    /// Detach a drive from its stopped VM
    Detach(OneDrive),
    /// Grow a drive, also while its VM is running
    #[command(visible_alias = "grow")]
    Resize(ResizeArgs),
    /// Delete drives and all data on them
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// One drive.
#[derive(Debug, Args)]
pub(crate) struct OneDrive {
    /// The drive: its name or id
    drive: Reference<DriveKind>,
}

/// What a new drive is to be.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    options: CreateOptions,
    /// What to clone: an image as in `vm create`, or drive:NAME [default: an empty filesystem]
    #[arg(long, value_name = "SOURCE")]
    from: Option<String>,
}

/// What it is to be, apart from its source.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// Its size, such as 256M or 10G [default: 8GiB, or that of its source]
    #[arg(long, value_name = "SIZE", value_parser = super::mistakes::disk)]
    size: Option<ByteSize>,
    /// Make it read-only for guests
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    new: New,
}

/// Which drives to list.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only those of this VM
    #[arg(long)]
    vm: Option<Reference<VmKind>>,
    /// Only detached drives
    #[arg(long, conflicts_with = "vm")]
    free: bool,
    #[command(flatten)]
    paging: Paging,
}

/// Which drive goes where.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The drive: its name or id
    drive: Reference<DriveKind>,
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Where the guest mounts it [default: /mnt/NAME]
    #[arg(long, value_name = "PATH", conflicts_with = "root")]
    mount: Option<String>,
    /// Make it the VM's root drive
    #[arg(long)]
    root: bool,
}

/// Which drive gets how large.
#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// The drive: its name or id
    drive: Reference<DriveKind>,
    /// Its new size, such as 20G
    #[arg(value_parser = super::mistakes::disk)]
    size: ByteSize,
}

/// Which drives go.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The drives: names or ids
    #[arg(required = true, value_name = "DRIVE")]
    drives: Vec<Reference<DriveKind>>,
    #[command(flatten)]
    yes: Yes,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Create(args) => create(app, args.from, args.options).await,
        Command::FromRootfs(args) => create_from(app, args.split()).await,
        Command::FromOci(args) => create_from(app, args.split()).await,
        Command::FromTemplate(args) => create_from(app, args.split()).await,
        Command::FromImage(args) => create_from(app, args.split()).await,
        Command::FromDrive(args) => create_from(app, args.split()).await,
        Command::List(args) => list(app, args).await,
        Command::Inspect(args) => {
            let params = DriveInspectParams { drive: args.drive };
            let (reply, drive) = call::<DriveInspect, DriveDetails>(app, &params).await?;
            show(app, &reply, &drive, |drive| details(drive, app.ui.now()))
        }
        Command::Attach(args) => {
            let params = DriveAttachParams {
                drive: args.drive,
                vm: args.vm,
                root: args.root.then_some(true).or(args.mount.as_ref().map(|_| false)),
                mount: args.mount,
                if_boot_id: None,
            };
            let (reply, drive) = call::<DriveAttach, DriveDetails>(app, &params).await?;
            show(app, &reply, &drive, |drive| table(std::slice::from_ref(drive), app.ui.now()))
        }
        Command::Detach(args) => {
            let params = DriveDetachParams { drive: args.drive, if_boot_id: None };
            let (reply, drive) = call::<DriveDetach, DriveDetails>(app, &params).await?;
            show(app, &reply, &drive, |drive| table(std::slice::from_ref(drive), app.ui.now()))
        }
        Command::Resize(args) => resize(app, args).await,
        Command::Delete(args) => delete(app, args).await,
    }
}

async fn call<T, O>(app: &App, params: &T::Params) -> Result<(Reply, O), Error>
where
    T: Tool,
    T::Params: Serialize,
    O: DeserializeOwned,
{
    let reply = app.connect().await?.call_with::<T>(params, Options::default()).await?;
    let facts = reply.facts(T::NAME, T::SHAPE)?;
    Ok((reply, facts))
}

fn show(
    app: &App,
    reply: &Reply,
    drive: &DriveDetails,
    shown: impl FnOnce(&DriveDetails) -> Table,
) -> Result<u8, Error> {
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => app.ui.line(&drive.id.to_string())?,
        Format::Human => app.ui.table(shown(drive))?,
    }
    Ok(0)
}

async fn create_from(app: &App, (from, options): (String, CreateOptions)) -> Result<u8, Error> {
    create(app, Some(from), options).await
}

async fn create(app: &App, from: Option<String>, args: CreateOptions) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = DriveCreateParams {
        name: args.new.name(),
        from: from.map(located),
        size: args.size,
        read_only: args.read_only.then_some(true),
        dry_run: args.new.dry_run.then_some(true),
        wait_s: Some(0),
        idempotency_key: args.new.idempotency_key,
    };
    let created = follow::create::<DriveCreate, _>(&mut client, &app.ui, &params, args.new.wait).await?;
    let Some(followed) = created else {
        return Ok(0);
    };
    let outcome = &followed.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(drive)) => app.ui.table(table(std::slice::from_ref(drive), app.ui.now()))?,
        (Format::Human, None) => app.ui.line(outcome.subject_name.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let ListArgs { vm, free, paging } = args;
    let nothing = match (&vm, free) {
        (None, false) => "no drives; create one with `nexusctl drive create`",
        (_, true) => "no detached drives",
        (Some(_), false) => "this VM has no drives",
    };
    let page = |limit, cursor| DriveListParams {
        vm: vm.clone(),
        attached: free.then_some(false),
        limit: Some(limit),
        cursor,
    };
    let listed = list::all::<DriveList, DriveDetails>(&mut client, &paging, "drives", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|drive| drive.id))?,
        Format::Human => {
            listed.show(&app.ui, table(&listed.rows, app.ui.now()), nothing)?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn resize(app: &App, args: ResizeArgs) -> Result<u8, Error> {
    let params = DriveResizeParams { drive: args.drive, size: args.size };
    let (reply, output) = call::<DriveResize, DriveResizeOutput>(app, &params).await?;
    if !output.in_effect && app.ui.format == Format::Human {
        app.ui.say("the guest can use the new space after its VM's next start");
    }
    show(app, &reply, &output.drive, |drive| table(std::slice::from_ref(drive), app.ui.now()))
}

async fn delete(app: &App, args: DeleteArgs) -> Result<u8, Error> {
    each(app, args.drives, async |client, drive| {
        let params = DriveDeleteParams { drive, confirm: None };
        let gone = confirmed(app, args.yes, async |confirm| {
            client.call::<DriveDelete>(&DriveDeleteParams { confirm, ..params.clone() }).await
        });
        let gone = gone.await?;
        show_deleted(app, &gone, gone.id, &format!("{} deleted", gone.name))
    })
    .await
}

fn place(drive: &DriveDetails) -> (String, String) {
    match &drive.attached_to {
        None => ("-".into(), "-".into()),
        Some(at) if at.root => (at.vm_name.to_string(), "/".into()),
        Some(at) => (at.vm_name.to_string(), at.mount.clone().unwrap_or_else(|| "-".into())),
    }
}

fn table(drives: &[DriveDetails], now: Timestamp) -> Table {
    let mut table = Table::with_headings(&["NAME", "ID", "SIZE", "ON DISK", "VM", "MOUNT", "CREATED"])
        .dropping(&["ON DISK", "CREATED", "ID", "MOUNT", "SIZE"]);
    for drive in drives {
        let (vm, mount) = place(drive);
        let size = format::size(drive.size.as_bytes());
        table.row([
            drive.name.to_string().into(),
            drive.id.to_string().into(),
            if drive.read_only { format!("{size} (read-only)") } else { size }.into(),
            drive.used_bytes.map_or("-".into(), format::size).into(),
            vm.into(),
            mount.into(),
            format::ago(drive.created_at, now).into(),
        ]);
    }
    table
}

fn details(drive: &DriveDetails, now: Timestamp) -> Table {
    let (vm, mount) = place(drive);
    let mut table = Table::of_facts();
    table.fact("name", &drive.name);
    table.fact("id", drive.id);
    table.fact("size", format::size(drive.size.as_bytes()));
    table.maybe("on disk", drive.used_bytes.map(format::size));
    table.maybe("problem", drive.problem.clone());
    table.fact("read-only", if drive.read_only { "yes" } else { "no" });
    table.fact("vm", vm);
    table.fact("mount", mount);
    table.fact("deleted with the vm", if drive.deleted_with_vm { "yes" } else { "no" });
    table.maybe("image", drive.image_id);
    table.maybe("cloned from", drive.parent_id);
    table.fact("path", &drive.path);
    table.fact("owner", &drive.owner);
    table.fact("created", format!("{} ({})", drive.created_at, format::ago(drive.created_at, now)));
    table
}
