//! `nexusctl prune`: removes what nothing refers to.

use nexus_schema::tools::prune::{Prune, PruneOutput, PruneParams};

use super::App;
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::ui::{Format, Table};

/// What to remove.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only show what would be removed
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Also all unused images
    #[arg(long)]
    images: bool,
    /// Also unused kernels, root filesystems and VMMs
    #[arg(long)]
    assets: bool,
}

/// Removes it, or says what would be removed.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = PruneParams {
        dry_run: args.dry_run.then_some(true),
        images: args.images.then_some(true),
        assets: args.assets.then_some(true),
        wait_s: Some(0),
    };
    let followed = follow::start::<Prune, _>(&mut client, &app.ui, &params, Wait::default()).await?;
    match (app.ui.format, &followed.outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (_, None) => {}
        (Format::Quiet, Some(pruned)) => {
            super::list::ids(&app.ui, pruned.removed.iter().map(|thing| &thing.name))?;
        }
        (Format::Human, Some(pruned)) => {
            if !pruned.removed.is_empty() {
                app.ui.table(table(pruned))?;
            }
            for thing in &pruned.kept {
                app.ui.say(&format!("{} {} is kept: {}", thing.kind.as_str(), thing.name, thing.why));
            }
            let freed = format::size(pruned.freed_bytes);
            app.ui.line(&match (pruned.removed.len(), pruned.dry_run) {
                (0, _) => "nothing to remove".into(),
                (n, true) => format!("{} with {freed} would be removed", format::count(n as u64, "thing")),
                (n, false) => format!("{} with {freed} removed", format::count(n as u64, "thing")),
            })?;
        }
    }
    Ok(0)
}

fn table(pruned: &PruneOutput) -> Table {
    let mut table = Table::with_headings(&["WHAT", "NAME", "SIZE", "WHY"]).prose(&["WHY"]).dropping(&["WHY"]);
    for thing in &pruned.removed {
        table.row([
            thing.kind.as_str().into(),
            (&thing.name).into(),
            format::size(thing.bytes).into(),
            (&thing.why).into(),
        ]);
    }
    table
}
