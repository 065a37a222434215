//! Every command in the README, the docs and the guide for contributors is one that nexusctl takes.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, Parser};

use super::args::Cli;

/// The README, the guide for contributors, and the pages of docs/ with its tutorials.
fn pages() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let docs = ["docs", "docs/tutorials"].map(|directory| fs::read_dir(root.join(directory)).unwrap());
    let docs = docs.into_iter().flatten().map(|entry| entry.unwrap().path());
    let pages = docs.filter(|path| path.extension().is_some_and(|end| end == "md"));
    pages
        .chain(["README.md", "CONTRIBUTING.md"].map(|page| root.join(page)))
        .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
        .collect()
}

/// The words of a line of shell up to its comment, pipe or redirection, without quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '#' | '|' | '<' | '>' | ';' if !quoted && word.is_none() => break,
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn examples_are_commands() {
    let mut count = 0;
    for (path, text) in pages() {
        let blocks = text.split("```").skip(1).step_by(2);
        for line in blocks.flat_map(str::lines).filter(|line| line.trim_start().starts_with("nexusctl ")) {
            // A placeholder, as in `nexusctl vm delete VM`.
            let placed = words(line).into_iter().map(|word| match word.strip_prefix("VM") {
                Some(rest) if rest.is_empty() || rest.starts_with(':') => format!("web-1{rest}"),
                _ => word,
            });
            if let Err(error) = Cli::try_parse_from(placed) {
                assert!(!error.use_stderr(), "{}: {line}\n{error}", path.display());
            }
            count += 1;
        }
    }
    assert!(count > 40, "{count} examples");
}

/// The command that words such as `vm create [NAME] --from IMAGE` name, below `command`.
fn named<'a>(command: &'a Command, words: &[&str]) -> Option<&'a Command> {
    let first = command.find_subcommand(words.first()?)?;
    Some(named(first, &words[1..]).unwrap_or(first))
}

#[test]
fn the_table_of_commands_has_commands_and_options_that_exist() {
    let cli = Cli::command();
    let page = pages().into_iter().find(|(path, _)| path.ends_with("docs/cli.md")).unwrap().1;
    let rows =
        page.lines().filter(|line| line.starts_with("| `")).map(|line| line.split(" | ").next().unwrap());
    let mut count = 0;
    for row in rows.filter(|row| !row.contains("\\|")) {
        let mut noun = None;
        for span in row.split('`').skip(1).step_by(2) {
            let words: Vec<&str> = span.split(' ').collect();
            // `vm list`, `inspect`: the second is of the same noun. An option alone is of any command.
            let found = named(&cli, &words).or_else(|| named(noun?, &words));
            let Some(found) = found else {
                let stands_for_several = span.contains('*');
                assert!(words[0].starts_with("--") || stands_for_several, "there is no command `{span}`");
                continue;
            };
            noun = cli.find_subcommand(words[0]).or(noun);
            for option in words.iter().map(|word| word.trim_matches(['[', ']', '.'])) {
                let Some(long) = option.strip_prefix("--").filter(|long| !long.is_empty()) else { continue };
                let long = long.split(['|', ']', '=']).next().unwrap();
                let has = |command: &Command| command.get_arguments().any(|arg| arg.get_long() == Some(long));
                assert!(has(found) || has(&cli), "`{span}` has no option --{long}");
            }
            count += 1;
        }
    }
    assert!(count > 60, "{count} commands");
}
