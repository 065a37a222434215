//! Checks the layers of core's rooms: a table says which room may import which, and there are no cycles.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{Rust, Token, rust};
use crate::{Finding, none};

/// Each room of core/src, from the top down, with the rooms that it may import. A room may import only rooms below it, so the
/// list cannot contain a cycle.
const ROOMS: &[(&str, &[&str])] = &[
    (
        "facade",
        &[
            "access",
            "asset",
            "config",
            "context",
            "drive",
            "egress",
            "event",
            "guest",
            "image",
            "net",
            "op",
            "os",
            "progress",
            "provision",
            "publish",
            "store",
            "tree",
            "vm",
            "vmm",
        ],
    ),
    ("publish", &["context", "guest", "op", "os", "store", "vm"]),
    (
        "vm",
        &[
            "access", "asset", "context", "drive", "egress", "ext4", "guest", "image", "net", "op", "os",
            "progress", "store", "vmm",
        ],
    ),
    (
        "context",
        &[
            "access",
            "asset",
            "config",
            "drive",
            "egress",
            "event",
            "guest",
            "net",
            "op",
            "os",
            "progress",
            "provision",
            "store",
            "vmm",
        ],
    ),
    ("provision", &["access", "asset", "config", "image", "op", "os", "progress", "store", "vmm"]),
    ("op", &["access", "event", "progress", "store"]),
    ("asset", &["config", "image", "os", "progress"]),
    ("image", &["config", "drive", "ext4", "os", "progress"]),
    ("drive", &["ext4", "os", "progress"]),
    ("vmm", &["config", "os"]),
    ("tree", &["guest", "progress"]),
    ("egress", &["config", "event", "os"]),
    ("net", &["os"]),
    ("guest", &["os"]),
    ("ext4", &["os", "progress"]),
    ("event", &["access", "os", "store"]),
    ("access", &["os", "store"]),
    ("store", &["os"]),
    ("progress", &["os"]),
    ("config", &["os"]),
    ("os", &[]),
];

/// The rooms that may define methods on shared types. A method can be called without an import, so a method defined in a
/// higher room would bypass the layers.
const METHODS_OF_SHARED: &[&str] = &["context", "facade"];

/// The room of a file of core.
fn room(file: &str) -> Option<&str> {
    let path = file.strip_prefix("core/src/")?;
    let room = path.split('/').next()?;
    let room = room.strip_suffix(".rs").unwrap_or(room);
    (room != "lib").then_some(room)
}

/// A file's imports from other rooms: `crate::room` anywhere, and `super::room` if that is the crate's root.
fn imports(rust: &Rust) -> Vec<(&Token, String)> {
    let tokens: Vec<&Token> = rust.tokens.iter().filter(|token| !token.is_test).collect();
    let mut found = Vec::new();
    for (at, window) in tokens.windows(4).enumerate() {
        let is_path = window[0].text == "crate" && window[1].text == ":" && window[2].text == ":";
        if !is_path || window.iter().any(|token| token.is_string) {
            continue;
        }
        if window[3].text != "{" {
            found.push((window[3], window[3].text.clone()));
            continue;
        }
        // `use crate::{a::b, c}`: the names after the brace and after each comma of this level.
        let (mut depth, mut first) = (0, true);
        for token in &tokens[at + 3..] {
            match token.text.as_str() {
                "{" => (depth, first) = (depth + 1, depth == 0),
                "}" if depth == 1 => break,
                "}" => depth -= 1,
                "," if depth == 1 => first = true,
                name if depth == 1 && first => {
                    found.push((token, name.to_owned()));
                    first = false;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn rooms_import_only_what_is_below_them() {
    let allowed: BTreeMap<&str, &[&str]> = ROOMS.iter().copied().collect();
    let mut findings = Vec::new();
    for (at, (room, below)) in ROOMS.iter().enumerate() {
        for other in *below {
            let is_below = ROOMS[at + 1..].iter().any(|(lower, _)| lower == other);
            assert!(
                is_below,
                "{room} may import {other}, which is not below it in the list: that allows a circle"
            );
        }
    }
    let mut used = BTreeSet::new();
    for rust in rust() {
        let Some(room) = room(&rust.file) else { continue };
        let Some(below) = allowed.get(room) else {
            findings.push(Finding {
                file: rust.file.clone(),
                line: 1,
                what: format!("the room {room} has no place in tests/tidy/layers.rs"),
            });
            continue;
        };
        for (token, other) in imports(rust) {
            if other == room || !allowed.contains_key(other.as_str()) {
                continue;
            }
            used.insert((room, other.clone()));
            if !below.contains(&other.as_str()) {
                findings.push(Finding {
                    file: rust.file.clone(),
                    line: token.line,
                    what: format!("{room} may not import {other}"),
                });
            }
        }
    }
    for (room, below) in ROOMS {
        for other in below.iter().filter(|other| !used.contains(&(*room, (**other).to_owned()))) {
            findings.push(Finding {
                file: "tests/tidy/layers.rs".into(),
                line: 1,
                what: format!("{room} may import {other} but does not: take the edge away"),
            });
        }
    }
    none("rooms of core import only the rooms below them that tests/tidy/layers.rs names", findings);
}

#[test]
fn what_all_share_has_its_methods_in_two_rooms() {
    let mut findings = Vec::new();
    for rust in rust() {
        let Some(room) = room(&rust.file).filter(|room| !METHODS_OF_SHARED.contains(room)) else { continue };
        // Other rooms may have their own type of that name.
        if rust.find_outside_tests(&["struct", "Shared"]).next().is_some() {
            continue;
        }
        for token in rust.find_outside_tests(&["impl", "Shared"]) {
            findings.push(Finding {
                file: rust.file.clone(),
                line: token.line,
                what: format!("a method of Shared in {room}: write a function that takes it"),
            });
        }
    }
    for rust in rust().iter().filter(|rust| room(&rust.file) == Some("facade")) {
        for at in rust.find_outside_tests(&["impl", "Shared"]) {
            let rest = rust.tokens.iter().skip_while(|token| token.line < at.line);
            let methods = rest.take_while(|token| token.text != "mod");
            let words: Vec<&Token> = methods.collect();
            for window in words.windows(5) {
                let texts: Vec<&str> = window.iter().map(|token| token.text.as_str()).collect();
                if texts[..4] == ["pub", "(", "crate", ")"] && matches!(texts[4], "async" | "fn") {
                    findings.push(Finding {
                        file: rust.file.clone(),
                        line: window[0].line,
                        what: "rooms below the facade could call this: make it pub(super), or move it down"
                            .into(),
                    });
                }
            }
        }
    }
    none("no room reaches the facade by a method of what all share", findings);
}

#[test]
fn imports_are_found() {
    let text = "use crate::{op::{Ops, summary}, store::Store};\nuse crate::os::tool;\nfn f() { crate::vm::g(); }\n#[cfg(test)]\nmod tests { use crate::facade::X; }\n";
    let rust = Rust::new("core/src/asset/mod.rs".into(), text.into());
    let names: Vec<String> = imports(&rust).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["op", "store", "os", "vm"]);
}
