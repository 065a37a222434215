//! The tutorials of the book, word by word: what a page tells its reader to type is run by a shell, and what the page shows as output has to
//! appear.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::daemon::{Daemon, program, signal};

/// What stands for anything in an output.
const ANYTHING: char = '…';
/// Begins a line between the outputs of two steps.
const MARK: &str = "@@ step ";

/// A block of commands, and the lines that follow it on the page as output.
#[derive(Debug, PartialEq)]
struct Step {
    commands: String,
    shown: Vec<String>,
}

/// The steps of a page. An output belongs to the commands right before it; blocks of other kinds are not looked at.
fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut block: Option<(&str, Vec<&str>)> = None;
    let mut follows = false;
    for line in page.lines() {
        let fence = line.strip_prefix("```");
        match (block.take(), fence) {
            (None, Some(kind)) => block = Some((kind, Vec::new())),
            (None, None) => follows &= line.is_empty(),
            (Some((kind, mut lines)), None) => {
                lines.push(line);
                block = Some((kind, lines));
            }
            (Some((kind, lines)), Some(_)) => {
                match kind {
                    "sh" => steps.push(Step { commands: lines.join("\n"), shown: Vec::new() }),
                    "text" if follows => {
                        if let Some(step) = steps.last_mut() {
                            step.shown = lines.into_iter().map(str::to_owned).collect();
                        }
                    }
                    _ => {}
                }
                follows = kind == "sh";
            }
        }
    }
    steps
}

/// Whether a line is as shown.
fn is_as_shown(line: &str, shown: &str) -> bool {
    let mut parts = shown.split(ANYTHING);
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, between)) = parts.split_last() else { return rest.is_empty() };
    for part in between {
        let Some(at) = rest.find(*part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(*last)
}

/// The first shown line that an output does not have, in the order shown.
fn missing<'a>(output: &str, shown: &'a [String]) -> Option<&'a String> {
    let mut lines = output.lines();
    shown.iter().find(|shown| !lines.any(|line| is_as_shown(line.trim_end(), shown.trim_end())))
}

/// Where the tutorials are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tutorials")
}

/// A directory in which a tutorial is followed. Processes that still work in it at the end are killed.
#[derive(Debug)]
pub struct Place(tempfile::TempDir);

impl Default for Place {
    fn default() -> Self {
        Self(tempfile::Builder::new().prefix("nexus-tutorial-").tempdir().expect("a directory"))
    }
}

impl Place {
    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Does what a page says, as a client of the daemon. The page has to leave no VM behind.
    pub fn follow(&self, name: &str, daemon: &Daemon) {
        let page = fs::read_to_string(directory().join(name)).expect("the page is there");
        let steps = steps(&page);
        assert!(steps.len() >= 3, "{name} has {} steps", steps.len());
        let mut script = "set -e -o pipefail\nexec 2>&1\n".to_owned();
        for (number, step) in steps.iter().enumerate() {
            script.push_str(&format!("echo '{MARK}{number}'\n{}\n", step.commands));
        }
        let nexusctl = program("nexusctl");
        let own = nexusctl.parent().expect("a program is in a directory").display().to_string();
        let path = std::env::var("PATH").map_or(own.clone(), |path| format!("{own}:{path}"));
        let mut shell = Command::new("bash");
        shell.arg("-c").arg(script).current_dir(self.path()).stdin(Stdio::null());
        shell
            .envs(daemon.environment())
            .env("PATH", path)
            .env_remove("NEXUS_TOKEN")
            .env_remove("NEXUS_SOCKET");
        let done = shell.output().expect("bash runs");
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{name} ends with {}:\n{said}", done.status);
        let outputs: Vec<&str> = said.split(MARK).skip(1).collect();
        assert_eq!(outputs.len(), steps.len(), "{said}");
        for (step, output) in steps.iter().zip(outputs) {
            if let Some(line) = missing(output, &step.shown) {
                panic!("{name}: {line:?} is not in the output of\n{}\nwhich is\n{output}", step.commands);
            }
        }
        let left = daemon.client().must("vm_list", serde_json::json!({}));
        assert_eq!(left["vms"].as_array().map(Vec::len), Some(0), "{name} cleans up: {left}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        for pid in pids {
            let works_in = fs::read_link(format!("/proc/{pid}/cwd"));
            if works_in.is_ok_and(|works_in| works_in.starts_with(self.path())) {
                signal(pid, Signal::KILL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_as_steps_and_outputs_are_compared() {
        let page = "# A\n\n```sh\necho a\n```\n\n```text\na\n```\n\nthen\n\n```text\nnot an output\n```\n\n```sh\ntrue\n```\n";
        let step = |commands: &str, shown: &[&str]| Step {
            commands: commands.to_owned(),
            shown: shown.iter().map(|line| (*line).to_owned()).collect(),
        };
        assert_eq!(steps(page), [step("echo a", &["a"]), step("true", &[])]);
        for (line, shown, is) in [
            ("a b c", "a b c", true),
            ("a b c", "a b", false),
            ("a b c", "a…", true),
            ("a b c", "…c", true),
            ("a b c", "a…c", true),
            ("a b c", "…b…", true),
            ("a b c", "…d…", false),
            ("a", "…", true),
            ("", "", true),
        ] {
            assert_eq!(is_as_shown(line, shown), is, "{line:?} {shown:?}");
        }
        let shown = ["a".to_owned(), "c".to_owned()];
        assert_eq!((missing("a\nb\nc\n", &shown), missing("c\na\n", &shown)), (None, Some(&shown[1])));
    }
}
