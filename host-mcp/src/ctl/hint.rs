//! Translates hints: they name tools, for agents; at a shell they must name commands.

use std::path::Path;

use clap::CommandFactory;
use nexus_schema::ToolError;
use nexus_schema::tools::{GUEST_NAMES, HOST_NAMES};
use serde_json::{Map, Value};

use super::args::Cli;

/// The guest's tools with their commands.
const GUEST: &[(&str, &str)] = &[
    ("run_command", "guest run"),
    ("file_read", "guest read"),
    ("file_write", "guest write"),
    ("file_list", LS),
    ("file_stat", "guest stat"),
    ("file_delete", "guest rm"),
    ("os_info", "guest info"),
];

/// Arguments after a tool's name in hints, with the options of the command.
const OPTIONS: &[(&str, &str)] = &[
    (" with force: true", " --force"),
    (" with protected: false", " --unprotect"),
    (" with wait_s", " --wait"),
    (" with checkpoints: true", " --checkpoints"),
];

/// A call that has a command of its own.
const CHECK: (&str, &str) =
    ("call kernel_build with check: true", "run `nexusctl kernel version-check VERSION`");

/// Arguments that hints name alone.
const WORDS: &[(&str, &str)] =
    &[("unverified: true", "--unverified"), ("recursive: true", "--recursive"), ("timeout_s", "--timeout")];

/// The kind of a directory in the VM.
const DIRECTORY: &str = "directory";
/// The command that lists a directory in a VM.
const LS: &str = "guest ls";

/// What a call concerned: names and ids by kind, such as `vm`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct About(Vec<(String, String)>);

/// The kinds of arguments that name something.
const NOUNS: [&str; 7] = ["vm", "drive", "image", "template", "build", "asset", "provider"];

impl About {
    /// What the arguments of a call name.
    pub(crate) fn of(arguments: &Map<String, Value>) -> Self {
        let named = |noun: &&str| Some(((*noun).to_owned(), arguments.get(*noun)?.as_str()?.to_owned()));
        let is_plain = |(_, name): &(String, String)| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        };
        Self(NOUNS.iter().filter_map(named).filter(is_plain).collect())
    }

    /// The same for a call that failed so, with the directory in which its path can be looked for.
    pub(crate) fn where_failed(mut self, error: &ToolError, arguments: &Map<String, Value>) -> Self {
        let Some(path) = arguments.get("path").and_then(Value::as_str) else { return self };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
        if path.starts_with('/') && path.chars().all(is_plain) {
            let parent = Path::new(path).parent().and_then(Path::to_str).unwrap_or("/");
            let directory = if error.errno.as_deref() == Some("EISDIR") { path } else { parent };
            self.0.push((DIRECTORY.to_owned(), directory.to_owned()));
        }
        self
    }

    /// What a tool's operation works on.
    pub(crate) fn subject(tool: &str, name: Option<&str>) -> Self {
        let noun = tool.split('_').next().unwrap_or_default();
        Self(name.map(|name| (noun.to_owned(), name.to_owned())).into_iter().collect())
    }

    fn name(&self, noun: &str) -> Option<&str> {
        self.0.iter().find(|(of, _)| of == noun).map(|(_, name)| name.as_str())
    }
}

/// A hint with commands instead of tools.
pub(crate) fn for_shell(hint: &str, about: &About) -> String {
    let mut said = String::with_capacity(hint.len());
    let hint = hint.replace(CHECK.0, CHECK.1);
    let mut rest = hint.as_str();
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
        if let Some((checkpoint, after)) = given(rest, "checkpoint") {
            said.push_str(&format!(" --checkpoint {checkpoint}"));
            rest = after;
        } else if let Some((name, after)) = given(rest, "vm") {
            said.push_str(&format!(" {name}"));
            rest = after;
        } else if let Some(name) = subject_of(&command, about) {
            said.push_str(&format!(" {name}"));
            if let Some(directory) = about.name(DIRECTORY).filter(|_| command == LS) {
                said.push_str(&format!(" {directory}"));
            }
        }
        if let Some((words, option)) = OPTIONS.iter().find(|(words, _)| rest.starts_with(words)) {
            said.push_str(option);
            rest = &rest[words.len()..];
        }
        said.push('`');
    }
    said.push_str(rest);
    WORDS.iter().fold(said, |said, (word, option)| said.replace(word, option))
}

/// The name in ` with vm: NAME` at the start of a text, for the argument `vm`, and the text behind it.
fn given<'a>(text: &'a str, argument: &str) -> Option<(&'a str, &'a str)> {
    let from = text.strip_prefix(" with ")?.strip_prefix(argument)?.strip_prefix(": ")?;
    let end = from.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(from.len());
    Some(from.split_at(end))
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
    if GUEST_NAMES.contains(&in_guest) {
        return Some(format!("call guest_{in_guest}"));
    }
    if !HOST_NAMES.contains(&tool) {
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

/// The name to add after a command, if known.
fn subject_of<'a>(command: &str, about: &'a About) -> Option<&'a str> {
    let (noun, verb) = command.split_once(' ')?;
    let of = if noun == "guest" { "vm" } else { noun };
    let name = about.name(of)?;
    let cli = Cli::command();
    let verb = cli.find_subcommand(noun)?.find_subcommand(verb)?;
    let plural = format!("{of}s");
    verb.get_positionals().any(|arg| arg.get_id() == of || *arg.get_id() == *plural).then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use nexus_schema::{ErrorCode, tools};

    use super::*;

    #[test]
    fn hints_carry_the_name_that_was_used() {
        let about = |arguments: Value| About::of(arguments.as_object().unwrap());
        let vm = about(json!({ "vm": "web-1", "force": true }));
        for (hint, said) in [
            ("call vm_start", "run `nexusctl vm start web-1`"),
            ("call vm_list to see the VMs", "run `nexusctl vm list` to see the VMs"),
            (
                "call vm_stop first, or vm_delete with force: true to cut its power",
                "run `nexusctl vm stop web-1` first, or `nexusctl vm delete web-1 --force` to cut its power",
            ),
            ("call vm_update with protected: false", "run `nexusctl vm update web-1 --unprotect`"),
            (
                "look at vm_logs; call guest_run_command",
                "look at `nexusctl vm logs web-1`; run `nexusctl guest run web-1`",
            ),
            ("call drive_detach", "run `nexusctl drive detach`"),
            ("call vm_stop with vm: db-2 first", "run `nexusctl vm stop db-2` first"),
            (
                "call vm_fork with checkpoint: abc234 to make a VM of it",
                "run `nexusctl vm fork --checkpoint abc234` to make a VM of it",
            ),
        ] {
            assert_eq!(for_shell(hint, &vm), said);
        }
        assert_eq!(
            for_shell("call image_delete", &about(json!({ "image": "a b" }))),
            "run `nexusctl image delete`"
        );
        let begun = About::subject("vm_create", Some("web-2"));
        assert_eq!(for_shell("look at vm_logs", &begun), "look at `nexusctl vm logs web-2`");
    }

    #[test]
    fn a_hint_to_list_a_directory_names_it() {
        for (path, errno, said) in [
            ("/srv/app/x", "ENOENT", "run `nexusctl guest ls web-1 /srv/app`"),
            ("/nope", "ENOENT", "run `nexusctl guest ls web-1 /`"),
            ("/srv", "EISDIR", "run `nexusctl guest ls web-1 /srv`"),
            ("/", "EISDIR", "run `nexusctl guest ls web-1 /`"),
            ("/a b/c", "ENOENT", "run `nexusctl guest ls web-1`"),
        ] {
            let arguments = json!({ "vm": "web-1", "path": path });
            let arguments = arguments.as_object().unwrap();
            let error = ToolError::new(ErrorCode::FileNotFound, "x").errno(errno);
            let about = About::of(arguments).where_failed(&error, arguments);
            assert_eq!(for_shell("call guest_file_list", &about), said, "{path}");
            assert_eq!(for_shell("call vm_start", &about), "run `nexusctl vm start web-1`");
        }
    }

    #[test]
    fn tools_become_commands() {
        for (hint, said) in [
            ("call vm_list to see the VMs", "run `nexusctl vm list` to see the VMs"),
            (
                "call vm_stop first, or vm_delete with force: true to cut its power",
                "run `nexusctl vm stop` first, or `nexusctl vm delete --force` to cut its power",
            ),
            (
                "call vm_update with protected: false first, if you really want to delete it",
                "run `nexusctl vm update --unprotect` first, if you really want to delete it",
            ),
            ("look at vm_logs and system_info", "look at `nexusctl vm logs` and `nexusctl status`"),
            ("call guest_file_list", "run `nexusctl guest ls`"),
            (
                "vm_create with checkpoints: true; on the host: `nexusctl settings set default.checkpoints=true`",
                "`nexusctl vm create --checkpoints`; on the host: `nexusctl settings set default.checkpoints=true`",
            ),
            ("call kernel_build first", "run `nexusctl kernel build` first"),
            (
                "call kernel_build with check: true to see more",
                "run `nexusctl kernel version-check VERSION` to see more",
            ),
            ("give recursive: true to delete it whole", "give --recursive to delete it whole"),
            ("free some space, then try again", "free some space, then try again"),
            ("install the package e2fsprogs", "install the package e2fsprogs"),
        ] {
            assert_eq!(for_shell(hint, &About::default()), said);
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
