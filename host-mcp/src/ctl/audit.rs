//! `nexusctl audit`: who called what.

use clap::Args as ClapArgs;
use nexus_schema::id::VmKind;
use nexus_schema::tools::audit::{AuditEntry, AuditList, AuditListOutput, AuditListParams};
use nexus_schema::{Reference, Tool};

use super::App;
use super::client::{Client, Options};
use super::error::Error;
use super::format;
use super::moment::Moment;
use super::rows::{self, Row};
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
    /// How many calls at most, the newest
    #[arg(short = 'n', long, value_name = "ROWS", default_value_t = ROWS, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
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
        limit: Some(args.limit),
        ..AuditListParams::default()
    };
    let mut found = ask(&mut client, &params).await?;
    found.calls.reverse();
    rows::first(app, &found, &found.calls, follow)?;
    if !follow {
        return Ok(0);
    }
    params.wait_s = Some(WAIT);
    loop {
        params.after = Some(found.last);
        found = ask(&mut client, &params).await?;
        rows::next(app, &found.calls)?;
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

    fn line(&self) -> String {
        let vm = self.vm.map_or("-".into(), |vm| vm.to_string());
        let Self { at, caller, tool, outcome, rule, .. } = self;
        format!("{at}  {caller}  {tool}  {vm}  {outcome}  {rule}  {}", took(self))
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
