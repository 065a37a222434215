//! `nexusctl guest`: commands and files inside a VM.

mod exec;
mod files;
mod live;

use clap::{Args, Subcommand};
use nexus_schema::id::VmKind;
use nexus_schema::tools::os::{OsInfo, OsInfoOutput, OsInfoParams};
use nexus_schema::{Reference, Tool};

use super::App;
use super::client::Options;
use super::error::Error;
use super::format;
use super::ui::{Format, Table};

pub(crate) use exec::{How, Program, RunArgs, exec, not_started, run as run_program, with_shell_hint};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a VM: `nexusctl guest run VM -- ls -l`, or a shell line with -c
    #[command(visible_alias = "exec")]
    Run(RunArgs),
    /// Write a file of a VM to standard output
    #[command(visible_alias = "cat")]
    Read(files::ReadArgs),
    /// Write standard input, or a local file, to a file in a VM
    Write(files::WriteArgs),
    /// List a directory in a VM
    #[command(visible_alias = "list")]
    Ls(files::LsArgs),
    /// Show the attributes of a file in a VM
    Stat(files::StatArgs),
    /// Delete a file in a VM
    #[command(visible_alias = "delete")]
    Rm(files::RmArgs),
    /// Show a VM's operating system
    Info(InfoArgs),
}

/// Which VM.
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Run(args) => exec(app, args).await,
        Command::Read(args) => files::read(app, args).await,
        Command::Write(args) => files::write(app, args).await,
        Command::Ls(args) => files::ls(app, args).await,
        Command::Stat(args) => files::stat(app, args).await,
        Command::Rm(args) => files::rm(app, args).await,
        Command::Info(args) => info(app, args).await,
    }
}

async fn info(app: &App, args: InfoArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let vm = args.vm.to_string();
    let reply = client.call_guest::<OsInfo>(&vm, &OsInfoParams {}, Options::default()).await?;
    let os: OsInfoOutput = reply.facts(OsInfo::NAME, OsInfo::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => app.ui.line(&vm)?,
        Format::Human => app.ui.table(facts(&os))?,
    }
    Ok(0)
}

fn facts(os: &OsInfoOutput) -> Table {
    let mut table = Table::of_facts();
    table.fact("hostname", &os.hostname);
    table.maybe("system", os.os.as_ref());
    table.fact("kernel", format!("{} {}", os.kernel, os.arch));
    table.fact("cpus", os.cpus);
    let of = |free, total| format!("{} free of {}", format::size(free), format::size(total));
    table.fact("memory", of(os.memory_available_bytes, os.memory_total_bytes));
    table.fact("disk", of(os.disk_available_bytes, os.disk_total_bytes));
    table.fact("load", os.load.map(|load| format!("{load:.2}")).join(" "));
    // Rounded to whole seconds. The guest's clock is not trusted: the cast saturates and never panics.
    table.fact("up", format::millis((os.uptime_s * 1000.0) as u64));
    table.fact("init", &os.init);
    if let Some(system) = &os.system {
        let failed = match system.failed.is_empty() {
            true => String::new(),
            false => format!("; failed: {}", system.failed.join(", ")),
        };
        table.fact("services", format!("{}{failed}", system.state.as_str()));
    }
    table.maybe("clock", os.clock_skew_ms.map(|ms| format!("{:+.3} s from the host's", ms as f64 / 1000.0)));
    table.maybe("shell", os.shell.as_ref());
    table.maybe("packages", os.package_manager.as_ref());
    table.fact("agent", &os.agent);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_a_guest() {
        let os = serde_json::from_value(serde_json::json!({
            "hostname": "web-1", "os": "Debian GNU/Linux 12 (bookworm)", "kernel": "6.1.0-40-cloud-amd64",
            "arch": "x86_64", "cpus": 2, "memory_total_bytes": 512 << 20, "memory_available_bytes": 400 << 20,
            "disk_total_bytes": 8_u64 << 30, "disk_available_bytes": 7_u64 << 30, "load": [0.5, 0.25, 0.0],
            "uptime_s": 75.5, "init": "systemd", "system": { "state": "degraded", "failed": ["x.service"] }, "clock_skew_ms": -1500, "shell": "/bin/bash", "package_manager": "apt", "agent": "0.1.0"
        }))
        .unwrap();
        insta::assert_snapshot!(facts(&os).render(None, false), @"
        hostname  web-1
        system    Debian GNU/Linux 12 (bookworm)
        kernel    6.1.0-40-cloud-amd64 x86_64
        cpus      2
        memory    400 MiB free of 512 MiB
        disk      7 GiB free of 8 GiB
        load      0.50 0.25 0.00
        up        1 min 15 s
        init      systemd
        services  degraded; failed: x.service
        clock     -1.500 s from the host's
        shell     /bin/bash
        packages  apt
        agent     0.1.0
        ");
    }
}
