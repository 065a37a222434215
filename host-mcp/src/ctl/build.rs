//! `nexusctl build`: templates made into images.

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus_schema::id::{BuildKind, TemplateKind};
use nexus_schema::tools::build::{
    BuildDetails, BuildInspect, BuildInspectParams, BuildList, BuildListParams, BuildLogs, BuildLogsParams,
    BuildStart, BuildStartParams, BuildStatus, BuildSummary,
};
use nexus_schema::tools::op::{OpCancel, OpCancelParams};
use nexus_schema::{Reference, Timestamp, Tool};
use serde::Deserialize;

use super::App;
use super::args::word;
use super::client::{Client, Options, raw};
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::list::{self, Paging};
use super::op::cancelled;
use super::ui::{Format, Mood, Table, Text};
use super::unread::while_read;

/// How long one call waits for new output.
const FOLLOW_WAIT_S: u32 = 20;
/// How many builds are listed by default.
const ROWS: u32 = 50;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a template, unless an image with the same inputs exists
    #[command(visible_alias = "trigger")]
    Start(StartArgs),
    /// List builds, newest first
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show everything about a build
    #[command(visible_alias = "show")]
    Inspect(OneBuild),
    /// Show a build's log
    Logs(LogsArgs),
    /// Cancel a build
    Cancel(OneBuild),
}

/// What to build.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// The template: its name or id
    template: Reference<TemplateKind>,
    /// Which version [default: the newest]
    #[arg(long = "template-version", visible_alias = "release", value_name = "VERSION")]
    version: Option<u32>,
    /// Build even if an image with the same inputs exists
    #[arg(long)]
    no_cache: bool,
    #[command(flatten)]
    wait: Wait,
}

/// Which builds.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only builds of this template: its name or id
    #[arg(long)]
    template: Option<Reference<TemplateKind>>,
    /// Only builds with this status
    #[arg(long, value_parser = word::<BuildStatus>(&["building", "success", "failed", "cancelled"]))]
    status: Option<BuildStatus>,
    #[command(flatten)]
    paging: Paging,
}

/// Which one.
#[derive(Debug, Args)]
pub(crate) struct OneBuild {
    /// The build: its id, or a template's name for its newest build
    build: Reference<BuildKind>,
}

/// Whose log.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The build: its id, or a template's name for its newest build
    build: Reference<BuildKind>,
    /// Follow the log until the build ends
    #[arg(short, long)]
    follow: bool,
    /// Where to continue: the cursor of an earlier reply
    #[arg(long)]
    cursor: Option<String>,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Start(args) => start(app, args).await,
        Command::List(args) => list(app, args).await,
        Command::Inspect(args) => {
            let mut client = app.connect().await?;
            let build = inspect(&mut client, args.build).await?;
            show(app, &build)
        }
        Command::Logs(args) if args.follow => while_read(Box::pin(logs(app, args))).await,
        Command::Logs(args) => logs(app, args).await,
        Command::Cancel(args) => cancel(app, args).await,
    }
}

async fn inspect(client: &mut Client, build: Reference<BuildKind>) -> Result<BuildDetails, Error> {
    client.call::<BuildInspect>(&BuildInspectParams { build }).await
}

async fn start(app: &App, args: StartArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = BuildStartParams {
        template: args.template,
        version: args.version,
        no_cache: args.no_cache.then_some(true),
        wait_s: Some(0),
    };
    let followed = follow::start::<BuildStart, _>(&mut client, &app.ui, &params, args.wait).await?;
    let outcome = &followed.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(build)) => app.ui.table(details(build, app.ui.now()))?,
        (Format::Human, None) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| BuildListParams {
        template: args.template.clone(),
        status: args.status,
        limit: Some(limit),
        cursor,
    };
    let paging = args.paging.or(ROWS);
    let listed = list::all::<BuildList, BuildSummary>(&mut client, &paging, "builds", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|build| build.id))?,
        Format::Human => {
            listed.show(
                &app.ui,
                table(&listed.rows, app.ui.now()),
                "no builds; start one with `nexusctl build start TEMPLATE`",
            )?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

/// The structured part of a reply; the text is in a content block.
#[derive(Deserialize)]
struct Facts {
    cursor: String,
    status: BuildStatus,
}

async fn logs(app: &App, args: LogsArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let (mut cursor, mut is_empty) = (args.cursor, true);
    loop {
        let wait_s = args.follow.then_some(FOLLOW_WAIT_S);
        let params = BuildLogsParams { build: args.build.clone(), cursor, max_bytes: None, wait_s };
        let wait = Duration::from_secs(wait_s.unwrap_or_default().into());
        let reply = client.call_with::<BuildLogs>(&params, Options::waiting(wait)).await?;
        let facts: Facts = reply.facts(BuildLogs::NAME, BuildLogs::SHAPE)?;
        let text = reply.stream("content").map_or_else(|| reply.text(), str::to_owned);
        if app.ui.is_json() {
            let facts = serde_json::json!({ "text": text, "cursor": facts.cursor, "status": facts.status });
            app.ui.json(&raw(&facts)?)?;
        } else {
            app.ui.bytes(text.as_bytes())?;
        }
        // Text comes in pieces; without waiting, a running build has no more at the moment.
        is_empty &= text.is_empty();
        if text.is_empty() && (!args.follow || facts.status != BuildStatus::Building) {
            if is_empty && !app.ui.is_json() {
                app.ui.say("nothing was written to the log");
            }
            return Ok(0);
        }
        cursor = Some(facts.cursor);
    }
}

async fn cancel(app: &App, args: OneBuild) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let build = inspect(&mut client, args.build).await?;
    let was_over = build.status != BuildStatus::Building;
    client.call::<OpCancel>(&OpCancelParams { op_id: build.op_id }).await?;
    let build = inspect(&mut client, Reference::Id(build.id)).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&build)?)?,
        Format::Quiet => app.ui.line(&build.id.to_string())?,
        Format::Human => app.ui.line(&cancelled("build", build.id, build.status.as_str(), was_over))?,
    }
    Ok(0)
}

fn status(status: BuildStatus) -> Text {
    let mood = match status {
        BuildStatus::Building => Mood::Uneasy,
        BuildStatus::Success => Mood::Good,
        BuildStatus::Failed => Mood::Bad,
        BuildStatus::Cancelled => Mood::Plain,
    };
    Text::new(status.as_str(), mood)
}

fn table(builds: &[BuildSummary], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["ID", "TEMPLATE", "VERSION", "STATUS", "IMAGE", "STARTED", "TOOK"])
            .dropping(&["VERSION", "TOOK", "STARTED", "IMAGE"]);
    for build in builds {
        table.row([
            build.id.into(),
            (&build.template).into(),
            build.version.into(),
            status(build.status),
            build.image.as_ref().map_or("-".into(), ToString::to_string).into(),
            format::ago(build.created_at, now).into(),
            match build.cached {
                true => "cached".into(),
                false => took(build.created_at, build.ended_at).unwrap_or_else(|| "-".into()).into(),
            },
        ]);
    }
    table
}

fn took(from: Timestamp, to: Option<Timestamp>) -> Option<String> {
    let ms = to?.as_millis().saturating_sub(from.as_millis());
    u64::try_from(ms).ok().map(format::millis)
}

fn show(app: &App, build: &BuildDetails) -> Result<u8, Error> {
    match app.ui.format {
        Format::Json => app.ui.json(&raw(build)?)?,
        Format::Quiet => app.ui.line(&build.id.to_string())?,
        Format::Human => app.ui.table(details(build, app.ui.now()))?,
    }
    Ok(0)
}

fn details(build: &BuildDetails, now: Timestamp) -> Table {
    let mut table = Table::of_facts();
    table.fact("build", build.id);
    table.fact("template", format!("{}, version {}", build.template, build.version));
    table.fact("status", status(build.status));
    table.maybe("image", build.image.as_ref().map(|image| &image.name));
    if build.cached {
        table.fact("cached", "an earlier build with the same inputs was reused");
    }
    table.maybe("error", build.error.as_ref().map(|error| Text::new(&error.message, Mood::Bad)));
    table.maybe("digest", build.digest.as_ref());
    table.fact("source", &build.spec.source);
    table.fact("operation", build.op_id);
    table.fact("log", &build.log);
    table.fact("started", format!("{} ({})", build.created_at, format::ago(build.created_at, now)));
    table.maybe("took", took(build.created_at, build.ended_at));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_show_what_came_of_them() {
        let builds: Vec<BuildSummary> = serde_json::from_value(serde_json::json!([
            { "id": "bbbbbbbbbbbbe", "template": "web", "version": 2, "status": "success", "cached": true,
              "image": "web-bbbbbe", "op_id": "bbbbbbbbbbbbi", "created_at": "2026-01-02T03:04:00Z",
              "ended_at": "2026-01-02T03:04:00.020Z" },
            { "id": "bbbbbbbbbbbbi", "template": "web", "version": 1, "status": "failed", "cached": false,
              "op_id": "bbbbbbbbbbbbm", "created_at": "2026-01-02T03:00:00Z",
              "ended_at": "2026-01-02T03:00:12.5Z" }
        ]))
        .unwrap();
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        insta::assert_snapshot!(table(&builds, now).render(None, false), @"
        ID             TEMPLATE  VERSION  STATUS   IMAGE       STARTED    TOOK
        bbbbbbbbbbbbe  web       2        success  web-bbbbbe  5 s ago    cached
        bbbbbbbbbbbbi  web       1        failed   -           4 min ago  12 s
        ");
    }
}
