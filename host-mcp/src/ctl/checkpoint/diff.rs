//! `nexusctl checkpoint diff`: what changed, a line for each file.

use std::time::Duration;

use clap::Args;
use nexus_schema::id::{CheckpointKind, VmKind};
use nexus_schema::tools::checkpoint::{
    ChangedPath, CheckpointDiff, CheckpointDiffOutput, CheckpointDiffParams, PathChange,
};
use nexus_schema::{Reference, Tool};

use crate::ctl::App;
use crate::ctl::client::{self, Options};
use crate::ctl::error::Error;
use crate::ctl::format;
use crate::ctl::ui::Format;

/// How long drives may take to be copied and compared.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is compared.
#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The checkpoint: its id or name
    from: Reference<CheckpointKind>,
    /// The checkpoint to compare it with [default: its VM as it is now]
    to: Option<Reference<CheckpointKind>>,
    /// The VM whose checkpoints the names mean
    #[arg(long)]
    vm: Option<Reference<VmKind>>,
    /// Only what is at or below this path in the VM
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// How many files to list, at most 500 [default: 200]
    #[arg(long, value_name = "NUMBER")]
    limit: Option<u32>,
    /// Also show how small text files changed
    #[arg(short, long)]
    text: bool,
}

/// Compares.
pub(super) async fn run(app: &App, args: DiffArgs) -> Result<u8, Error> {
    let DiffArgs { from, to, vm, path, limit, text } = args;
    let params = CheckpointDiffParams { from, to, vm, path, limit, text };
    let mut client = app.connect().await?;
    let reply = client.call_with::<CheckpointDiff>(&params, Options::waiting(PATIENCE)).await?;
    let found: CheckpointDiffOutput = reply.facts(CheckpointDiff::NAME, CheckpointDiff::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(&client::raw(&found)?)?,
        Format::Quiet => found.files.iter().try_for_each(|file| app.ui.line(&format::tame(&file.path)))?,
        Format::Human => show(app, &found)?,
    }
    Ok(0)
}

fn show(app: &App, found: &CheckpointDiffOutput) -> Result<(), Error> {
    for file in &found.files {
        app.ui.line(&line(file))?;
    }
    for text in found.diff.iter().flat_map(|diff| diff.lines()) {
        app.ui.line(&tame_but_tabs(text))?;
    }
    if let Some(processes) = &found.processes {
        for (sign, all) in [("+", &processes.started), ("-", &processes.ended)] {
            for process in all {
                app.ui.line(&format!("{sign} process {} {}", process.pid, format::tame(&process.command)))?;
            }
        }
    }
    let total = found.added + found.changed + found.removed;
    let listed = u64::try_from(found.files.len()).unwrap_or(u64::MAX);
    let rest = if found.is_cut {
        format!("; {listed} of {total} listed, narrow it with --path")
    } else {
        String::new()
    };
    app.ui.say(&format!("{} added, {} changed, {} removed{rest}", found.added, found.changed, found.removed));
    if found.diff_is_cut {
        app.ui.say("some text files are not shown: narrow it with --path");
    }
    if found.backwards {
        app.ui.say("the first is the newer one: what is shown as deleted was added in between");
    }
    for note in &found.notes {
        app.ui.warn(&format::tame(note));
    }
    Ok(())
}

/// `A path size`, `M path old -> new`, `D path`.
fn line(file: &ChangedPath) -> String {
    let path = format::tame(&file.path);
    let slash = if file.kind == "directory" { "/" } else { "" };
    let size = |bytes: Option<u64>| bytes.map_or_else(|| file.kind.clone(), format::size);
    match file.change {
        PathChange::Added if file.new_bytes.is_some() => format!("A {path} {}", size(file.new_bytes)),
        PathChange::Added => format!("A {path}{slash}"),
        PathChange::Removed => format!("D {path}{slash}"),
        PathChange::Changed => {
            let what = format::tame(&file.what.join(", "));
            if file.old_bytes == file.new_bytes {
                format!("M {path}{slash} ({what})")
            } else {
                format!("M {path} {} -> {} ({what})", size(file.old_bytes), size(file.new_bytes))
            }
        }
    }
}

fn tame_but_tabs(text: &str) -> String {
    text.split('\t').map(format::tame).collect::<Vec<_>>().join("\t")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(change: PathChange, kind: &str, old: Option<u64>, new: Option<u64>, what: &[&str]) -> String {
        let what = what.iter().map(|word| (*word).to_owned()).collect();
        let path = "/etc/x\u{1b}[2J".to_owned();
        line(&ChangedPath { change, path, kind: kind.into(), old_bytes: old, new_bytes: new, what })
    }

    #[test]
    fn a_line_says_what_happened_to_a_file() {
        let path = "/etc/x\u{fffd}[2J";
        let lines = [
            (file(PathChange::Added, "file", None, Some(1024), &[]), "A PATH 1 KiB"),
            (file(PathChange::Added, "directory", None, None, &[]), "A PATH/"),
            (file(PathChange::Removed, "file", Some(3), None, &[]), "D PATH"),
            (
                file(PathChange::Changed, "file", Some(3), Some(5), &["content"]),
                "M PATH 3 B -> 5 B (content)",
            ),
            (file(PathChange::Changed, "file", Some(3), Some(3), &["mode", "owner"]), "M PATH (mode, owner)"),
            (
                file(PathChange::Changed, "directory", Some(3), None, &["type"]),
                "M PATH 3 B -> directory (type)",
            ),
        ];
        for (line, expected) in lines {
            assert_eq!(line, expected.replace("PATH", path));
        }
        assert_eq!(tame_but_tabs("+\ta\u{7}"), "+\ta\u{fffd}");
    }
}
