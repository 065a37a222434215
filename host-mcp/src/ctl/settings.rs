//! `nexusctl settings`: the defaults for new VMs.

use clap::{Args, Subcommand};
use nexus_schema::Timestamp;
use nexus_schema::tools::settings::{
    SettingChange, SettingsGet, SettingsGetParams, SettingsHistory, SettingsHistoryParams, SettingsOutput,
    SettingsRollback, SettingsRollbackParams, SettingsSet, SettingsSetParams,
};

use super::App;
use super::args::pair;
use super::client::raw;
use super::error::Error;
use super::format;
use super::list::{self, Paging};
use super::ui::{Format, Table};

/// How many changes are listed by default.
const ROWS: u32 = 50;

/// How much of a value is shown in a table.
const VALUE_MAX: usize = 80;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show all settings, or one
    #[command(visible_aliases = ["list", "ls", "show"])]
    Get(GetArgs),
    /// Change settings
    Set(SetArgs),
    /// Reset settings to their built-in values
    Reset(ResetArgs),
    /// List changes, newest first
    History(HistoryArgs),
    /// Roll the settings back to an earlier revision
    Rollback(RollbackArgs),
}

/// Which ones.
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// Only this setting, such as default.memory
    key: Option<String>,
}

/// What to change.
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// A key and its new value, such as default.memory=1GiB
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = pair)]
    values: Vec<(String, String)>,
}

/// What to reset.
#[derive(Debug, Args)]
pub(crate) struct ResetArgs {
    /// The keys
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
}

/// Whose history.
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Only changes of this setting
    key: Option<String>,
    #[command(flatten)]
    paging: Paging,
}

/// Where to go back to.
#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// The revision, from the history; 0 for the built-in values
    revision: u64,
    /// Only this setting
    #[arg(long)]
    key: Option<String>,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let settings = match command {
        Command::Get(args) => client.call::<SettingsGet>(&SettingsGetParams { key: args.key }).await?,
        Command::Set(args) => {
            let params = SettingsSetParams { values: args.values.into_iter().collect(), reset: Vec::new() };
            client.call::<SettingsSet>(&params).await?
        }
        Command::Reset(args) => {
            let params = SettingsSetParams { reset: args.keys, ..Default::default() };
            client.call::<SettingsSet>(&params).await?
        }
        Command::History(args) => {
            let page =
                |limit, cursor| SettingsHistoryParams { key: args.key.clone(), limit: Some(limit), cursor };
            let paging = args.paging.clone().or(ROWS);
            let listed =
                list::all::<SettingsHistory, SettingChange>(&mut client, &paging, "changes", page).await?;
            match app.ui.format {
                Format::Json => app.ui.json(&listed.raw)?,
                Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|change| change.revision))?,
                Format::Human => {
                    listed.show(
                        &app.ui,
                        history(&listed.rows, app.ui.now()),
                        "no changes yet: all settings have their built-in values",
                    )?;
                    listed.say_more(&app.ui);
                }
            }
            return Ok(0);
        }
        Command::Rollback(args) => {
            let params = SettingsRollbackParams { revision: args.revision, key: args.key };
            client.call::<SettingsRollback>(&params).await?
        }
    };
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&settings)?)?,
        Format::Quiet => list::ids(&app.ui, settings.settings.iter().map(|setting| &setting.value))?,
        Format::Human => app.ui.table(table(&settings))?,
    }
    Ok(0)
}

fn table(settings: &SettingsOutput) -> Table {
    let mut table = Table::with_headings(&["SETTING", "VALUE", "BUILT IN", "WHAT IT DECIDES"])
        .prose(&["WHAT IT DECIDES"])
        .dropping(&["WHAT IT DECIDES", "BUILT IN"]);
    for setting in &settings.settings {
        let built_in = if setting.value == setting.default { "yes" } else { setting.default.as_str() };
        let value = if setting.value.is_empty() { "-" } else { setting.value.as_str() };
        let built_in = if built_in.is_empty() { "-" } else { built_in };
        table.row([(&setting.key).into(), value.into(), built_in.into(), (&setting.description).into()]);
    }
    table
}

/// The beginning of a long value; --json shows all of it.
fn shortened(value: &str) -> String {
    match value.char_indices().nth(VALUE_MAX) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_owned(),
    }
}

fn history(changes: &[SettingChange], now: Timestamp) -> Table {
    let mut table = Table::with_headings(&["REVISION", "SETTING", "VALUE", "WHEN", "WHO"])
        .prose(&["VALUE"])
        .dropping(&["WHO", "WHEN"]);
    for change in changes {
        table.row([
            change.revision.into(),
            (&change.key).into(),
            shortened(change.value.as_deref().unwrap_or("built in")).into(),
            format::ago(change.at, now).into(),
            (&change.who).into(),
        ]);
    }
    table
}
