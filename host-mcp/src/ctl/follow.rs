//! Follows long work: started by a call, polled with `op_get`, shown as a bar on a terminal and as lines elsewhere.

use std::time::Duration;

use clap::Args;
use nexus_schema::error::ErrorCode;
use nexus_schema::id::OpId;
use nexus_schema::tools::OpOutcome;
use nexus_schema::tools::op::{OpGet, OpGetParams, OpState};
use nexus_schema::tools::plan::{Creation, Plan};
use nexus_schema::{Name, Tool, ToolError};
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::client::{Client, Options, Progress, Reply};
use super::error::{Error, Refusal};
use super::hint::About;
use super::steps::Steps;
use super::ui::Ui;
use super::{moment, plan};

/// How long one `op_get` waits: a bar moves once a second, lines less often.
const POLL_BAR: u32 = 1;
const POLL_LINES: u32 = 10;

/// How long to stay with long work.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct Wait {
    /// Follow the work for at most this long, such as 30s or 5m; a bare number is seconds, 0 returns at once [default: until it ends]
    #[arg(long, value_name = "TIME", conflicts_with = "detach", value_parser = moment::seconds)]
    wait: Option<u32>,
    /// Return at once and leave the work running
    #[arg(short, long)]
    detach: bool,
}

impl Wait {
    fn limit(self) -> Option<u64> {
        if self.detach { Some(0) } else { self.wait.map(u64::from) }
    }
}

/// How something new is called, and whether and how long its making is followed.
#[derive(Debug, Args)]
pub(crate) struct New {
    /// Its name [default: generated]
    #[arg(value_name = "NAME", conflicts_with = "name")]
    positional: Option<Name>,
    /// Its name [default: generated]
    #[arg(long)]
    name: Option<Name>,
    /// Only show what would be done
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Idempotency key: within a day, the same key with the same arguments returns the same result instead of creating it again
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    #[command(flatten)]
    pub(crate) wait: Wait,
}

impl New {
    /// Its name, from either argument.
    pub(crate) fn name(&self) -> Option<Name> {
        self.name.clone().or_else(|| self.positional.clone())
    }
}

/// Long work, followed up to some point.
#[derive(Debug)]
pub(crate) struct Followed<R> {
    /// The last outcome.
    pub(crate) outcome: OpOutcome<R>,
    /// The same, unchanged.
    pub(crate) raw: Box<RawValue>,
}

impl<R> Followed<R> {
    /// The result; if the work is not followed to its end, `None`, and the operation's id is printed.
    pub(crate) fn result_or_op(&self, ui: &Ui) -> Result<Option<&R>, Error> {
        if self.outcome.result.is_none() {
            ui.line(&self.outcome.op_id.to_string())?;
        }
        Ok(self.outcome.result.as_ref())
    }
}

/// Calls a tool that starts long work (its parameters say `wait_s: 0`) and follows the work.
pub(crate) async fn start<T, R>(
    client: &mut Client,
    ui: &Ui,
    params: &T::Params,
    wait: Wait,
) -> Result<Followed<R>, Error>
where
    T: Tool<Output = OpOutcome<R>>,
    R: DeserializeOwned,
{
    let reply = client.call_with::<T>(params, Options::default()).await?;
    let first = followed(&reply, T::NAME)?;
    let about = About::subject(T::NAME, first.outcome.subject_name.as_deref());
    stay::<R>(client, ui, first, wait, (T::NAME, &about)).await
}

/// The first answer of a call that creates something and is not a dry run; for callers that cancel the work when they stop following it.
pub(crate) async fn begin<T, R>(client: &mut Client, params: &T::Params) -> Result<Followed<R>, Error>
where
    T: Tool<Output = Creation<R>>,
    R: DeserializeOwned,
{
    followed(&client.call_with::<T>(params, Options::default()).await?, T::NAME)
}

/// Follows such work to its end. If it is interrupted, the caller cancels the work, so no message is printed.
pub(crate) async fn to_end<R: DeserializeOwned>(
    client: &mut Client,
    ui: &Ui,
    mut last: Followed<R>,
    about: &About,
) -> Result<Followed<R>, Error> {
    if !last.outcome.done {
        let mut steps = Steps::new(ui);
        let result = poll(client, &mut steps, &mut last, None, about).await;
        steps.finish();
        result?;
    }
    settled(last, about)
}

/// The same for a call that creates something; a dry run is only shown.
pub(crate) async fn create<T, R>(
    client: &mut Client,
    ui: &Ui,
    params: &T::Params,
    wait: Wait,
) -> Result<Option<Followed<R>>, Error>
where
    T: Tool<Output = Creation<R>>,
    R: DeserializeOwned,
{
    let reply = client.call_with::<T>(params, Options::default()).await?;
    let planned: Planned = reply.facts(T::NAME, nexus_schema::ResultShape::Structured)?;
    if let Some(plan) = planned.plan {
        plan::show(ui, reply.structured.as_ref().unwrap_or(&reply.raw), &plan)?;
        return Ok(None);
    }
    let first = followed(&reply, T::NAME)?;
    let about = About::subject(T::NAME, first.outcome.subject_name.as_deref());
    stay::<R>(client, ui, first, wait, (T::NAME, &about)).await.map(Some)
}

/// The part of a result that marks a dry run.
#[derive(serde::Deserialize)]
struct Planned {
    plan: Option<Plan>,
}

/// Follows work that was started before.
pub(crate) async fn resume<R: DeserializeOwned>(
    client: &mut Client,
    ui: &Ui,
    op_id: OpId,
    wait: Wait,
) -> Result<Followed<R>, Error> {
    let params = OpGetParams { op_id, wait_s: Some(0) };
    let reply = client.call_with::<OpGet>(&params, Options::default()).await?;
    let first = followed(&reply, OpGet::NAME)?;
    stay(client, ui, first, wait, (OpGet::NAME, &About::default())).await
}

async fn stay<R: DeserializeOwned>(
    client: &mut Client,
    ui: &Ui,
    mut last: Followed<R>,
    wait: Wait,
    (tool, about): (&str, &About),
) -> Result<Followed<R>, Error> {
    let limit = wait.limit();
    if !last.outcome.done && limit != Some(0) {
        let mut steps = Steps::new(ui);
        let result = poll(client, &mut steps, &mut last, limit, about).await;
        steps.finish();
        if let Err(Error::Interrupted) = result {
            ui.warn(&goes_on(&last.outcome));
        }
        result?;
    }
    if !last.outcome.done {
        ui.say(&begun(&last.outcome, tool));
    }
    settled(last, about)
}

/// The result of work, or its failure.
fn settled<R>(last: Followed<R>, about: &About) -> Result<Followed<R>, Error> {
    let outcome = &last.outcome;
    if outcome.done && outcome.state != OpState::Succeeded && outcome.result.is_none() {
        return Err(Error::Tool(Refusal { error: ended_badly(outcome), about: about.clone() }));
    }
    Ok(last)
}

async fn poll<R: DeserializeOwned>(
    client: &mut Client,
    steps: &mut Steps,
    last: &mut Followed<R>,
    limit: Option<u64>,
    about: &About,
) -> Result<(), Error> {
    let begun = Instant::now();
    let poll = if steps.has_bar() { POLL_BAR } else { POLL_LINES };
    steps.show(&last.outcome.progress);
    while !last.outcome.done {
        let left = limit.map(|limit| limit.saturating_sub(begun.elapsed().as_secs()));
        if left == Some(0) {
            return Err(Error::OpPending {
                op: last.outcome.op_id.to_string(),
                step: last.outcome.progress.step.clone(),
                seconds: limit.unwrap_or_default(),
            });
        }
        let wait_s = left.map_or(poll, |left| poll.min(u32::try_from(left).unwrap_or(poll)));
        let params = OpGetParams { op_id: last.outcome.op_id, wait_s: Some(wait_s) };
        let mut report = |progress: Progress| steps.report(&progress);
        let options =
            Options { progress: Some(&mut report), ..Options::waiting(Duration::from_secs(wait_s.into())) };
        let reply = client.call_with::<OpGet>(&params, options).await.map_err(|error| error.about(about))?;
        *last = followed(&reply, OpGet::NAME)?;
        steps.show(&last.outcome.progress);
    }
    Ok(())
}

fn followed<R: DeserializeOwned>(reply: &Reply, tool: &str) -> Result<Followed<R>, Error> {
    let outcome = reply.facts(tool, nexus_schema::ResultShape::Structured)?;
    let raw = reply.structured.clone().unwrap_or_else(|| reply.raw.clone());
    Ok(Followed { outcome, raw })
}

/// Describes work that nobody follows.
fn begun<R>(outcome: &OpOutcome<R>, tool: &str) -> String {
    let op = outcome.op_id;
    match (doing(tool), &outcome.subject_name) {
        (Some(doing), Some(name)) => format!("{doing} {name} (op {op}): {}", how_to_follow(op)),
        (_, _) => goes_on(outcome),
    }
}

/// What the work of a tool is called while it goes on.
fn doing(tool: &str) -> Option<&'static str> {
    Some(match tool.rsplit('_').next()? {
        "create" => "creating",
        "start" if tool.starts_with("build_") => "building",
        "start" => "starting",
        "stop" => "stopping",
        "restart" => "restarting",
        "download" => "downloading",
        _ => return None,
    })
}

fn goes_on<R>(outcome: &OpOutcome<R>) -> String {
    let op = outcome.op_id;
    let step = if outcome.progress.step.is_empty() { "under way" } else { &outcome.progress.step };
    format!("operation {op} is still running ({step}): {}", how_to_follow(op))
}

fn how_to_follow(op: OpId) -> String {
    format!("follow it with `nexusctl op get {op}`, cancel it with `nexusctl op cancel {op}`")
}

fn ended_badly<R>(outcome: &OpOutcome<R>) -> ToolError {
    let (code, word) = match outcome.state {
        OpState::Cancelled => (ErrorCode::Cancelled, "was cancelled"),
        OpState::Running | OpState::Succeeded | OpState::Failed => (ErrorCode::Internal, "failed"),
    };
    if let Some(error) = &outcome.error {
        return error.clone();
    }
    ToolError::new(code, format!("operation {} {word} while {}", outcome.op_id, outcome.progress.step))
        .hint("see `nexusctl op list`")
}
