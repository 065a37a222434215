//! `nexusctl audit`: who called what.

use clap::Args as ClapArgs;
use nexus_schema::id::VmKind;
use nexus_schema::limits::PAGE_MAX;
use nexus_schema::tools::audit::{AuditEntry, AuditList, AuditListOutput, AuditListParams};
use nexus_schema::{Reference, Tool};

use super::App;
use super::client::{Client, Options};
use super::error::Error;
use super::format;
use super::moment::Moment;
use super::rows::{Printed, Row};
use super::ui::{Mood, Table, Text};
use super::unread::while_read;

/// How many calls are listed by default.
const ROWS: u32 = 50;
/// How long one call waits for others, in seconds.
const WAIT: u32 = 30;

/// Which calls.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Go on with new calls as they are made, until ctrl-c
    #[arg(short, long)]
    follow: bool,
    /// Only calls about this VM
    #[arg(long, value_name = "VM")]
    vm: Option<Reference<VmKind>>,
    /// Only calls of this caller, such as uid:1000 or token:ID
    #[arg(long)]
    caller: Option<String>,
    /// Only calls of this tool
    #[arg(long)]
    tool: Option<String>,
    /// Only calls that ended so: ok, an error's code, or denied
    #[arg(long)]
    outcome: Option<String>,
    /// Only calls from this time on: how long ago, such as 1h or 2d, or a time such as 2026-01-02T15:00:00Z
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Only calls before this time
    #[arg(long, value_name = "TIME", conflicts_with = "follow")]
    until: Option<Moment>,
    /// How many calls at most, the newest [default: 50; with --since all]
    #[arg(short = 'n', long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
}

/// Lists calls, oldest first; with --follow also those to come.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match args.follow {
        true => while_read(Box::pin(list(app, args))).await,
        false => list(app, args).await,
    }
}

async fn list(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let (follow, now) = (args.follow, app.ui.now());
    let mut params = AuditListParams {
        vm: args.vm,
        caller: args.caller,
        tool: args.tool,
        outcome: args.outcome,
        since: args.since.map(|since| since.past(now)),
        until: args.until.map(|until| until.past(now)),
        ..AuditListParams::default()
    };
    let wanted = args.limit.or_else(|| params.since.is_none().then_some(ROWS));
    let mut found = newest(&mut client, &mut params, wanted).await?;
    found.calls.reverse();
    let mut printed = Printed::default();
    printed.first(app, &found, &found.calls, follow)?;
    if found.next_cursor.is_some() {
        let count = found.calls.len();
        app.ui.say(&format!(
            "these are the newest {count} calls; for more: -n ROWS, or --since TIME for all since then"
        ));
    }
    if !follow {
        return Ok(0);
    }
    (params.wait_s, params.cursor, params.limit) = (Some(WAIT), None, Some(PAGE_MAX));
    loop {
        params.after = Some(found.last);
        found = ask(&mut client, &params).await?;
        printed.next(app, &found.calls)?;
    }
}

/// The newest calls, so many or all of them, page by page. What is new since the first page is not among them.
async fn newest(
    client: &mut Client,
    params: &mut AuditListParams,
    wanted: Option<u32>,
) -> Result<AuditListOutput, Error> {
    let (mut calls, mut last) = (Vec::new(), None);
    loop {
        let got = u32::try_from(calls.len()).unwrap_or(u32::MAX);
        let left = wanted.map_or(PAGE_MAX, |wanted| wanted.saturating_sub(got));
        params.limit = Some(left.min(PAGE_MAX));
        let page = ask(client, params).await?;
        let last = *last.get_or_insert(page.last);
        calls.extend(page.calls);
        let is_enough = wanted.is_some_and(|wanted| calls.len() >= wanted as usize);
        if is_enough || page.next_cursor.is_none() {
            return Ok(AuditListOutput { calls, last, next_cursor: page.next_cursor });
        }
        params.cursor = page.next_cursor;
    }
}

async fn ask(client: &mut Client, params: &AuditListParams) -> Result<AuditListOutput, Error> {
    let options = Options::waiting(std::time::Duration::from_secs(WAIT.into()));
    client.call_with::<AuditList>(params, options).await?.facts(AuditList::NAME, AuditList::SHAPE)
}

impl Row for AuditEntry {
    const NONE: &'static str = "no calls";

    fn seq(&self) -> u64 {
        self.seq
    }

    fn table(rows: &[Self]) -> Table {
        table(rows)
    }
}

fn took(call: &AuditEntry) -> String {
    match call.duration_us {
        us if us < 1000 => format!("{us} us"),
        us => format::millis(us / 1000),
    }
}

fn table(calls: &[AuditEntry]) -> Table {
    let mut table =
        Table::with_headings(&["WHEN", "CALLER", "TOOL", "VM", "OUTCOME", "RULE", "TOOK", "IN", "OUT"])
            .dropping(&["OUT", "IN", "TOOK", "RULE"]);
    for call in calls {
        let outcome = match call.outcome.as_str() {
            "ok" => Text::new("ok", Mood::Good),
            other => Text::new(other, Mood::Bad),
        };
        table.row([
            call.at.to_string().into(),
            (&call.caller).into(),
            (&call.tool).into(),
            call.vm.map_or("-".into(), |vm| vm.to_string()).into(),
            outcome,
            (&call.rule).into(),
            took(call).into(),
            format::size(call.bytes_in).into(),
            format::size(call.bytes_out).into(),
        ]);
    }
    table
}
