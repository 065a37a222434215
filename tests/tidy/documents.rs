//! The documents: what they point at exists.

use crate::source::{files, root, text};
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

#[test]
fn links_lead_somewhere() {
    let mut findings = Vec::new();
    for (file, number, line) in lines() {
        let directory = root().join(file).parent().expect("a file is in a directory").to_path_buf();
        for target in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            let elsewhere = path.is_empty() || path.contains("://") || path.starts_with("mailto:");
            if !elsewhere && !directory.join(path).exists() {
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

#[test]
fn files_named_in_the_architecture_exist() {
    let mut findings = Vec::new();
    for (file, number, line) in lines() {
        for word in line.split('`').skip(1).step_by(2) {
            let is_path =
                ["core/", "net/", "host-mcp/", "guest-mcp/", "tools-schema/", "tests/", "docs/", "examples/"]
                    .iter()
                    .any(|top| word.starts_with(top));
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
