//! Hints speak of tools, for agents. At a shell the same things are commands.

use clap::CommandFactory;
use nexus_schema::tools;

use super::args::Cli;

/// The guest's tools as commands.
const GUEST: &[(&str, &str)] = &[
    ("run_command", "guest run"),
    ("file_read", "guest read"),
    ("file_write", "guest write"),
    ("file_list", "guest ls"),
    ("file_stat", "guest stat"),
    ("file_delete", "guest rm"),
    ("os_info", "guest info"),
    ("command_start", "call guest_command_start"),
    ("command_output", "call guest_command_output"),
    ("command_input", "call guest_command_input"),
    ("command_signal", "call guest_command_signal"),
    ("command_list", "call guest_command_list"),
];

/// Arguments that hints give behind a tool's name, as options behind the command.
const OPTIONS: &[(&str, &str)] = &[
    (" with force: true", " --force"),
    (" with protected: false", " --unprotect"),
    (" with wait_s", " --wait"),
];

/// Arguments that hints name alone.
const WORDS: &[(&str, &str)] =
    &[("unverified: true", "--unverified"), ("recursive: true", "--recursive"), ("timeout_s", "--timeout")];

/// A hint in the words of the command line.
pub(crate) fn for_shell(hint: &str) -> String {
    let mut said = String::with_capacity(hint.len());
    let mut rest = hint;
    while let Some(start) = rest.find(is_of_name) {
        let (before, from) = rest.split_at(start);
        let (name, after) = from.split_at(from.find(|c| !is_of_name(c)).unwrap_or(from.len()));
        said.push_str(before);
        rest = after;
        let Some(command) = command(name) else {
            said.push_str(name);
            continue;
        };
        if said.ends_with("call ") {
            said.truncate(said.len() - "call ".len());
            said.push_str("run ");
        }
        said.push_str(&format!("`nexusctl {command}"));
        if let Some((words, option)) = OPTIONS.iter().find(|(words, _)| rest.starts_with(words)) {
            said.push_str(option);
            rest = &rest[words.len()..];
        }
        said.push('`');
    }
    said.push_str(rest);
    WORDS.iter().fold(said, |said, (word, option)| said.replace(word, option))
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_lowercase() || c == '_'
}

/// The command that calls a tool.
fn command(tool: &str) -> Option<String> {
    let in_guest = tool.strip_prefix("guest_").unwrap_or(tool);
    if let Some((_, command)) = GUEST.iter().find(|(name, _)| *name == in_guest) {
        return Some((*command).to_owned());
    }
    if !tools::host().iter().any(|info| info.name == tool) {
        return None;
    }
    if tool == "system_info" {
        return Some("status".to_owned());
    }
    let own = tool.split_once('_').filter(|(noun, verb)| {
        let cli = Cli::command();
        cli.find_subcommand(noun).is_some_and(|noun| noun.find_subcommand(verb).is_some())
    });
    Some(own.map_or_else(|| format!("call {tool}"), |(noun, verb)| format!("{noun} {verb}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_become_commands() {
        for (hint, said) in [
            ("call vm_list to see the VMs", "run `nexusctl vm list` to see the VMs"),
            (
                "call vm_stop first, or vm_delete with force: true to cut its power",
                "run `nexusctl vm stop` first, or `nexusctl vm delete --force` to cut its power",
            ),
            (
                "call vm_update with protected: false first, if it really may go",
                "run `nexusctl vm update --unprotect` first, if it really may go",
            ),
            ("look at vm_logs and system_info", "look at `nexusctl vm logs` and `nexusctl status`"),
            ("call guest_file_list", "run `nexusctl guest ls`"),
            ("give recursive: true to delete it whole", "give --recursive to delete it whole"),
            ("free some room, then try again", "free some room, then try again"),
            ("install the package e2fsprogs", "install the package e2fsprogs"),
        ] {
            assert_eq!(for_shell(hint), said);
        }
    }

    #[test]
    fn every_tool_has_its_command() {
        for info in tools::host().into_iter().chain(tools::guest()).chain(tools::guest_on_host()) {
            let command = command(&info.name).unwrap_or_else(|| panic!("no command for {}", info.name));
            let noun = command.split(' ').next().expect("a command has a word");
            assert!(Cli::command().find_subcommand(noun).is_some(), "{command}");
        }
    }
}
