//! `nexusctl events`: what happened, and what happens.

use std::time::Duration;

use clap::Args as ClapArgs;
use nexus_schema::id::VmKind;
use nexus_schema::tools::event::{Event, EventKind, EventsWait, EventsWaitOutput, EventsWaitParams};
use nexus_schema::{Reference, Tool};

use super::App;
use super::client::{Client, Options};
use super::error::Error;
use super::rows::{Printed, Row};
use super::ui::{Mood, Table, Text};
use super::unread::while_read;

/// How many events are listed by default.
const ROWS: u32 = 50;
/// How many events one call returns while following.
const PAGE: u32 = 500;
/// How long one call waits for others, in seconds.
const WAIT: u32 = 30;

/// Which events.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Go on with new events as they happen, until ctrl-c
    #[arg(short, long)]
    follow: bool,
    /// Only events of this VM
    #[arg(long, value_name = "VM")]
    vm: Option<Reference<VmKind>>,
    /// Only events of these kinds: vm, op, command, denied, pressure, daemon, dropped
    #[arg(long = "kind", value_name = "KIND", value_delimiter = ',')]
    kinds: Vec<EventKind>,
    /// Only events after this one: the cursor of an earlier call, or a number of an event
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
    /// How many events at most, the newest; after a cursor, the first
    #[arg(short = 'n', long, value_name = "ROWS", default_value_t = ROWS, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
}

/// Lists events, oldest first; with --follow also those to come.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    match args.follow {
        true => while_read(Box::pin(list(app, args))).await,
        false => list(app, args).await,
    }
}

async fn list(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let follow = args.follow;
    let mut params = EventsWaitParams {
        cursor: args.after,
        vm: args.vm,
        kinds: args.kinds,
        wait_s: Some(0),
        limit: Some(args.limit),
    };
    let mut found = ask(&mut client, &params).await?;
    warn(app, &found);
    let mut printed = Printed::default();
    printed.first(app, &found, &found.events, follow)?;
    if !follow {
        return Ok(0);
    }
    (params.wait_s, params.limit) = (Some(WAIT), Some(PAGE));
    loop {
        params.cursor = Some(found.cursor);
        // A VM that is renamed stays the same one.
        if let Some(vm) = found.events.iter().rev().find_map(|event| event.vm).filter(|_| params.vm.is_some())
        {
            params.vm = Some(Reference::Id(vm));
        }
        found = ask(&mut client, &params).await?;
        warn(app, &found);
        printed.next(app, &found.events)?;
    }
}

async fn ask(client: &mut Client, params: &EventsWaitParams) -> Result<EventsWaitOutput, Error> {
    let options = Options::waiting(Duration::from_secs(WAIT.into()));
    client.call_with::<EventsWait>(params, options).await?.facts(EventsWait::NAME, EventsWait::SHAPE)
}

/// Says that events are missing.
fn warn(app: &App, found: &EventsWaitOutput) {
    if let Some(missed) = &found.missed {
        app.ui.warn(missed);
    }
}

impl Row for Event {
    const NONE: &'static str = "no events";

    fn seq(&self) -> u64 {
        self.seq
    }

    fn table(rows: &[Self]) -> Table {
        table(rows)
    }
}

fn table(events: &[Event]) -> Table {
    let mut table = Table::with_headings(&["WHEN", "KIND", "WHAT"]);
    for event in events {
        table.row([event.at.to_string().into(), Text::new(event.kind, mood(event)), (&event.text).into()]);
    }
    table
}

/// Whether an event is good or bad news.
fn mood(event: &Event) -> Mood {
    match (event.kind, event.state.as_deref()) {
        (EventKind::Denied | EventKind::Dropped, _)
        | (EventKind::Pressure, Some("low"))
        | (_, Some("failed" | "crashed" | "unreachable")) => Mood::Bad,
        (_, Some("ready" | "succeeded" | "enough")) => Mood::Good,
        _ => Mood::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_with_their_kind() {
        let event =
            |kind, state: &str, text: &str| Event { state: Some(state.to_owned()), ..Event::new(kind, text) };
        let events = [
            event(EventKind::Vm, "ready", "web-1: running -> ready: guest agent ready"),
            event(EventKind::Denied, "", "web-1: tcp to example.org:443 refused: name not allowed"),
        ];
        insta::assert_snapshot!(table(&events).render(None, false), @"
        WHEN                      KIND    WHAT
        1970-01-01T00:00:00.000Z  vm      web-1: running -> ready: guest agent ready
        1970-01-01T00:00:00.000Z  denied  web-1: tcp to example.org:443 refused: name not allowed
        ");
        assert_eq!((mood(&events[0]), mood(&events[1])), (Mood::Good, Mood::Bad));
    }
}
