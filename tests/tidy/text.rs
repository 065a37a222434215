//! Checks for text that no file of the repository may contain.

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use crate::source::{files, root, text};
use crate::{Finding, none};

/// Files that others wrote, kept as they were published.
const OF_OTHERS: [&str; 3] =
    ["LICENSE", "host-mcp/src/page/web/xterm/xterm.css", "host-mcp/src/page/web/xterm/xterm.js"];

/// Every line of every text file, with file and number, except lock files, which tools write.
fn lines() -> impl Iterator<Item = (&'static str, usize, String)> {
    let written =
        files().iter().filter(|file| !file.ends_with("Cargo.lock") && !OF_OTHERS.contains(&file.as_str()));
    written.filter_map(|file| Some((file.as_str(), text(file)?))).flat_map(|(file, text)| {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.into_iter().enumerate().map(move |(at, line)| (file, at + 1, line))
    })
}

fn search(words: &[String], advice: &str) -> Vec<Finding> {
    lines()
        .filter_map(|(file, line, said)| {
            let word = words.iter().find(|word| said.contains(word.as_str()))?;
            Some(Finding { file: file.to_owned(), line, what: format!("says {word:?}: {advice}") })
        })
        .collect()
}

// The words are assembled here, so that this file does not contain them.
fn joined(words: &[&[&str]]) -> Vec<String> {
    words.iter().map(|parts| parts.concat()).collect()
}

#[test]
fn no_registry_is_named() {
    let hosts = joined(&[
        &["deb.", "debian.org"],
        &["security.", "debian.org"],
        &["ftp.", "debian.org"],
        &["archive.", "ubuntu.com"],
        &["crates", ".io/"],
        &["index.crates", ".io"],
        &["static.crates", ".io"],
        &["pypi", ".org"],
        &["files.python", "hosted.org"],
        &["registry.npm", "js.org"],
        &["proxy.golang", ".org"],
        &["docker", ".io/"],
    ]);
    none(
        "no registry's host name is in the repository",
        search(&hosts, "take it from the machine's own configuration; tests use names under .example"),
    );
}

#[test]
fn no_machine_is_named() {
    let paths = joined(&[&["/work", "/"], &["/root", "/."], &["/home", "/runner"]]);
    none(
        "no path of a developer's machine is in the repository",
        search(&paths, "use a relative path or a variable"),
    );
}

#[test]
fn nothing_is_left_open() {
    let words = joined(&[&["TO", "DO"], &["FIX", "ME"], &["XX", "X:"]]);
    none("nothing is left open", search(&words, "do it, or say what is so and why"));
}

#[test]
fn nothing_speaks_of_its_making() {
    let words = joined(&[
        &["DES", "IGN.md"],
        &["REC", "IPE.md"],
        &["STY", "LE.md"],
        &["CON", "TRACT.md"],
        &["this ses", "sion's task"],
        &["the bri", "ef says"],
        &["iss", "ue 1"],
        &["iss", "ue 2"],
        &["iss", "ue #"],
    ]);
    none(
        "the repository speaks of the product, not of how it was made",
        search(&words, "say the reason itself"),
    );
}

#[test]
fn files_of_others_are_as_they_were_published() {
    let directory = "host-mcp/src/page/web/xterm";
    let said = text(&format!("{directory}/README.md")).expect("it says what is there");
    let mut findings = Vec::new();
    for name in ["xterm.js", "xterm.css"] {
        let file = format!("{directory}/{name}");
        let bytes = std::fs::read(root().join(&file)).expect("it is there");
        let digest = HEXLOWER.encode(&Sha256::digest(&bytes));
        if !said.contains(&format!("{digest}  {name}\n")) {
            findings.push(Finding {
                file,
                line: 1,
                what: format!("{digest} is not in the README beside it"),
            });
        }
    }
    none("what others published is unchanged", findings);
}

#[test]
fn lines_end_as_they_should() {
    let findings = lines()
        .filter(|(file, ..)| {
            [".rs", ".toml", ".sh", ".yml", ".py", ".ts"].iter().any(|end| file.ends_with(end))
        })
        .filter(|(_, _, line)| line.ends_with([' ', '\t', '\r']))
        .map(|(file, line, _)| Finding {
            file: file.to_owned(),
            line,
            what: "white space at the end".to_owned(),
        })
        .collect();
    none("no white space at the end of a line", findings);
}
