//! `nexusctl image`: the images that VMs are created from.

use clap::{Args, Subcommand};
use nexus_schema::id::ImageKind;
use nexus_schema::link::InitMode;
use nexus_schema::tools::image::{
    ImageCreate, ImageCreateParams, ImageDelete, ImageDeleteParams, ImageDetails, ImageInspect,
    ImageInspectParams, ImageList, ImageListParams,
};
use nexus_schema::{ErrorCode, Name, Reference, Timestamp, Tool};

use super::App;
use super::args::word;
use super::client::{Client, Options, raw};
use super::each::{each, show_deleted};
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::image_export;
use super::list::{self, Paging};
use super::source::{self, located, pulled};
use super::ui::{Format, Mood, Table, Text};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List images
    #[command(visible_alias = "ls")]
    List(Paging),
    /// Show everything about an image
    #[command(visible_alias = "show")]
    Inspect(InspectArgs),
    /// Create an image from packages, an OCI image, a VM, a directory, a tar archive or an ext4 file
    Create(CreateArgs),
    /// Create an image from a provider's root filesystem
    FromRootfs(source::Of<source::Rootfs, CreateOptions>),
    /// Create an image from an OCI image
    FromOci(source::Of<source::Oci, CreateOptions>),
    /// Create an image from a template
    FromTemplate(source::Of<source::Template, CreateOptions>),
    /// Create an image from another one
    FromImage(source::Of<source::Image, CreateOptions>),
    /// Save an image to a tar archive that `docker load` and OCI tools read
    Save(image_export::SaveArgs),
    /// Push an image to a registry
    Push(image_export::PushArgs),
    /// Delete images
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// Which images.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The images: names or ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<Reference<ImageKind>>,
}

/// Which image.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The image: its name or id
    image: Reference<ImageKind>,
}

/// What to make it from.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// debian, busybox, oci:IMAGE, rootfs:alpine@3.21, image:NAME, template:NAME, vm:NAME, or file:PATH on the daemon's host; with --from, the image's name
    #[arg(value_name = "SOURCE", required_unless_present = "from_option")]
    from: Option<String>,
    /// The source; what stands before is the image's name then
    #[arg(long = "from", value_name = "SOURCE")]
    from_option: Option<String>,
    #[command(flatten)]
    options: CreateOptions,
}

/// How to make it.
#[derive(Debug, Args)]
pub(crate) struct CreateOptions {
    /// Its name [default: derived from the source]
    #[arg(long)]
    name: Option<Name>,
    /// What is PID 1: agent, or system (the image's own init) [default: agent]
    #[arg(long, value_parser = word::<InitMode>(&["agent", "system"]))]
    init: Option<InitMode>,
    /// Only show what would be done
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Idempotency key: within a day, the same key with the same arguments returns the same image instead of creating it again
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

/// What to take from a registry.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// The image, such as python:3.12-slim or REGISTRY/REPOSITORY@sha256:DIGEST
    #[arg(value_name = "REF")]
    reference: String,
    #[command(flatten)]
    options: CreateOptions,
}

/// Makes an image from one in a registry, unless an up-to-date one exists.
pub(crate) async fn pull(app: &App, args: PullArgs) -> Result<u8, Error> {
    let has_name = args.options.name.is_some();
    let from = located(pulled(args.reference));
    match create(app, (from.clone(), args.options)).await {
        Err(Error::Tool(refusal)) if refusal.error.code == ErrorCode::NameTaken && !has_name => {
            let mut client = app.connect().await?;
            let name = planned_name(&mut client, from).await?.ok_or(Error::Tool(refusal))?;
            let image = Reference::Name(name);
            let image = client.call::<ImageInspect>(&ImageInspectParams { image }).await?;
            match app.ui.format {
                Format::Json => app.ui.json(&raw(&image)?)?,
                Format::Quiet => list::ids(&app.ui, image.id.into_iter())?,
                Format::Human => {
                    app.ui.table(table(std::slice::from_ref(&image), app.ui.now()))?;
                    app.ui.say("the image is already up to date");
                }
            }
            Ok(0)
        }
        done => done,
    }
}

/// The name of an image made from this source.
async fn planned_name(client: &mut Client, from: String) -> Result<Option<Name>, Error> {
    let params = ImageCreateParams {
        name: None,
        from,
        init: None,
        dry_run: Some(true),
        wait_s: None,
        idempotency_key: None,
    };
    let creation = client.call::<ImageCreate>(&params).await?;
    Ok(creation.plan.and_then(|plan| plan.name))
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::List(paging) => list(app, paging).await,
        Command::Inspect(args) => inspect(app, args).await,
        Command::Create(args) => create(app, args.split()?).await,
        Command::FromRootfs(args) => create(app, args.split()).await,
        Command::FromOci(args) => create(app, args.split()).await,
        Command::FromTemplate(args) => create(app, args.split()).await,
        Command::FromImage(args) => create(app, args.split()).await,
        Command::Save(args) => image_export::save(app, args).await,
        Command::Push(args) => image_export::push(app, args).await,
        Command::Delete(args) => delete(app, args).await,
    }
}

impl CreateArgs {
    /// The source and the rest.
    fn split(self) -> Result<(String, CreateOptions), Error> {
        let Self { from, from_option, mut options } = self;
        let (from, name) = match (from_option, from) {
            (Some(source), name) => (source, name),
            (None, source) => (source.unwrap_or_default(), None),
        };
        if let Some(name) = name {
            if options.name.is_some() {
                return Err(Error::usage(format!(
                    "the image is called both {name} and as --name says: give one"
                )));
            }
            let parsed =
                name.parse::<Name>().map_err(|e| Error::usage(format!("`{name}` is not a name: {e}")));
            options.name = Some(parsed?);
        }
        Ok((from, options))
    }
}

pub(crate) async fn list(app: &App, paging: Paging) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| ImageListParams { limit: Some(limit), cursor };
    let listed = list::all::<ImageList, ImageDetails>(&mut client, &paging, "images", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().filter_map(|image| image.id))?,
        Format::Human => {
            listed.show(
                &app.ui,
                table(&listed.rows, app.ui.now()),
                "no images; create one with `nexusctl image create`",
            )?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn inspect(app: &App, args: InspectArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = ImageInspectParams { image: args.image };
    let reply = client.call_with::<ImageInspect>(&params, Options::default()).await?;
    let image: ImageDetails = reply.facts(ImageInspect::NAME, ImageInspect::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => list::ids(&app.ui, image.id.into_iter())?,
        Format::Human => app.ui.table(details(&image, app.ui.now()))?,
    }
    Ok(0)
}

async fn delete(app: &App, args: DeleteArgs) -> Result<u8, Error> {
    each(app, args.images, async |client, image| {
        let gone = client.call::<ImageDelete>(&ImageDeleteParams { image }).await?;
        let line = format!("{} deleted ({})", gone.name, format::size(gone.freed_bytes));
        show_deleted(app, &gone, gone.id, &line)
    })
    .await
}

async fn create(app: &App, (from, args): (String, CreateOptions)) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = ImageCreateParams {
        name: args.name,
        from: located(from),
        init: args.init,
        dry_run: args.dry_run.then_some(true),
        wait_s: Some(0),
        idempotency_key: args.idempotency_key,
    };
    let created = follow::create::<ImageCreate, _>(&mut client, &app.ui, &params, args.wait).await?;
    let Some(followed) = created else {
        return Ok(0);
    };
    let outcome = &followed.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(image)) => app.ui.table(table(std::slice::from_ref(image), app.ui.now()))?,
        (Format::Human, None) => app.ui.line(outcome.subject_name.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

fn status(image: &ImageDetails) -> Text {
    if image.installed { Text::new("ready", Mood::Good) } else { "created on first use".into() }
}

fn table(images: &[ImageDetails], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["NAME", "ID", "STATUS", "DISTRO", "SIZE", "ON DISK", "USED BY", "CREATED"])
            .dropping(&["USED BY", "ON DISK", "DISTRO", "ID", "CREATED", "SIZE"]);
    for image in images {
        let name = if image.default { format!("{} (default)", image.name) } else { image.name.to_string() };
        table.row([
            name.into(),
            image.id.map_or("-".into(), |id| id.to_string()).into(),
            status(image),
            image.distro.as_deref().unwrap_or("-").into(),
            image.size.map_or("-".into(), |size| format::size(size.as_bytes())).into(),
            image.used_bytes.map_or("-".into(), format::size).into(),
            image.used_by.into(),
            image.created_at.map_or("-".into(), |at| format::ago(at, now)).into(),
        ]);
    }
    table
}

fn details(image: &ImageDetails, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    table.fact("name", &image.name);
    table.maybe("id", image.id);
    table.fact("status", status(image));
    table.fact("default", if image.default { "yes" } else { "no" });
    table.fact("source", &image.source);
    table.maybe("distro", image.distro.as_ref());
    if let Some(config) = &image.config {
        table.maybe("working dir", config.working_dir.as_ref());
        table.maybe("user", config.user.as_ref());
        let words: Vec<&str> = config.entrypoint.iter().chain(&config.cmd).map(String::as_str).collect();
        table.maybe("command", (!words.is_empty()).then(|| words.join(" ")));
        table.maybe("env", (!config.env.is_empty()).then(|| names(&config.env)));
    }
    table.fact("arch", &image.arch);
    table.fact(
        "init",
        match image.init {
            InitMode::Agent => "agent",
            InitMode::System => "system",
        },
    );
    table.maybe("size", image.size.map(|size| format::size(size.as_bytes())));
    table.maybe("on disk", image.used_bytes.map(format::size));
    table.maybe("sha256", image.sha256.as_ref());
    table.maybe("path", image.path.as_ref());
    table.fact("used by", format::count(image.used_by, "drive"));
    table.maybe("created", image.created_at.map(|at| format!("{at} ({})", format::ago(at, now))));
    table
}

/// The names of variables; their values may be long.
fn names(env: &std::collections::BTreeMap<String, String>) -> String {
    env.keys().map(String::as_str).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_were_not_made_yet_are_told_apart() {
        let images: Vec<ImageDetails> = serde_json::from_value(serde_json::json!([
            { "id": "bbbbbbbbbbbbe", "name": "busybox", "source": "busybox", "installed": true, "default": false,
              "distro": "debian-12", "init": "agent", "arch": "x86_64", "size": "16MiB", "used_bytes": 2_300_000,
              "used_by": 3, "created_at": "2026-01-02T03:00:00Z" },
            { "name": "debian", "source": "debian:bookworm", "installed": false, "default": true, "init": "agent",
              "arch": "x86_64", "used_by": 0 }
        ]))
        .unwrap();
        let now = "2026-01-02T04:00:00Z".parse().unwrap();
        insta::assert_snapshot!(table(&images, now).render(None, false), @"
        NAME              ID             STATUS                DISTRO     SIZE    ON DISK  USED BY  CREATED
        busybox           bbbbbbbbbbbbe  ready                 debian-12  16 MiB  2.2 MiB  3        1 h ago
        debian (default)  -              created on first use  -          -       -        0        -
        ");
    }
}
