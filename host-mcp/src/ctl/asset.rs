//! `nexusctl asset`: kernels and other verified files.

use clap::{Args, Subcommand};
use nexus_schema::tools::asset::{
    AssetDownload, AssetDownloadParams, AssetKind, AssetList, AssetListParams, AssetSummary, Verified,
};
use nexus_schema::{Name, Timestamp};
use serde::Deserialize;

use super::App;
use super::args::word;
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::list::{self, Paging};
use super::ui::{Format, Mood, Table, Text};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List assets, installed and available
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Download and verify an asset, or import one from a file
    #[command(visible_alias = "get")]
    Download(DownloadArgs),
}

/// Which assets.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only assets of this kind
    #[arg(long, value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: Option<AssetKind>,
    /// Only those that are here: providers are not asked
    #[arg(long)]
    installed: bool,
    #[command(flatten)]
    paging: Paging,
}

/// What to download.
#[derive(Debug, Args)]
pub(crate) struct DownloadArgs {
    /// What it is
    #[arg(default_value = "kernel", value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: AssetKind,
    /// Where it comes from: debian, or file:PATH on the daemon's host [default: debian]
    #[arg(long)]
    from: Option<String>,
    /// Which version [default: the newest]
    #[arg(long = "asset-version", visible_alias = "release", value_name = "VERSION")]
    version: Option<String>,
    /// A name of your choice
    #[arg(long)]
    name: Option<Name>,
    /// The SHA-256 that the file must have, in hexadecimal
    #[arg(long)]
    sha256: Option<String>,
    /// Make it what VMs get by default
    #[arg(long)]
    make_default: bool,
    #[command(flatten)]
    wait: Wait,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::List(args) => list(app, args).await,
        Command::Download(args) => download(app, args).await,
    }
}

#[derive(Deserialize)]
struct Problems {
    #[serde(default)]
    problems: Vec<String>,
}

async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let available = args.installed.then_some(false);
    let page = |limit, cursor| AssetListParams { kind: args.kind, available, limit: Some(limit), cursor };
    let listed = list::all::<AssetList, AssetSummary>(&mut client, &args.paging, "assets", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().filter_map(|asset| asset.id))?,
        Format::Human => {
            app.ui.table(table(&listed.rows, app.ui.now))?;
            let problems =
                serde_json::from_str::<Problems>(listed.raw.get()).map(|p| p.problems).unwrap_or_default();
            problems.iter().for_each(|problem| app.ui.warn(problem));
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn download(app: &App, args: DownloadArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = AssetDownloadParams {
        kind: args.kind,
        from: args.from,
        version: args.version,
        name: args.name,
        sha256: args.sha256,
        make_default: args.make_default.then_some(true),
        wait_s: Some(0),
    };
    let followed = follow::start::<AssetDownload, _>(&mut client, &app.ui, &params, args.wait).await?;
    let outcome = &followed.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(asset)) => app.ui.table(table(std::slice::from_ref(asset), app.ui.now))?,
        (Format::Human, None) => app.ui.line(outcome.subject_name.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

fn table(assets: &[AssetSummary], now: Timestamp) -> Table {
    let mut table = Table::with_headings(&[
        "NAME",
        "KIND",
        "VERSION",
        "PROVIDER",
        "STATUS",
        "SIZE",
        "VERIFIED",
        "INSTALLED",
    ]);
    for asset in assets {
        let name = if asset.default { format!("{} (default)", asset.name) } else { asset.name.to_string() };
        let status = if asset.installed { Text::new("installed", Mood::Good) } else { "available".into() };
        let verified = match asset.verified {
            Some(Verified::None) => Text::new("no", Mood::Uneasy),
            Some(verified) => verified.as_str().into(),
            None => "-".into(),
        };
        table.row([
            name.into(),
            asset.kind.as_str().into(),
            (&asset.version).into(),
            (&asset.provider).into(),
            status,
            asset.size_bytes.map_or("-".into(), format::size).into(),
            verified,
            asset.installed_at.map_or("-".into(), |at| format::ago(at, now)).into(),
        ]);
    }
    table
}
