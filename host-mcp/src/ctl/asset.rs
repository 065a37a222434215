//! `nexusctl asset`: kernels and other verified files; also `kernel`, `rootfs` and `firecracker`, the same for one kind.

use clap::{Args, Subcommand};
use nexus_schema::id::AssetKindTag;
use nexus_schema::tools::asset::{
    AssetDownload, AssetDownloadParams, AssetInspect, AssetInspectParams, AssetKind, AssetList,
    AssetListParams, AssetRemove, AssetRemoveParams, AssetSummary, AssetVerify, AssetVerifyParams, Verified,
};
use nexus_schema::{Name, Reference, Timestamp};
use serde::Deserialize;

use super::App;
use super::args::word;
use super::client::raw;
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::hint::{About, for_shell};
use super::list::{self, Paging};
use super::provider;
use super::source::located;
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
    /// Show an installed asset: its files, their sources, and its users
    #[command(visible_alias = "show")]
    Inspect(OneArgs),
    /// Hash the files of installed assets again, and report damaged ones
    Verify(VerifyArgs),
    /// Remove an installed asset
    #[command(visible_alias = "rm")]
    Remove(OneArgs),
    /// List where assets come from: the same as `provider list`
    Providers(provider::ListArgs),
}

/// Which asset.
#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    /// The asset: its name or id
    asset: Reference<AssetKindTag>,
}

/// Which assets.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The asset: its name or id [default: all]
    asset: Option<Reference<AssetKindTag>>,
    /// Only assets of this kind
    #[arg(long, value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: Option<AssetKind>,
    #[command(flatten)]
    wait: Wait,
}

/// Which assets.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only assets of this kind
    #[arg(long, value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: Option<AssetKind>,
    /// Only installed ones; do not ask providers
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
    #[command(flatten)]
    what: WhatArgs,
    #[command(flatten)]
    how: HowArgs,
}

/// Which one, of a kind.
#[derive(Debug, Args)]
pub(crate) struct WhatArgs {
    /// Its source: a provider from `asset list`, optionally with a version (alpine@3.21); url:ADDRESS;
    /// file:PATH on the daemon's host; or only a version [default: debian, alpine or firecracker]
    #[arg(value_name = "FROM|VERSION", conflicts_with = "from")]
    what: Option<String>,
    /// Its version, or the beginning of it [default: the newest]
    #[arg(value_name = "VERSION", requires = "what", conflicts_with = "version")]
    which: Option<String>,
    /// The same as FROM
    #[arg(long)]
    from: Option<String>,
    /// The same as VERSION
    #[arg(long = "asset-version", visible_alias = "release", value_name = "VERSION")]
    version: Option<String>,
}

impl WhatArgs {
    /// The source and the version.
    fn split(self) -> (Option<String>, Option<String>) {
        let is_version = |what: &str| what.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit());
        match self.what {
            Some(what) if is_version(&what) && self.which.is_none() => (self.from, Some(what)),
            what => (what.or(self.from), self.which.or(self.version)),
        }
    }
}

/// How it is taken.
#[derive(Debug, Args)]
pub(crate) struct HowArgs {
    /// The name for it
    #[arg(long)]
    name: Option<Name>,
    /// The expected SHA-256 of the file, in hexadecimal
    #[arg(long)]
    sha256: Option<String>,
    /// Accept a file that cannot be verified
    #[arg(long)]
    unverified: bool,
    /// Only check whether the version exists and works
    #[arg(long)]
    check: bool,
    /// Make it the default for new VMs
    #[arg(long)]
    make_default: bool,
    #[command(flatten)]
    wait: Wait,
}

/// The same verbs for assets of one kind.
#[derive(Debug, Subcommand)]
pub(crate) enum OfKind {
    /// List those installed and available
    #[command(visible_alias = "ls")]
    List(Paging),
    /// List those installed
    Installed(Paging),
    /// Download and verify one
    #[command(visible_alias = "get")]
    Download {
        #[command(flatten)]
        what: WhatArgs,
        #[command(flatten)]
        how: HowArgs,
    },
    /// Show an installed one
    #[command(visible_alias = "show")]
    Inspect(OneArgs),
    /// Hash the files of one or all installed ones, and report damaged ones
    Verify {
        /// The asset: its name or id [default: all]
        asset: Option<Reference<AssetKindTag>>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Remove one
    #[command(visible_alias = "rm")]
    Remove(OneArgs),
}

impl OfKind {
    /// The equivalent verb for assets of any kind.
    pub(crate) fn of(self, kind: AssetKind) -> Command {
        let list = |paging, installed| Command::List(ListArgs { kind: Some(kind), installed, paging });
        match self {
            Self::List(paging) => list(paging, false),
            Self::Installed(paging) => list(paging, true),
            Self::Download { what, how } => Command::Download(DownloadArgs { kind, what, how }),
            Self::Inspect(args) => Command::Inspect(args),
            Self::Verify { asset, wait } => Command::Verify(VerifyArgs { asset, kind: Some(kind), wait }),
            Self::Remove(args) => Command::Remove(args),
        }
    }
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::List(args) => list(app, args).await,
        Command::Download(args) => download(app, args).await,
        Command::Inspect(args) => inspect(app, args).await,
        Command::Verify(args) => verify(app, args).await,
        Command::Remove(args) => remove(app, args).await,
        Command::Providers(args) => provider::list(app, args).await,
    }
}

async fn inspect(app: &App, args: OneArgs) -> Result<u8, Error> {
    let details =
        app.connect().await?.call::<AssetInspect>(&AssetInspectParams { asset: args.asset }).await?;
    let asset = &details.asset;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&details)?)?,
        Format::Quiet => list::ids(&app.ui, asset.id.iter())?,
        Format::Human => {
            let mut table = Table::of_facts();
            table.fact("name", &asset.name);
            table.maybe("id", asset.id.as_ref());
            table.fact("kind", asset.kind.as_str());
            table.fact("provider", &asset.provider);
            table.fact("version", &asset.version);
            table.fact("origin", &details.origin);
            table.fact("verified", verified(asset.verified));
            table.maybe("download", details.download_sha256.as_ref());
            for file in &details.files {
                table.fact(
                    "file",
                    format!("{} · {} · {}", file.name, format::size(file.size_bytes), file.sha256),
                );
            }
            if !details.used_by.is_empty() {
                table.fact("used by", details.used_by.join(", "));
            }
            app.ui.table(table)?;
        }
    }
    Ok(0)
}

async fn verify(app: &App, args: VerifyArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let kind = args.kind;
    let params = AssetVerifyParams { asset: args.asset, kind, wait_s: Some(0) };
    let followed = follow::start::<AssetVerify, _>(&mut client, &app.ui, &params, args.wait).await?;
    let Some(result) = followed.result_or_op(&app.ui)? else { return Ok(0) };
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => {
            list::ids(&app.ui, result.assets.iter().filter(|asset| !asset.ok).map(|asset| asset.id))?
        }
        Format::Human if result.assets.is_empty() => {
            app.ui.say(&format!(
                "nothing to verify: no {} is installed",
                kind.map_or("asset", AssetKind::as_str)
            ));
        }
        Format::Human => {
            let mut table =
                Table::with_headings(&["NAME", "KIND", "STATUS", "SIZE"]).dropping(&["SIZE", "KIND"]);
            for asset in &result.assets {
                let status = match asset.ok {
                    true => Text::new("good", Mood::Good),
                    false => Text::new("damaged", Mood::Bad),
                };
                table.row([
                    (&asset.name).into(),
                    asset.kind.as_str().into(),
                    status,
                    format::size(asset.bytes).into(),
                ]);
            }
            app.ui.table(table)?;
            result.assets.iter().flat_map(|asset| &asset.problems).for_each(|problem| app.ui.warn(problem));
        }
    }
    Ok(u8::from(!result.ok))
}

async fn remove(app: &App, args: OneArgs) -> Result<u8, Error> {
    let removed = app.connect().await?.call::<AssetRemove>(&AssetRemoveParams { asset: args.asset }).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&removed)?)?,
        Format::Quiet => list::ids(&app.ui, std::iter::once(removed.id))?,
        Format::Human => {
            let was = if removed.was_default { ", which was the default" } else { "" };
            app.ui.line(&format!("removed {}{was}: {}", removed.name, format::size(removed.freed_bytes)))?;
        }
    }
    Ok(0)
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
    let kind = args.kind.map_or("asset", AssetKind::as_str);
    let nothing = match args.installed {
        true => format!("no {kind} is installed"),
        false => format!("no {kind} is installed or available"),
    };
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().filter_map(|asset| asset.id))?,
        Format::Human => {
            listed.show(&app.ui, table(&listed.rows, app.ui.now()), &nothing)?;
            let problems =
                serde_json::from_str::<Problems>(listed.raw.get()).map(|p| p.problems).unwrap_or_default();
            for problem in &problems {
                let (problem, hint) = problem.split_once('\n').unwrap_or((problem, ""));
                app.ui.warn(problem);
                if !hint.is_empty() {
                    app.ui.say(&format!("hint: {}", for_shell(hint, &About::default())));
                }
            }
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn download(app: &App, args: DownloadArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let (from, version) = args.what.split();
    let from = from.map(located);
    let how = args.how;
    let params = AssetDownloadParams {
        kind: args.kind,
        from,
        version,
        name: how.name,
        sha256: how.sha256,
        unverified: how.unverified.then_some(true),
        check: how.check.then_some(true),
        make_default: how.make_default.then_some(true),
        wait_s: Some(0),
    };
    let followed = follow::start::<AssetDownload, _>(&mut client, &app.ui, &params, how.wait).await?;
    let outcome = &followed.outcome;
    match (app.ui.format, &outcome.result) {
        (Format::Json, _) => app.ui.json(&followed.raw)?,
        (Format::Quiet, _) => app.ui.line(outcome.subject_id.as_deref().unwrap_or_default())?,
        (Format::Human, Some(asset)) => {
            app.ui.table(table(std::slice::from_ref(asset), app.ui.now()))?;
            if how.check {
                app.ui.say(&looked_up(asset));
            } else if asset.kind != AssetKind::Rootfs && !asset.default {
                app.ui.say(&format!(
                    "the default {} is unchanged; --make-default changes it",
                    asset.kind.as_str()
                ));
            }
        }
        (Format::Human, None) => app.ui.line(outcome.subject_name.as_deref().unwrap_or_default())?,
    }
    Ok(0)
}

/// Describes the result of a check.
fn looked_up(asset: &AssetSummary) -> String {
    let is = if asset.installed { "is already installed" } else { "can be downloaded" };
    match &asset.unsuitable {
        Some(why) => format!("{} {} {is}, but works with no driver: {why}", asset.provider, asset.version),
        None if asset.drivers.is_empty() => format!("{} {} {is}", asset.provider, asset.version),
        None => {
            format!(
                "{} {} {is}, and works with {}",
                asset.provider,
                asset.version,
                asset.drivers.join(" and ")
            )
        }
    }
}

fn verified(verified: Option<Verified>) -> Text {
    match verified {
        Some(Verified::None) => Text::new("no", Mood::Uneasy),
        Some(verified) => verified.as_str().into(),
        None => "-".into(),
    }
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
    ])
    .prose(&["STATUS"])
    .dropping(&["VERIFIED", "INSTALLED", "SIZE", "PROVIDER", "KIND", "VERSION"]);
    for asset in assets {
        let name = if asset.default { format!("{} (default)", asset.name) } else { asset.name.to_string() };
        let status = if asset.installed { Text::new("installed", Mood::Good) } else { "available".into() };
        let status = match &asset.unsuitable {
            Some(why) if !asset.installed => Text::new(why, Mood::Uneasy),
            _ => status,
        };
        table.row([
            name.into(),
            asset.kind.as_str().into(),
            (&asset.version).into(),
            (&asset.provider).into(),
            status,
            asset.size_bytes.map_or("-".into(), format::size).into(),
            verified(asset.verified),
            asset.installed_at.map_or("-".into(), |at| format::ago(at, now)).into(),
        ]);
    }
    table
}
