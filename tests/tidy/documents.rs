//! Checks that everything the documents refer to exists.

use std::collections::BTreeSet;

use crate::source::{files, root, rust, text};
use crate::{Finding, none};

fn documents() -> impl Iterator<Item = (&'static str, String)> {
    files()
        .iter()
        .filter(|file| file.ends_with(".md"))
        .map(|file| (file.as_str(), text(file).expect("a document is text")))
}

/// The documents' lines with file and number.
fn lines() -> Vec<(&'static str, usize, String)> {
    documents()
        .flat_map(|(file, text)| {
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.into_iter().enumerate().map(move |(at, line)| (file, at + 1, line))
        })
        .collect()
}

/// The anchors of a document's headings, as forges make them.
fn anchors(document: &str) -> BTreeSet<String> {
    let mut is_code = false;
    let mut anchors = BTreeSet::new();
    for line in document.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
        }
        let title = line.trim_start_matches('#').trim();
        if !is_code && line.starts_with('#') && !title.is_empty() {
            let letters = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            let anchor: String = letters.map(|c| if c == ' ' { '-' } else { c }).collect();
            anchors.insert(anchor.to_lowercase());
        }
    }
    anchors
}

#[test]
fn links_lead_somewhere() {
    let mut findings = Vec::new();
    for (file, number, line) in lines() {
        let own = root().join(file);
        let directory = own.parent().expect("a file is in a directory");
        for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            if path.contains("://") || path.starts_with("mailto:") {
                continue;
            }
            let place = if path.is_empty() { own.clone() } else { directory.join(path) };
            let is_anchored = target.contains(".md#") || target.starts_with('#');
            let has_anchor = || {
                let document = std::fs::read_to_string(&place).unwrap_or_default();
                anchors(&document).contains(anchor)
            };
            if !place.exists() || (is_anchored && !has_anchor()) {
                findings.push(Finding {
                    file: file.to_owned(),
                    line: number,
                    what: format!("{target} does not exist"),
                });
            }
        }
    }
    none("links in documents lead somewhere", findings);
}

#[test]
fn make_targets_exist() {
    let makefile = text("Makefile").expect("the Makefile is text");
    let targets: Vec<&str> = makefile
        .lines()
        .filter(|line| !line.starts_with([' ', '\t', '.', '#']))
        .filter_map(|line| line.split_once(':').map(|(target, _)| target))
        .collect();
    let mut findings = Vec::new();
    for (file, number, line) in lines() {
        for rest in line.split("`make ").skip(1).chain(line.strip_prefix("make ")) {
            let target = rest.split(['`', ' ', '#']).next().unwrap_or_default();
            if !targets.contains(&target) {
                findings.push(Finding {
                    file: file.to_owned(),
                    line: number,
                    what: format!("there is no make {target}"),
                });
            }
        }
    }
    none("documents name targets that the Makefile has", findings);
}

/// The spans of code in a line.
fn code(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Spans are paths if they begin with a folder of the repository; those with placeholders and patterns are not looked at.
#[test]
fn files_that_documents_name_exist() {
    let folders: BTreeSet<&str> = files().iter().filter_map(|file| Some(file.split_once('/')?.0)).collect();
    let mut findings = Vec::new();
    for (file, number, line) in lines() {
        for word in code(&line) {
            let is_path = word.split_once('/').is_some_and(|(folder, _)| folders.contains(folder));
            let plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
            if is_path && plain && !root().join(word).exists() {
                findings.push(Finding {
                    file: file.to_owned(),
                    line: number,
                    what: format!("{word} does not exist"),
                });
            }
        }
    }
    none("files that documents name exist", findings);
}

/// Names of tests and the like: long enough that they are no words of an example.
#[test]
fn names_of_code_that_contributing_names_exist() {
    const FILE: &str = "CONTRIBUTING.md";
    let known: BTreeSet<&str> =
        rust().iter().flat_map(|rust| &rust.tokens).map(|token| token.text.as_str()).collect();
    let mut findings = Vec::new();
    let mut count = 0;
    for (number, line) in text(FILE).expect("it is text").lines().enumerate() {
        let plain = |word: &&str| word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        for word in code(line).filter(plain).filter(|word| word.matches('_').count() >= 3) {
            count += 1;
            if !known.contains(word) {
                findings.push(Finding {
                    file: FILE.to_owned(),
                    line: number + 1,
                    what: format!("nothing is called {word}"),
                });
            }
        }
    }
    assert!(count > 15, "{count} names");
    none("tests and macros that CONTRIBUTING.md names exist", findings);
}
