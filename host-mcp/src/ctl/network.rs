//! `nexusctl network`: how VMs reach other machines, what they reached, and clean-up of the network that they share.

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus_schema::id::VmKind;
use nexus_schema::tools::network::{
    LoggedConnection, NetworkCleanup, NetworkCleanupParams, NetworkInspect, NetworkInspectOutput,
    NetworkInspectParams, NetworkLog, NetworkLogOutput, NetworkLogParams,
};
use nexus_schema::{Reference, Tool};

use super::App;
use super::client::{Options, raw};
use super::error::Error;
use super::ui::{Format, Mood, Table, Text};
use super::unread::while_read;
use super::vm::of_inspected_network;

/// How long one call waits for something new.
const FOLLOW_WAIT_S: u32 = 20;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the network access of VMs, and the network that VMs with `nat` share
    #[command(visible_aliases = ["show", "ls"])]
    Inspect(InspectArgs),
    /// Show the refused connections of a VM, and with the proxy also the established ones
    #[command(visible_alias = "logs")]
    Log(LogArgs),
    /// Remove bridge, devices and firewall rules of the network that VMs share; fails while running VMs use it
    Cleanup,
}

/// Which VM.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Only this VM: its name or id
    vm: Option<Reference<VmKind>>,
}

/// Whose connections, and how many.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Follow new connections
    #[arg(short, long)]
    follow: bool,
    /// Number of most recent connections to show
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    lines: u32,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Inspect(args) => inspect(app, args).await,
        Command::Log(args) if args.follow => while_read(Box::pin(log(app, args))).await,
        Command::Log(args) => log(app, args).await,
        Command::Cleanup => {
            let cleaned = app.connect().await?.call::<NetworkCleanup>(&NetworkCleanupParams {}).await?;
            match (app.ui.format, cleaned.removed) {
                (Format::Json, _) => app.ui.json(&raw(&cleaned)?)?,
                (Format::Quiet, _) => {}
                (Format::Human, true) => app.ui.line("removed the network that VMs share")?,
                (Format::Human, false) => app.ui.line("nothing to remove")?,
            }
            Ok(0)
        }
    }
}

async fn inspect(app: &App, args: InspectArgs) -> Result<u8, Error> {
    let params = NetworkInspectParams { vm: args.vm };
    let found = app.connect().await?.call::<NetworkInspect>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&found)?)?,
        Format::Quiet => super::list::ids(&app.ui, found.vms.iter().map(|vm| &vm.name))?,
        Format::Human => {
            app.ui.table(shared(&found))?;
            for vm in &found.vms {
                app.ui.line("")?;
                app.ui.table(of_inspected_network(vm, app.ui.now()))?;
            }
        }
    }
    Ok(0)
}

fn shared(found: &NetworkInspectOutput) -> Table {
    let nat = &found.nat;
    let mut table = Table::of_facts();
    table.fact(
        "nat",
        match &nat.unavailable_because {
            None => Text::new("available", Mood::Good),
            Some(why) => Text::new(why, Mood::Uneasy),
        },
    );
    table.maybe(
        "subnets",
        nat.subnet.as_ref().map(|v4| match &nat.subnet6 {
            Some(v6) => format!("{v4}, {v6}"),
            None => v4.clone(),
        }),
    );
    table.maybe("process", nat.pid.map(|pid| format!("nexus-net, {pid}")));
    for warning in &nat.warnings {
        table.fact("warning", Text::new(warning, Mood::Uneasy));
    }
    table
}

async fn log(app: &App, args: LogArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let (mut cursor, mut wait_s) = (None, None);
    loop {
        let params =
            NetworkLogParams { vm: args.vm.clone(), cursor: cursor.clone(), limit: Some(args.lines), wait_s };
        let wait = Duration::from_secs(wait_s.unwrap_or_default().into());
        let reply = client.call_with::<NetworkLog>(&params, Options::waiting(wait)).await?;
        let read: NetworkLogOutput = reply.facts(NetworkLog::NAME, NetworkLog::SHAPE)?;
        for one in &read.connections {
            match app.ui.format {
                Format::Json => app.ui.json(&raw(one)?)?,
                Format::Quiet | Format::Human => app.ui.line(&line(one))?,
            }
        }
        if !args.follow {
            match app.ui.format {
                _ if !read.connections.is_empty() => {}
                Format::Json => app.ui.line("[]")?,
                Format::Quiet | Format::Human => app.ui.say("no connections are logged"),
            }
            return Ok(0);
        }
        cursor = Some(read.cursor);
        wait_s = Some(FOLLOW_WAIT_S);
    }
}

/// A connection as a line.
fn line(one: &LoggedConnection) -> String {
    let place = match one.port {
        0 => one.host.clone(),
        port if one.host.contains(':') => format!("[{}]:{port}", one.host),
        port => format!("{}:{port}", one.host),
    };
    let address = one.address.map(|address| format!(" ({address})")).unwrap_or_default();
    let why = one.reason.map(|reason| format!(": {}", reason.words())).unwrap_or_default();
    format!("{} {:7} {:4} {place}{address}{why}", one.at, one.verdict.as_str(), one.protocol)
}

#[cfg(test)]
mod tests {
    use nexus_schema::Timestamp;
    use nexus_schema::network::DenyReason;
    use nexus_schema::tools::network::Verdict;

    use super::*;

    #[test]
    fn connections_are_lines() {
        let one = LoggedConnection {
            at: Timestamp::from_millis(0),
            verdict: Verdict::Denied,
            protocol: "tcp".into(),
            host: "db.example".into(),
            address: Some("10.0.0.5".parse().unwrap()),
            port: 5432,
            reason: Some(DenyReason::Private),
        };
        assert!(
            line(&one).ends_with(" denied  tcp  db.example:5432 (10.0.0.5): an address of a private network")
        );
        let named = LoggedConnection { address: None, port: 0, protocol: "dns".into(), ..one };
        assert!(line(&named).ends_with(" denied  dns  db.example: an address of a private network"));
    }
}
