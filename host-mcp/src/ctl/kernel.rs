//! `nexusctl kernel`: the verbs of `asset` for kernels, and kernels of one's own: checked, built and published.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use nexus_schema::Name;
use nexus_schema::Reference;
use nexus_schema::id::AssetKindTag;
use nexus_schema::tools::asset::{AssetKind, Verified};
use nexus_schema::tools::kernel::{
    KernelBuild, KernelBuildParams, KernelBuilt, KernelPublish, KernelPublishParams, KernelSource,
};

use super::App;
use super::asset::{self, OfKind};
use super::error::Error;
use super::follow::{self, Wait};
use super::format;
use super::hint::{About, for_shell};
use super::list;
use super::ui::{Format, Mood, Table, Text};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Asset(OfKind),
    /// Say whether a version can be built: which sources have it, whether they are signed, and what this host lacks
    VersionCheck(CheckArgs),
    /// Build a kernel from signed source, and add it to the assets
    Build(Box<BuildArgs>),
    /// Lay kernels out in a directory, packed and signed, for other hosts to download
    Publish(PublishArgs),
}

/// Which version.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The version of Linux, or the beginning of it
    version: String,
    /// Only this source: debian, or a provider of sources such as kernel-org
    #[arg(long)]
    from: Option<String>,
    /// For a build in a VM: whatever the host lacks does not matter
    #[arg(long)]
    in_vm: bool,
    #[command(flatten)]
    wait: Wait,
}

/// What to build.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// The version of Linux, or the beginning of it [default: the newest]
    version: Option<String>,
    /// Only this source: debian, or a provider of sources such as kernel-org [default: the first that has the version]
    #[arg(long)]
    from: Option<String>,
    /// The configuration, a file on this machine [default: that of Nexus for microVMs]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The architecture [default: that of the daemon's host, which is the only one that can be built]
    #[arg(long)]
    arch: Option<String>,
    /// Compile it in a VM that is made for it, instead of by the compiler of the daemon's host
    #[arg(long)]
    in_vm: bool,
    /// The name for it
    #[arg(long)]
    name: Option<Name>,
    /// Make it the default for new VMs
    #[arg(long)]
    make_default: bool,
    #[command(flatten)]
    wait: Wait,
}

/// What to publish, and where.
#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// The directory on the daemon's host; made if it does not exist
    directory: PathBuf,
    /// The file with the armored secret key that signs, on the daemon's host
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// A kernel; repeatable [default: all that were built here]
    #[arg(long = "kernel", value_name = "KERNEL")]
    kernels: Vec<Reference<AssetKindTag>>,
    /// The provider whose layout is written [default: anvil]
    #[arg(long)]
    provider: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Asset(verb) => asset::run(app, verb.of(AssetKind::Kernel)).await,
        Command::VersionCheck(args) => check(app, args).await,
        Command::Build(args) => build(app, *args).await,
        Command::Publish(args) => publish(app, args).await,
    }
}

async fn check(app: &App, args: CheckArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = KernelBuildParams {
        version: Some(args.version),
        from: args.from,
        in_vm: args.in_vm.then_some(true),
        check: Some(true),
        wait_s: Some(0),
        ..KernelBuildParams::default()
    };
    let followed = follow::start::<KernelBuild, _>(&mut client, &app.ui, &params, args.wait).await?;
    let Some(result) = followed.result_or_op(&app.ui)? else { return Ok(0) };
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => {
            let usable = result.sources.iter().filter(|source| source.problem.is_none());
            for source in usable {
                app.ui.line(&format!("{} {}", source.provider, source.version.as_deref().unwrap_or("-")))?;
            }
        }
        Format::Human => {
            app.ui.table(table(&result.sources))?;
            say(app, result);
        }
    }
    Ok(u8::from(!result.ok))
}

/// Says what else a check found.
fn say(app: &App, result: &KernelBuilt) {
    for source in &result.sources {
        if let Some(problem) = &source.problem {
            app.ui.warn(&format!("{}: {}", source.provider, for_shell(problem, &About::default())));
        }
        if let Some(newer) = &source.newer {
            app.ui.say(&format!("{} has {newer}, a newer version of the same series", source.provider));
        }
    }
    if !result.missing.is_empty() {
        let missing = result.missing.join(" ");
        app.ui.warn(&format!("to build it, this host lacks the packages {missing}"));
        app.ui.say(&format!("hint: as root: apt-get install {missing}; or build it with --in-vm"));
    }
}

fn table(sources: &[KernelSource]) -> Table {
    let mut table =
        Table::with_headings(&["SOURCE", "VERSION", "STATUS", "VERIFIED", "ORIGIN"]).dropping(&["ORIGIN"]);
    for source in sources {
        let status = match source.problem {
            None => Text::new("can be built", Mood::Good),
            Some(_) => Text::new("cannot be used", Mood::Uneasy),
        };
        table.row([
            (&source.provider).into(),
            source.version.as_deref().unwrap_or("-").into(),
            status,
            source.verified.map_or("-", Verified::as_str).into(),
            source.origin.as_deref().unwrap_or("-").into(),
        ]);
    }
    table
}

async fn build(app: &App, args: BuildArgs) -> Result<u8, Error> {
    let config = args.config.as_deref().map(read).transpose()?;
    let mut client = app.connect().await?;
    let params = KernelBuildParams {
        version: args.version,
        from: args.from,
        config,
        arch: args.arch,
        name: args.name,
        in_vm: args.in_vm.then_some(true),
        check: None,
        make_default: args.make_default.then_some(true),
        wait_s: Some(0),
    };
    let followed = follow::start::<KernelBuild, _>(&mut client, &app.ui, &params, args.wait).await?;
    let result = followed.outcome.result.as_ref();
    let Some((result, asset)) = result.and_then(|result| Some((result, result.asset.as_ref()?))) else {
        app.ui.line(&followed.outcome.op_id.to_string())?;
        return Ok(0);
    };
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => list::ids(&app.ui, asset.id.iter())?,
        Format::Human => {
            let mut table = Table::of_facts();
            table.fact("name", &asset.name);
            table.fact("version", &asset.version);
            if let Some(source) = result.sources.first() {
                table.fact("source", source.origin.as_deref().unwrap_or(&source.provider));
            }
            table.maybe("size", asset.size_bytes.map(format::size).as_ref());
            table.maybe("file", asset.path.as_ref());
            table.maybe("log", result.log.as_ref());
            app.ui.table(table)?;
            if result.cached {
                app.ui.say("it had been built before");
            }
        }
    }
    Ok(0)
}

/// The text of a configuration; - is standard input.
fn read(file: &Path) -> Result<String, Error> {
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    text.map_err(|source| Error::File { what: "read the configuration", path: file.to_owned(), source })
}

async fn publish(app: &App, args: PublishArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = KernelPublishParams {
        directory: absolute(&args.directory)?,
        key: absolute(&args.key)?,
        kernels: args.kernels,
        provider: args.provider,
        wait_s: Some(0),
    };
    let followed = follow::start::<KernelPublish, _>(&mut client, &app.ui, &params, args.wait).await?;
    let Some(result) = followed.result_or_op(&app.ui)? else { return Ok(0) };
    match app.ui.format {
        Format::Json => app.ui.json(&followed.raw)?,
        Format::Quiet => {
            for kernel in &result.kernels {
                app.ui.line(&kernel.file)?;
            }
        }
        Format::Human => {
            let mut table = Table::with_headings(&["NAME", "VERSION", "FILE", "SIZE"]).dropping(&["SIZE"]);
            for kernel in &result.kernels {
                table.row([
                    (&kernel.name).into(),
                    (&kernel.version).into(),
                    (&kernel.file).into(),
                    format::size(kernel.size_bytes).into(),
                ]);
            }
            app.ui.table(table)?;
            app.ui.say(&format!("signed by {}; give other hosts {}", result.fingerprint, result.public_key));
        }
    }
    Ok(0)
}

/// A path for the daemon, which runs in another directory.
fn absolute(path: &Path) -> Result<String, Error> {
    let absolute = std::path::absolute(path).map_err(|source| Error::File {
        what: "find the directory of",
        path: path.to_owned(),
        source,
    })?;
    match absolute.into_os_string().into_string() {
        Ok(text) => Ok(text),
        Err(path) => Err(Error::usage(format!("{} is not UTF-8", path.display()))),
    }
}
