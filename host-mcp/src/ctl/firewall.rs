//! `nexusctl setup-firewall`: opens the host's own firewall for VMs with network `nat`.

use nexus_schema::tools::network::{
    FirewallChain, FirewallHook, NetworkFirewall, NetworkFirewallOutput, NetworkFirewallParams,
};

use super::App;
use super::client::raw;
use super::error::Error;
use super::ui::{Format, Mood, Table, Text};

/// Options.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Remove the rules
    #[arg(long)]
    undo: bool,
    /// Only show what would change
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// Adds, removes or shows the rules.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let Args { undo, dry_run } = args;
    let params = NetworkFirewallParams { undo: undo.then_some(true), dry_run: dry_run.then_some(true) };
    let found = app.connect().await?.call::<NetworkFirewall>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&found)?)?,
        Format::Quiet => {}
        Format::Human => {
            if !found.chains.is_empty() {
                app.ui.table(table(&found))?;
            }
            for chain in &found.chains {
                if let Some(problem) = &chain.problem {
                    app.ui.say(&format!("{}, {}: {problem}", chain.table, chain.chain));
                }
            }
            app.ui.line(summary(&found, undo, dry_run))?;
        }
    }
    let is_missing = |chain: &FirewallChain| !chain.open && !undo && !dry_run;
    Ok(u8::from(found.chains.iter().any(is_missing)))
}

fn summary(found: &NetworkFirewallOutput, undo: bool, dry_run: bool) -> &'static str {
    let has_closed = found.chains.iter().any(|chain| !chain.open);
    let has_open = found.chains.iter().any(|chain| chain.open);
    match (undo, dry_run) {
        (false, true) if has_closed => "dry run: rules for VMs would be added to the chains that are closed",
        (false, true) => "dry run: nothing to add; nothing drops packets of VMs",
        (true, true) if has_open => "dry run: the rules for VMs would be removed",
        (true, true) => "dry run: nothing to remove",
        (true, false) => "the host's firewall has no rules of Nexus",
        (false, false) if has_closed => "some chains still drop packets of VMs",
        (false, false) if has_open => "the host's firewall lets packets of VMs pass, and is kept so",
        (false, false) => "nothing drops packets of VMs; a firewall that comes later is opened as well",
    }
}

fn table(found: &NetworkFirewallOutput) -> Table {
    let mut table = Table::with_headings(&["TABLE", "CHAIN", "SEES", "FROM", "VMS"]);
    for chain in &found.chains {
        let place = match &chain.rules_in {
            Some(other) => format!("{} ({other})", chain.chain),
            None => chain.chain.clone(),
        };
        let sees = match chain.hook {
            FirewallHook::Forward => "forwarded",
            FirewallHook::Input => "for the host",
        };
        let is_open = if chain.open { ("pass", Mood::Good) } else { ("dropped", Mood::Uneasy) };
        table.row([
            chain.table.clone().into(),
            place.into(),
            sees.into(),
            chain.from.clone().unwrap_or_default().into(),
            Text::new(is_open.0, is_open.1),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_one_sentence() {
        let chain = |open| FirewallChain {
            table: "ip filter".to_owned(),
            chain: "FORWARD".to_owned(),
            hook: FirewallHook::Forward,
            from: Some("docker".to_owned()),
            rules_in: Some("DOCKER-USER".to_owned()),
            open,
            problem: None,
        };
        let found = |chains: &[bool]| NetworkFirewallOutput {
            enabled: true,
            bridge: None,
            chains: chains.iter().map(|open| chain(*open)).collect(),
        };
        for (chains, undo, dry_run, words) in [
            (&[false][..], false, true, "would be added"),
            (&[], false, true, "nothing to add"),
            (&[true], false, false, "kept so"),
            (&[true, false], false, false, "still drop"),
            (&[], false, false, "comes later"),
            (&[true], true, true, "would be removed"),
            (&[], true, true, "nothing to remove"),
            (&[false], true, false, "no rules of Nexus"),
        ] {
            let said = summary(&found(chains), undo, dry_run);
            assert!(said.contains(words), "{said}");
        }
    }
}
