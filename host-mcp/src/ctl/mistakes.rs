//! Invalid command lines: suggests what was probably meant, and reports errors as JSON for programs.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};
use nexus_schema::ByteSize;

use super::args::Cli;
use super::error::Error;

/// Option names of other tools with those used here; the first one that the command has is suggested.
const OPTIONS: &[(&[&str], &[&str])] = &[
    (&["image", "img", "base", "template"], &["from", "source"]),
    (&["from"], &["source"]),
    (&["source"], &["from"]),
    (&["cpus", "cpu", "vcpu", "cores"], &["vcpus"]),
    (&["mem", "ram"], &["memory"]),
    (&["disk", "storage", "disk-size"], &["disk", "size"]),
    (&["size"], &["disk"]),
    (&["label", "labels", "tags"], &["tag"]),
    (&["mount-point", "target", "path"], &["mount"]),
    (&["workdir", "working-dir", "dir", "directory"], &["cwd"]),
    (&["environment"], &["env"]),
    (&["background", "no-wait"], &["detach"]),
    (&["tail", "lines"], &["bytes"]),
    (&["packages"], &["package"]),
    (&["files"], &["file", "overlay"]),
];

/// Verbs of other tools with the commands that do the same here.
const VERBS: &[(&[&str], &str)] = &[
    (&["launch"], "nexusctl run IMAGE -- COMMAND, or nexusctl vm create"),
    (&["ssh", "enter", "connect", "login"], "nexusctl shell VM, nexusctl exec VM -- COMMAND"),
    (&["console"], "nexusctl vm console VM, or for a shell nexusctl shell VM"),
    (&["port-forward", "tunnel", "proxy"], "nexusctl forward VM [HOSTPORT:]PORT"),
    (&["copy", "push", "scp", "upload", "transfer"], "nexusctl cp FILE VM:PATH, nexusctl cp VM:PATH FILE"),
    (&["destroy", "del", "terminate"], "nexusctl rm VM"),
    (&["up", "boot"], "nexusctl start VM"),
    (&["down", "halt", "shutdown", "poweroff"], "nexusctl stop VM"),
    (&["reboot"], "nexusctl restart VM"),
    (&["top"], "nexusctl stats"),
    (&["console-log", "log"], "nexusctl logs VM"),
    (&["config"], "nexusctl settings get, nexusctl settings set KEY=VALUE"),
];

/// The maximum number of suggested commands.
const SUGGESTED: usize = 4;

/// Adds a suggestion.
pub(crate) fn explain(mut error: clap::Error, words: &[OsString]) -> clap::Error {
    let said = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (path, command) = command_of(words);
    let tips = match (error.kind(), said(ContextKind::InvalidArg), said(ContextKind::InvalidSubcommand)) {
        (ErrorKind::UnknownArgument, Some(option), _) => option_tips(&option, &path, &command),
        (ErrorKind::InvalidSubcommand, _, Some(verb)) => verb_tips(&verb, &path),
        (ErrorKind::ValueValidation, Some(option), _)
            if option.contains("--timeout") && has_short(words, 't') =>
        {
            vec![
                "-t is the timeout in seconds here; for a terminal: `nexusctl exec -it VM COMMAND`"
                    .to_owned(),
            ]
        }
        _ => Vec::new(),
    };
    if tips.is_empty() {
        return error;
    }
    // These suggestions are better than those by spelling.
    for kind in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand] {
        error.remove(kind);
    }
    let tips = tips.into_iter().map(Into::into).collect();
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    error
}

/// Turns it into an error of the command line: what is wrong, and what to do.
pub(crate) fn to_error(error: &clap::Error) -> Error {
    let text = error.render().to_string();
    let mut parts = text.split("\n\n");
    let message = parts.next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let tips = text.lines().filter_map(|line| line.trim_start().strip_prefix("tip: "));
    let usage =
        text.lines().find_map(|line| line.strip_prefix("Usage: ")).map(|usage| format!("usage: {usage}"));
    let hint: Vec<String> = tips.map(str::to_owned).chain(usage).collect();
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    Error::Usage { message, hint: (!hint.is_empty()).then(|| hint.join("; ")) }
}

/// Whether an invalid command line asks for JSON.
pub(crate) fn asks_for_json(words: &[OsString]) -> bool {
    words.iter().take_while(|word| *word != "--").any(|word| word == "--json")
}

/// Whether a line has an option of one letter, alone or with others, such as `-it`.
fn has_short(words: &[OsString], letter: char) -> bool {
    let own = words.iter().filter_map(|word| word.to_str()).take_while(|word| *word != "--");
    own.filter_map(|word| word.strip_prefix('-')).any(|word| !word.starts_with('-') && word.contains(letter))
}

/// The command at the beginning of a line, as far as it is valid.
fn command_of(words: &[OsString]) -> (Vec<String>, Command) {
    let mut command = Cli::command();
    let mut path = Vec::new();
    for word in words.iter().skip(1).filter_map(|word| word.to_str()).filter(|word| !word.starts_with('-')) {
        let Some(next) = command.find_subcommand(word).cloned() else { break };
        path.push(next.get_name().to_owned());
        command = next;
    }
    (path, command)
}

fn option_tips(option: &str, path: &[String], command: &Command) -> Vec<String> {
    let flag = option.trim_start_matches('-').split('=').next().unwrap_or_default();
    let is_run = path.last().is_some_and(|verb| verb == "run" || verb == "exec");
    if is_run && ["d", "detach"].contains(&flag) {
        return vec!["for a permanent VM: `nexusctl vm create --from IMAGE`".to_owned()];
    }
    let has = |name: &&&str| command.get_arguments().any(|arg| arg.get_long() == Some(**name));
    let meant =
        OPTIONS.iter().filter(|(words, _)| words.contains(&flag)).find_map(|(_, ours)| ours.iter().find(has));
    meant.map(|name| format!("here that is `--{name}`")).into_iter().collect()
}

fn verb_tips(verb: &str, path: &[String]) -> Vec<String> {
    let cli = Cli::command();
    let of_noun = |noun: &Command| {
        let verb = noun.find_subcommand(verb)?;
        (!noun.is_hide_set()).then(|| format!("`nexusctl {} {}`", noun.get_name(), verb.get_name()))
    };
    let mut meant: Vec<String> = cli.get_subcommands().filter_map(of_noun).take(SUGGESTED).collect();
    // After a noun, the noun may be superfluous.
    if !path.is_empty() && cli.find_subcommand(verb).is_some() {
        meant.insert(0, format!("`nexusctl {verb}`"));
    }
    let foreign = VERBS.iter().find(|(words, _)| words.contains(&verb)).map(|(_, ours)| (*ours).to_owned());
    // The parser itself suggests words with a similar spelling.
    match (meant.is_empty(), foreign) {
        (true, ours) => ours.into_iter().collect(),
        (false, _) => vec![format!("there is {}", meant.join(", "))],
    }
}

/// Parses an amount of memory.
pub(crate) fn memory(text: &str) -> Result<ByteSize, String> {
    size(text, "MiB")
}

/// Parses the size of a disk.
pub(crate) fn disk(text: &str) -> Result<ByteSize, String> {
    size(text, "GiB")
}

/// Parses a size. A small number without a unit is refused, because bytes cannot be meant.
fn size(text: &str, unit: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|e| format!("{e}"))?;
    let is_bare = text.trim().bytes().all(|b| b.is_ascii_digit());
    if is_bare && (1..1 << 20).contains(&size.as_bytes()) {
        let unit = if unit == "GiB" && size.as_bytes() >= 1024 { "MiB" } else { unit };
        return Err(format!("that is {} bytes; add a unit: {}{unit}", size.as_bytes(), text.trim()));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn told(line: &str) -> String {
        let words: Vec<OsString> =
            std::iter::once("nexusctl").chain(line.split_whitespace()).map(Into::into).collect();
        let error = Cli::try_parse_from(&words).map(|_| ()).unwrap_err();
        explain(error, &words).render().to_string()
    }

    #[test]
    fn options_of_other_tools_point_to_ours() {
        for (line, tip) in [
            ("drive create data --image debian", "here that is `--from`"),
            ("template create web --image debian", "here that is `--source`"),
            ("run --cores 2 debian -- true", "here that is `--vcpus`"),
            ("vm create --ram 1G", "here that is `--memory`"),
            ("vm create --size 10G", "here that is `--disk`"),
            ("drive create --disk 10G", "here that is `--size`"),
            ("vm create --label a=b", "here that is `--tag`"),
            ("run -d debian -- true", "`nexusctl vm create --from IMAGE`"),
            ("guest run -it web-1 sh", "for a terminal: `nexusctl exec -it"),
        ] {
            assert!(told(line).contains(tip), "{line}: {}", told(line));
        }
        for line in ["wait web-1 --timeout 3", "guest run --timeout x web-1 ls"] {
            assert!(!told(line).contains("terminal"), "{line}: {}", told(line));
        }
        // These are accepted as they are.
        for line in ["vm create --image debian", "vm create --cpus 2", "run --cpus 2 debian -- true"] {
            let words = std::iter::once("nexusctl").chain(line.split_whitespace());
            Cli::try_parse_from(words).unwrap();
        }
    }

    #[test]
    fn verbs_are_found_where_they_are() {
        for (line, tip) in [
            ("create", "there is `nexusctl vm create`"),
            ("attach data web-1", "there is `nexusctl drive attach`"),
            ("launch", "nexusctl run IMAGE"),
            ("ssh web-1", "nexusctl shell VM"),
            ("vm pull alpine", "`nexusctl pull`"),
            ("vm lst", "'list'"),
            ("imag list", "'image'"),
            ("vm strat web-1", "'start'"),
        ] {
            assert!(told(line).contains(tip), "{line}: {}", told(line));
        }
    }

    #[test]
    fn a_number_without_unit_asks_for_one() {
        for (line, tip) in [
            ("vm create --memory 512", "add a unit: 512MiB"),
            ("vm create -m 2", "add a unit: 2MiB"),
            ("vm create --disk 10", "add a unit: 10GiB"),
            ("drive create --size 4096", "add a unit: 4096MiB"),
            ("drive resize data 20", "add a unit: 20GiB"),
        ] {
            assert!(told(line).contains(tip), "{line}: {}", told(line));
        }
        assert_eq!(memory("536870912").unwrap(), ByteSize::mib(512));
        assert_eq!(disk("10G").unwrap(), ByteSize::gib(10));
        assert_eq!(disk("0").unwrap(), ByteSize::bytes(0));
    }

    #[test]
    fn programs_get_the_mistake_and_what_to_do() {
        let words: Vec<OsString> =
            ["nexusctl", "drive", "create", "--image", "debian", "--json"].map(Into::into).into();
        let error = explain(Cli::try_parse_from(&words).map(|_| ()).unwrap_err(), &words);
        let Error::Usage { message, hint } = to_error(&error) else { panic!("not a usage error") };
        assert_eq!(message, "unexpected argument '--image' found");
        let hint = hint.unwrap();
        assert!(hint.starts_with("here that is `--from`; usage: nexusctl drive create"), "{hint}");
        assert!(asks_for_json(&words));
        assert!(!asks_for_json(&["nexusctl", "exec", "a", "--", "--json"].map(Into::into)));
    }
}
