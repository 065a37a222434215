//! The page of commands: what docs/commands.md says is what nexusctl takes.

use std::fmt::Write as _;

use clap::{Arg, Command, CommandFactory};

use super::args::Cli;

#[path = "../../../tools-schema/tests/page/mod.rs"]
mod pages;

const HEAD: &str = "\
# Commands and options

Every command of `nexusctl` with its options, as `--help` has them. [The command line](cli.md) explains how they work together.
";

const FOOT: &str = "
<!-- Generated from host-mcp/src/ctl. After a change:
     INSTA_UPDATE=always cargo test --workspace --lib reference -->
";

/// A text in a cell of a table.
fn cell(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    let parts = line.split('`').enumerate().map(|(at, part)| match at % 2 {
        0 => part.replace('<', "&lt;"),
        _ => part.to_owned(),
    });
    parts.collect::<Vec<_>>().join("`")
}

/// How an argument is written.
fn written(arg: &Arg) -> String {
    let values: Vec<String> =
        arg.get_value_names().unwrap_or_default().iter().map(|name| name.to_string()).collect();
    let values = values.join(" ");
    if arg.is_positional() {
        return if values.is_empty() { arg.get_id().to_string().to_uppercase() } else { values };
    }
    let names = arg.get_short().map(|short| format!("-{short}")).into_iter();
    let names: Vec<String> = names.chain(arg.get_long().map(|long| format!("--{long}"))).collect();
    let takes_value = arg.get_action().takes_values() && !values.is_empty();
    if takes_value { format!("{} {values}", names.join(", ")) } else { names.join(", ") }
}

fn table(page: &mut String, args: &[&Arg]) {
    if args.is_empty() {
        return;
    }
    writeln!(page, "\n| | |\n|---|---|").unwrap();
    for arg in args {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        writeln!(page, "| `{}` | {} |", written(arg).replace('|', "\\|"), cell(&help)).unwrap();
    }
}

/// Whether an argument is of this command alone and meant for people.
fn is_own(arg: &&Arg) -> bool {
    !arg.is_global_set() && !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str())
}

fn describe(page: &mut String, command: &Command, path: &str) {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name());
        let heading = if sub.has_subcommands() { "##" } else { "###" };
        writeln!(page, "\n{heading} `{path}`\n").unwrap();
        writeln!(page, "{}", cell(&sub.get_about().map(ToString::to_string).unwrap_or_default())).unwrap();
        let aliases: Vec<String> = sub.get_visible_aliases().map(|alias| format!("`{alias}`")).collect();
        if !aliases.is_empty() {
            writeln!(page, "\nAlso: {}.", aliases.join(", ")).unwrap();
        }
        let (positional, options): (Vec<&Arg>, Vec<&Arg>) =
            sub.get_arguments().filter(is_own).partition(|arg| arg.is_positional());
        table(page, &positional);
        table(page, &options);
        describe(page, sub, &path);
    }
}

fn page() -> String {
    let mut cli = Cli::command();
    cli.build();
    let mut page = HEAD.to_owned();
    page.push_str("\n## Options of every command\n");
    let global: Vec<&Arg> =
        cli.get_arguments().filter(|arg| arg.is_global_set() && !arg.is_hide_set()).collect();
    table(&mut page, &global);
    describe(&mut page, &cli, "nexusctl");
    page.push_str(FOOT);
    page
}

#[test]
fn the_page_of_commands_is_what_nexusctl_takes() {
    pages::check("commands.md", "--lib reference", &page());
}

#[test]
fn every_command_and_option_has_a_description() {
    fn walk(command: &Command, path: &str) {
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let path = format!("{path} {}", sub.get_name());
            assert!(sub.get_about().is_some(), "{path} has no description");
            for arg in sub.get_arguments().filter(is_own) {
                assert!(arg.get_help().is_some(), "{path}: {} has no description", arg.get_id());
            }
            walk(sub, &path);
        }
    }
    walk(&Cli::command(), "nexusctl");
}
