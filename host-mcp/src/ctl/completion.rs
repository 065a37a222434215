//! `nexusctl completion`: scripts for shells. They call nexusctl itself while a line is typed, so that it can offer existing names.

use std::ffi::{OsStr, OsString};
use std::time::Duration;

use clap::{Command, CommandFactory};
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{Bash, CompleteEnv, EnvCompleter, Fish, Zsh};
use nexus_schema::Tool;
use nexus_schema::tools::asset::{AssetList, AssetListParams};
use nexus_schema::tools::drive::{DriveList, DriveListParams};
use nexus_schema::tools::image::{ImageList, ImageListParams};
use nexus_schema::tools::op::{OpList, OpListParams, OpState};
use nexus_schema::tools::provider::{ProviderList, ProviderListParams};
use nexus_schema::tools::template::{TemplateList, TemplateListParams};
use nexus_schema::tools::vm::{VmList, VmListParams};
use serde_json::{Map, Value};

use super::App;
use super::args::Cli;
use super::client::{Client, Options};
use super::error::Error;
use crate::dirs;

/// The variable by which a shell's script asks.
const ASKED: &str = "NEXUSCTL_COMPLETE";
/// The name of the program.
const NAME: &str = "nexusctl";
/// The timeout for the daemon, short because somebody waits at the keyboard.
const PATIENCE: Duration = Duration::from_secs(2);
/// The maximum number of suggestions.
const OFFERED: u32 = 200;
/// The prefixes of sources, and complete sources.
const SOURCES: [&str; 9] = [
    "debian",
    "busybox",
    "oci:",
    "rootfs:",
    "image:",
    "template:",
    "file:",
    "docker-archive:",
    "oci-layout:",
];

/// For which shell.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["bash", "zsh", "fish"]))]
    shell: String,
}

/// Prints the script.
pub(crate) fn run(app: &App, args: Args) -> Result<u8, Error> {
    app.ui.bytes(&script(&args.shell)?)?;
    if app.ui.stdout_is_terminal {
        app.ui.say(&format!("# {}", how_to(&args.shell)));
    }
    Ok(0)
}

/// Answers a shell's request for completions and ends this process; does nothing if no shell asks.
pub(crate) fn answer() {
    if std::env::var_os(ASKED).is_some() {
        CompleteEnv::with_factory(command).var(ASKED).bin(NAME).completer(NAME).complete();
    }
}

fn script(shell: &str) -> Result<Vec<u8>, Error> {
    let completer: &dyn EnvCompleter = match shell {
        "bash" => &Bash,
        "zsh" => &Zsh,
        "fish" => &Fish,
        other => return Err(Error::usage(format!("no completion for {other}"))),
    };
    let mut script = Vec::new();
    completer
        .write_registration(ASKED, NAME, NAME, NAME, &mut script)
        .map_err(|source| Error::Output { source })?;
    if shell == "bash" {
        // Otherwise bash splits oci:NAME into three words.
        script.extend_from_slice(b"COMP_WORDBREAKS=${COMP_WORDBREAKS//:/}\n");
    }
    Ok(script)
}

fn how_to(shell: &str) -> &'static str {
    match shell {
        "zsh" => "to install it: nexusctl completion zsh > ~/.zfunc/_nexusctl, with ~/.zfunc in fpath",
        "fish" => "to install it: nexusctl completion fish > ~/.config/fish/completions/nexusctl.fish",
        _ => "to install it: nexusctl completion bash > ~/.local/share/bash-completion/completions/nexusctl",
    }
}

/// The command line with completers for its arguments.
fn command() -> Command {
    knowing(Cli::command())
}

fn knowing(command: Command) -> Command {
    let command = command.mut_args(|arg| match arg.get_id().as_str() {
        "vm" | "vms" => arg.add(ArgValueCandidates::new(vms)),
        "drive" | "drives" => arg.add(ArgValueCandidates::new(drives)),
        "image" | "images" => arg.add(ArgValueCandidates::new(images)),
        "template" => arg.add(ArgValueCandidates::new(templates)),
        "from" | "from_option" | "source" => arg.add(ArgValueCandidates::new(sources)),
        "kernel" => arg.add(ArgValueCandidates::new(kernels)),
        "asset" => arg.add(ArgValueCandidates::new(assets)),
        "provider" => arg.add(ArgValueCandidates::new(providers)),
        "op" => arg.add(ArgValueCandidates::new(ops)),
        "src" | "dst" => arg.add(ArgValueCompleter::new(ends)),
        _ => arg,
    });
    command.mut_subcommands(knowing)
}

fn vms() -> Vec<CompletionCandidate> {
    let params = VmListParams { limit: Some(OFFERED), ..VmListParams::default() };
    offered::<VmList>(&params, "vms", "name", "state")
}

/// The arguments of `cp`: a local path, or a VM followed by a path.
fn ends(current: &OsStr) -> Vec<CompletionCandidate> {
    let is_meant = |word: &OsStr| word.as_encoded_bytes().starts_with(current.as_encoded_bytes());
    let vms = vms().into_iter().filter_map(|vm| {
        let mut word = vm.get_value().to_owned();
        word.push(":");
        is_meant(&word).then(|| CompletionCandidate::new(word).help(vm.get_help().cloned()))
    });
    let mut all = PathCompleter::any().complete(current);
    all.extend(vms);
    all
}

fn drives() -> Vec<CompletionCandidate> {
    let params = DriveListParams { limit: Some(OFFERED), ..DriveListParams::default() };
    offered::<DriveList>(&params, "drives", "name", "size")
}

fn images() -> Vec<CompletionCandidate> {
    let params = ImageListParams { limit: Some(OFFERED), ..ImageListParams::default() };
    offered::<ImageList>(&params, "images", "name", "source")
}

fn templates() -> Vec<CompletionCandidate> {
    let params = TemplateListParams { limit: Some(OFFERED), ..TemplateListParams::default() };
    offered::<TemplateList>(&params, "templates", "name", "source")
}

fn assets() -> Vec<CompletionCandidate> {
    let params =
        AssetListParams { available: Some(false), limit: Some(OFFERED), ..AssetListParams::default() };
    offered::<AssetList>(&params, "assets", "name", "version")
}

fn kernels() -> Vec<CompletionCandidate> {
    let kind = Some(nexus_schema::tools::asset::AssetKind::Kernel);
    let params = AssetListParams { kind, available: Some(false), limit: Some(OFFERED), cursor: None };
    offered::<AssetList>(&params, "assets", "name", "version")
}

fn providers() -> Vec<CompletionCandidate> {
    offered::<ProviderList>(&ProviderListParams::default(), "providers", "name", "about")
}

fn ops() -> Vec<CompletionCandidate> {
    let params = OpListParams { state: Some(OpState::Running), limit: Some(OFFERED), cursor: None };
    offered::<OpList>(&params, "ops", "op_id", "tool")
}

/// Everything that `--from` accepts.
fn sources() -> Vec<CompletionCandidate> {
    let of = |form: &str, all: Vec<CompletionCandidate>| -> Vec<CompletionCandidate> {
        all.into_iter().map(|candidate| candidate.add_prefix(form)).collect()
    };
    let words = SOURCES.iter().map(|word| CompletionCandidate::new(*word));
    let mut all: Vec<CompletionCandidate> = words.chain(images()).collect();
    all.extend(of("template:", templates()));
    all.sort();
    all.dedup_by(|a, b| a.get_value() == b.get_value());
    all
}

/// The items of a list of the daemon by name, each with a description. Empty if no daemon is running.
fn offered<T: Tool>(params: &T::Params, key: &str, name: &str, about: &str) -> Vec<CompletionCandidate> {
    let rows = ask::<T>(params, key).unwrap_or_default();
    rows.iter()
        .filter_map(|row| {
            let about = row.get(about).and_then(Value::as_str).map(|about| super::format::tame(about).into());
            Some(CompletionCandidate::new(row.get(name)?.as_str()?.to_owned()).help(about))
        })
        .collect()
}

fn ask<T: Tool>(params: &T::Params, key: &str) -> Option<Vec<Value>> {
    let uid = rustix::process::geteuid().as_raw();
    let socket = match socket_of(std::env::args_os()) {
        Some(socket) => socket.into(),
        None => dirs::socket(uid, &dirs::environment(uid)).ok()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    runtime.block_on(async {
        let asked = async {
            let mut client = Client::connect(&socket).await.ok()?;
            let options = Options { deadline: PATIENCE, progress: None };
            let reply = client.call_with::<T>(params, options).await.ok()?;
            let mut facts: Map<String, Value> = reply.facts(T::NAME, T::SHAPE).ok()?;
            match facts.remove(key)? {
                Value::Array(rows) => Some(rows),
                _ => None,
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
    })
}

/// The socket in the line that is being typed.
fn socket_of(words: impl Iterator<Item = OsString>) -> Option<OsString> {
    let mut words = words.skip_while(|word| word != "--").skip(1);
    while let Some(word) = words.next() {
        if word == "--socket" {
            return words.next();
        }
        if let Some(path) = word.to_str().and_then(|word| word.strip_prefix("--socket=")) {
            return Some(path.into());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_ask_nexusctl() {
        for shell in ["bash", "zsh", "fish"] {
            let script = String::from_utf8(script(shell).unwrap()).unwrap();
            assert!(script.contains(ASKED) && script.contains(NAME), "{shell}: {script}");
        }
    }

    #[test]
    fn every_name_in_the_command_line_knows_what_there_is() {
        let known = |path: &[&str], arg: &str| {
            let mut command = command();
            for word in path {
                command = command.find_subcommand(word).unwrap().clone();
            }
            let arg = command.get_arguments().find(|a| a.get_id() == arg).unwrap().clone();
            arg.get::<ArgValueCandidates>().is_some() || arg.get::<ArgValueCompleter>().is_some()
        };
        for (path, arg) in [
            (&["vm", "start"][..], "vms"),
            (&["start"], "vms"),
            (&["logs"], "vm"),
            (&["guest", "run"], "vm"),
            (&["exec"], "vm"),
            (&["cp"], "src"),
            (&["cp"], "dst"),
            (&["mcp"], "vm"),
            (&["vm", "create"], "from"),
            (&["vm", "create"], "kernel"),
            (&["vm", "from-image"], "image"),
            (&["vm", "from-template"], "template"),
            (&["drive", "create"], "from"),
            (&["drive", "attach"], "drive"),
            (&["drive", "attach"], "vm"),
            (&["image", "delete"], "images"),
            (&["image", "create"], "from"),
            (&["run"], "image"),
            (&["template", "inspect"], "template"),
            (&["op", "cancel"], "op"),
        ] {
            assert!(known(path, arg), "{path:?} {arg}");
        }
    }

    #[test]
    fn the_socket_is_that_of_the_line() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>().into_iter();
        assert_eq!(socket_of(words("nexusctl -- nexusctl vm start")), None);
        assert_eq!(socket_of(words("nexusctl -- nexusctl --socket /x vm")), Some("/x".into()));
        assert_eq!(socket_of(words("nexusctl -- nexusctl --socket=/y vm")), Some("/y".into()));
    }
}
