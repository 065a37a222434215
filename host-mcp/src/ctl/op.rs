//! `nexusctl op`: long operations.

use std::fmt::Display;

use clap::{Args, Subcommand};
use nexus_schema::Timestamp;
use nexus_schema::id::OpId;
use nexus_schema::tools::op::{
    OpCancel, OpCancelParams, OpGet, OpGetParams, OpList, OpListParams, OpProgress, OpState, OpSummary,
};
use serde_json::{Map, Value};

use super::App;
use super::args::word;
use super::client::raw;
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::list::{self, Paging};
use super::ui::{Format, Mood, Table, Text};
use super::unread::while_read;

/// How many operations are listed by default.
const ROWS: u32 = 50;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List operations, newest first
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Follow an operation to its end and show its result
    #[command(visible_aliases = ["wait", "show"])]
    Get(GetArgs),
    /// Cancel an operation
    Cancel(CancelArgs),
}

/// Which operations.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only operations in this state
    #[arg(long, value_parser = word::<OpState>(&["running", "succeeded", "failed", "cancelled"]))]
    state: Option<OpState>,
    #[command(flatten)]
    paging: Paging,
}

/// Which operation.
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// The operation's id
    op: OpId,
    #[command(flatten)]
    wait: Wait,
}

/// Which operation.
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// The operation's id
    op: OpId,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::List(args) => list(app, args).await,
        Command::Get(args) => while_read(Box::pin(get(app, args))).await,
        Command::Cancel(args) => cancel(app, args).await,
    }
}

async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| OpListParams { state: args.state, limit: Some(limit), cursor };
    let paging = args.paging.or(ROWS);
    let listed = list::all::<OpList, OpSummary>(&mut client, &paging, "ops", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|op| op.op_id))?,
        Format::Human => {
            listed.show(&app.ui, table(&listed.rows, app.ui.now()), "no operations")?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn get(app: &App, args: GetArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let followed = follow::resume::<Map<String, Value>>(&mut client, &app.ui, args.op, args.wait).await?;
    let outcome = &followed.outcome;
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => app.ui.line(&outcome.op_id.to_string())?,
        Format::Human => {
            let mut table = Table::of_facts();
            table.fact("operation", outcome.op_id);
            table.fact("state", state(outcome.state));
            table.fact("step", progress(&outcome.progress));
            table.maybe("subject", outcome.subject_name.as_ref().or(outcome.subject_id.as_ref()));
            for (key, value) in outcome.result.iter().flatten() {
                match value {
                    Value::String(text) => table.fact(key, text),
                    Value::Bool(_) | Value::Number(_) => table.fact(key, value),
                    // --json shows everything; here only what fits on a line.
                    Value::Null | Value::Array(_) | Value::Object(_) => {}
                }
            }
            app.ui.table(table)?;
        }
    }
    Ok(0)
}

async fn cancel(app: &App, args: CancelArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let before = client.call::<OpGet>(&OpGetParams { op_id: args.op, wait_s: Some(0) }).await?;
    let op = client.call::<OpCancel>(&OpCancelParams { op_id: args.op }).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&op)?)?,
        Format::Quiet => app.ui.line(&op.op_id.to_string())?,
        Format::Human => app.ui.line(&cancelled("operation", op.op_id, op.state.as_str(), before.done))?,
    }
    Ok(0)
}

/// Describes the result of a cancellation; it has no effect on what had already ended.
pub(crate) fn cancelled(what: &str, id: impl Display, state: &str, was_over: bool) -> String {
    match (was_over, state) {
        (true, _) => format!("{what} {id} had already ended ({state})"),
        (false, "cancelled") => format!("{what} {id} cancelled"),
        (false, "running" | "building") => format!("{what} {id} is being cancelled"),
        (false, _) => format!("{what} {id} ended before it could be cancelled ({state})"),
    }
}

fn state(state: OpState) -> Text {
    let mood = match state {
        OpState::Running => Mood::Uneasy,
        OpState::Succeeded => Mood::Good,
        OpState::Failed => Mood::Bad,
        OpState::Cancelled => Mood::Plain,
    };
    Text::new(state.as_str(), mood)
}

fn progress(progress: &OpProgress) -> String {
    let step = &progress.step;
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total > 0 => {
            format!("{step} ({} %)", u128::from(done) * 100 / u128::from(total))
        }
        (_, _) => step.clone(),
    }
}

fn table(ops: &[OpSummary], now: Timestamp) -> Table {
    let mut table = Table::with_headings(&["ID", "WHAT", "SUBJECT", "STATE", "STARTED", "TOOK", "STEP"])
        .prose(&["STEP"])
        .dropping(&["TOOK", "STARTED", "STEP", "SUBJECT"]);
    for op in ops {
        let took = op.ended_at.map(|end| end.as_millis().saturating_sub(op.started_at.as_millis()));
        let took = took.and_then(|ms| u64::try_from(ms).ok()).map_or("-".into(), format::millis);
        let step = match &op.error {
            Some(error) => Text::new(&error.message, Mood::Bad),
            None => progress(&op.progress).into(),
        };
        table.row([
            op.op_id.into(),
            (&op.tool).into(),
            op.subject_name.as_ref().or(op.subject_id.as_ref()).map_or("-", String::as_str).into(),
            state(op.state),
            format::ago(op.started_at, now).into(),
            took.into(),
            step,
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_show_how_far_they_are_or_how_they_failed() {
        let ops: Vec<OpSummary> = serde_json::from_value(serde_json::json!([
            { "op_id": "bbbbbbbbbbbbe", "tool": "vm_create", "state": "running", "subject_name": "web-1", "owner": "uid:0",
              "progress": { "step": "downloading kernel", "done": 30, "total": 120 },
              "started_at": "2026-01-02T03:04:00Z" },
            { "op_id": "bbbbbbbbbbbbi", "tool": "image_create", "state": "failed", "subject_id": "ccccccccccccc",
              "owner": "uid:0", "progress": { "step": "unpacking" }, "started_at": "2026-01-02T03:00:00Z",
              "ended_at": "2026-01-02T03:00:12.5Z",
              "error": { "code": "disk_full", "message": "no room for the image", "retryable": true } }
        ]))
        .unwrap();
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        insta::assert_snapshot!(table(&ops, now).render(None, false), @"
        ID             WHAT          SUBJECT        STATE    STARTED    TOOK  STEP
        bbbbbbbbbbbbe  vm_create     web-1          running  5 s ago    -     downloading kernel (25 %)
        bbbbbbbbbbbbi  image_create  ccccccccccccc  failed   4 min ago  12 s  no room for the image
        ");
    }
}
