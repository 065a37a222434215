//! `nexusctl template`: blueprints of images.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use data_encoding::BASE64;
use nexus_schema::id::TemplateKind;
use nexus_schema::link::InitMode;
use nexus_schema::service::Service;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::template::{
    Overlay, TemplateCreate, TemplateCreateParams, TemplateDelete, TemplateDeleteParams, TemplateDetails,
    TemplateInspect, TemplateInspectParams, TemplateList, TemplateListParams, TemplateSummary,
    TemplateUpdate, TemplateUpdateParams,
};
use nexus_schema::tools::vm::IdleAction;
use nexus_schema::{ByteSize, Name, Reference, TimeSpan, Timestamp};

use super::App;
use super::args::{pair, word};
use super::client::raw;
use super::error::Error;
use super::format;
use super::list::{self, Paging};
use super::moment;
use super::source::located;
use super::ui::{Format, Table};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Define how an image is built
    Create(CreateArgs),
    /// List templates
    #[command(visible_alias = "ls")]
    List(Paging),
    /// Show a template, its versions and its last builds
    #[command(visible_alias = "show")]
    Inspect(InspectArgs),
    /// Change a template, as a new version
    Update(UpdateArgs),
    /// Delete a template; its images stay
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// What it makes.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name
    name: Name,
    /// Its source: debian, busybox, image:NAME, file:PATH on the daemon's host
    #[arg(long, visible_alias = "from")]
    source: String,
    /// A file to add to the image, from a local file with its mode; may be repeated
    #[arg(long, value_name = "PATH=FILE", value_parser = pair)]
    overlay: Vec<(String, String)>,
    /// A named command that its VMs start at each boot; may be repeated
    #[arg(long, value_name = "NAME=COMMAND", value_parser = pair)]
    service: Vec<(String, String)>,
    /// A package to install (source debian only); may be repeated
    #[arg(short, long, value_name = "PACKAGE")]
    package: Vec<String>,
    /// What is PID 1: agent, or system (the image's own init) [default: agent]
    #[arg(long, value_parser = word::<InitMode>(&["agent", "system"]))]
    init: Option<InitMode>,
    /// The minimum size of the image's filesystem [default: as needed]
    #[arg(long, value_name = "SIZE", value_parser = super::mistakes::disk)]
    size: Option<ByteSize>,
    /// Delete VMs created from the template so long after that, such as 2h [default: as other VMs]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    ttl: Option<TimeSpan>,
    /// Stop them once nothing has been under way in them for so long, such as 30m [default: as other VMs]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    idle_stop: Option<TimeSpan>,
    /// What --idle-stop does to those of which checkpoints can be taken [default: as other VMs]
    #[arg(long, value_name = "ACTION", value_parser = word::<IdleAction>(&["stop", "suspend"]))]
    idle_action: Option<IdleAction>,
}

/// What to change.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// The template: its name or id
    template: Reference<TemplateKind>,
    /// Its source
    #[arg(long, visible_alias = "from")]
    source: Option<String>,
    /// A file to add or replace, from a local file with its mode; may be repeated
    #[arg(long, value_name = "PATH=FILE", value_parser = pair)]
    overlay: Vec<(String, String)>,
    /// A named command to add or replace, which its VMs start at each boot; may be repeated
    #[arg(long, value_name = "NAME=COMMAND", value_parser = pair)]
    service: Vec<(String, String)>,
    /// A path to remove from the overlays; may be repeated
    #[arg(long, value_name = "PATH")]
    remove_overlay: Vec<String>,
    /// A package to add; may be repeated
    #[arg(short, long, value_name = "PACKAGE")]
    package: Vec<String>,
    /// A package to remove; may be repeated
    #[arg(long, value_name = "PACKAGE")]
    remove_package: Vec<String>,
    /// Remove all packages; with --package, install only those
    #[arg(long, conflicts_with = "remove_package")]
    no_packages: bool,
    /// What is PID 1: agent, or system
    #[arg(long, value_parser = word::<InitMode>(&["agent", "system"]))]
    init: Option<InitMode>,
    /// The minimum size of the image's filesystem; 0 for as needed
    #[arg(long, value_name = "SIZE", value_parser = super::mistakes::disk)]
    size: Option<ByteSize>,
    /// Delete VMs created from the template so long after that, such as 2h; 0 for as other VMs
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    ttl: Option<TimeSpan>,
    /// Stop them once nothing has been under way in them for so long, such as 30m; 0 for as other VMs
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    idle_stop: Option<TimeSpan>,
    /// What --idle-stop does to those of which checkpoints can be taken
    #[arg(long, value_name = "ACTION", value_parser = word::<IdleAction>(&["stop", "suspend"]))]
    idle_action: Option<IdleAction>,
    /// Go back to an earlier version, before the other changes
    #[arg(long, value_name = "VERSION")]
    back_to: Option<u32>,
}

/// Which one.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The template: its name or id
    template: Reference<TemplateKind>,
    /// Which version [default: the newest]
    #[arg(long = "template-version", visible_alias = "release", value_name = "VERSION")]
    version: Option<u32>,
}

/// Which one.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The template: its name or id
    template: Reference<TemplateKind>,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Create(args) => {
            let params = TemplateCreateParams {
                name: args.name,
                source: located(args.source),
                overlays: overlays(args.overlay)?,
                services: services(args.service),
                packages: args.package,
                init: args.init,
                size: args.size,
                ttl: args.ttl,
                idle_stop: args.idle_stop,
                idle_action: args.idle_action,
            };
            let template = app.connect().await?.call::<TemplateCreate>(&params).await?;
            show(app, &template)
        }
        Command::List(paging) => list(app, paging).await,
        Command::Inspect(args) => {
            let params = TemplateInspectParams { template: args.template, version: args.version };
            let template = app.connect().await?.call::<TemplateInspect>(&params).await?;
            show(app, &template)
        }
        Command::Update(args) => update(app, args).await,
        Command::Delete(args) => {
            let params = TemplateDeleteParams { template: args.template };
            let gone = app.connect().await?.call::<TemplateDelete>(&params).await?;
            match app.ui.format {
                Format::Json => app.ui.json(&raw(&gone)?)?,
                Format::Quiet => app.ui.line(&gone.id.to_string())?,
                Format::Human => app.ui.line(&format!("{} deleted", gone.name))?,
            }
            Ok(0)
        }
    }
}

async fn update(app: &App, args: UpdateArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let packages = match (args.no_packages, args.package.is_empty() && args.remove_package.is_empty()) {
        (true, _) => Some(args.package),
        (false, true) => None,
        (false, false) => {
            let params = TemplateInspectParams { template: args.template.clone(), version: args.back_to };
            let before = client.call::<TemplateInspect>(&params).await?.spec.packages;
            Some(changed(before, args.package, &args.remove_package)?)
        }
    };
    let params = TemplateUpdateParams {
        template: args.template,
        source: args.source.map(located),
        overlays: overlays(args.overlay)?,
        services: services(args.service),
        remove_overlays: args.remove_overlay,
        packages,
        init: args.init,
        size: args.size,
        ttl: args.ttl,
        idle_stop: args.idle_stop,
        idle_action: args.idle_action,
        version: args.back_to,
    };
    let template = client.call::<TemplateUpdate>(&params).await?;
    show(app, &template)
}

/// The packages of a template after adding some and removing others.
fn changed(mut packages: Vec<String>, add: Vec<String>, remove: &[String]) -> Result<Vec<String>, Error> {
    if let Some(unknown) = remove.iter().find(|name| !packages.contains(name)) {
        let has = if packages.is_empty() { "none".to_owned() } else { packages.join(", ") };
        return Err(Error::usage(format!("the template has no package {unknown}; its packages: {has}")));
    }
    packages.retain(|name| !remove.contains(name));
    for name in add {
        if !packages.contains(&name) {
            packages.push(name);
        }
    }
    Ok(packages)
}

/// The services by name, each with its command.
fn services(commands: Vec<(String, String)>) -> BTreeMap<String, Service> {
    let service = |command| Service { command: Some(command), ..Service::default() };
    commands.into_iter().map(|(name, command)| (name, service(command))).collect()
}

fn overlays(files: Vec<(String, String)>) -> Result<BTreeMap<String, Overlay>, Error> {
    let read = |file: String| -> Result<Overlay, Error> {
        let path = PathBuf::from(file);
        let failed = |source| Error::File { what: "read the overlay", path: path.clone(), source };
        let mode = std::fs::metadata(&path).map_err(failed)?.permissions().mode() & 0o7777;
        let (content, encoding) = match String::from_utf8(std::fs::read(&path).map_err(failed)?) {
            Ok(text) => (text, ContentEncoding::Text),
            Err(error) => (BASE64.encode(error.as_bytes()), ContentEncoding::Base64),
        };
        Ok(Overlay { content, encoding, mode: Some(format!("{mode:04o}")) })
    };
    files.into_iter().map(|(path, file)| Ok((path, read(file)?))).collect()
}

async fn list(app: &App, paging: Paging) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| TemplateListParams { limit: Some(limit), cursor };
    let listed = list::all::<TemplateList, TemplateSummary>(&mut client, &paging, "templates", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|template| template.id))?,
        Format::Human => {
            listed.show(
                &app.ui,
                table(&listed.rows, app.ui.now()),
                "no templates; create one with `nexusctl template create`",
            )?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

fn table(templates: &[TemplateSummary], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["NAME", "ID", "VERSION", "SOURCE", "OVERLAYS", "PACKAGES", "CHANGED"])
            .dropping(&["OVERLAYS", "PACKAGES", "CHANGED", "ID", "VERSION"]);
    for template in templates {
        table.row([
            (&template.name).into(),
            template.id.into(),
            template.version.into(),
            (&template.source).into(),
            template.overlays.into(),
            template.packages.into(),
            format::ago(template.updated_at, now).into(),
        ]);
    }
    table
}

fn show(app: &App, template: &TemplateDetails) -> Result<u8, Error> {
    match app.ui.format {
        Format::Json => app.ui.json(&raw(template)?)?,
        Format::Quiet => app.ui.line(&template.id.to_string())?,
        Format::Human => app.ui.table(details(template, app.ui.now()))?,
    }
    Ok(0)
}

fn details(template: &TemplateDetails, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    let spec = &template.spec;
    table.fact("name", &template.name);
    table.fact("id", template.id);
    let newest = template.versions.first().map_or(template.version, |newest| newest.version);
    let of = if newest == template.version { String::new() } else { format!(" (the newest is {newest})") };
    table.fact("version", format!("{}{of}", template.version));
    table.fact("source", &spec.source);
    for (path, overlay) in &spec.overlays {
        let mode = overlay.mode.as_deref().unwrap_or("0644");
        table.fact("overlay", format!("{path} ({mode}, {})", format::size(overlay.content.len() as u64)));
    }
    if !spec.packages.is_empty() {
        table.fact("packages", spec.packages.join(" "));
    }
    table.fact(
        "init",
        match spec.init {
            InitMode::Agent => "agent",
            InitMode::System => "system",
        },
    );
    table.maybe("size", spec.size);
    table.maybe("ttl", spec.ttl.map(|ttl| ttl.to_string()));
    table.maybe("idle stop", spec.idle_stop.map(|idle| idle.to_string()));
    table.maybe("idle action", spec.idle_action.map(|action| action.as_str().to_owned()));
    for build in &template.builds {
        table.fact("build", format!("{} of version {}: {}", build.id, build.version, build.status.as_str()));
    }
    let changed = template.versions.first().map_or(template.created_at, |newest| newest.created_at);
    table.fact("changed", format!("{changed} ({})", format::ago(changed, now)));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_added_to_those_before() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let change = |before, add, remove| changed(words(before), words(add), &words(remove));
        assert_eq!(change("curl", "nginx curl", "").unwrap(), words("curl nginx"));
        assert_eq!(change("curl git", "nginx", "curl").unwrap(), words("git nginx"));
        assert_eq!(change("curl", "", "git").unwrap_err().exit_code(), 2);
    }
}
