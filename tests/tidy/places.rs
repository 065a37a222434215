//! Checks where SQL, processes, paths and `unsafe` may be used.

use crate::source::{Rust, rust};
use crate::{Finding, none};

/// Files that may start external processes, and why.
const PROCESSES: &[(&str, &str)] = &[
    ("core/src/os/tool/mod.rs", "external programs"),
    ("core/src/vmm/process.rs", "VMM processes"),
    ("core/src/net/process.rs", "the process that keeps the network of VMs"),
    ("net/src/own/", "the processes of a network namespace of its own"),
    ("guest-mcp/src/", "commands in the guest"),
    ("host-mcp/build.rs", "cargo for the guest"),
    ("host-mcp/src/ctl/", "the daemon that the bridge starts"),
    ("examples/", "examples start what they show"),
    ("fuzz/", "the fuzzer of filesystems has mke2fs make one"),
];

/// Files that may contain `unsafe`.
const UNSAFE: &[&str] = &[
    "tools-schema/wire/src/duplex.rs",
    "core/src/os/",
    "core/src/vmm/vsock/",
    "core/src/vmm/process.rs",
    "guest-mcp/src/memory.rs",
    "guest-mcp/src/sys.rs",
    "net/src/nft/encode.rs",
    "net/src/nft/socket.rs",
    "net/src/link/tap.rs",
    "net/src/legacy/socket.rs",
    "net/wire/src/tap.rs",
];

/// Files that may name paths of the host (or of an image, which look the same).
const HOST_PATHS: &[&str] = &[
    "core/src/os/paths.rs",
    "core/src/asset/debian/",
    "core/src/image/",
    "host-mcp/src/dirs.rs",
    "guest-mcp/",
    "net/src/dns/upstream.rs",
    "net/src/legacy/apply.rs",
    "net/src/own/uplink.rs",
];

fn is_under(file: &str, places: &[&str]) -> bool {
    places.iter().any(|place| file == *place || (place.ends_with('/') && file.starts_with(place)))
}

fn product() -> impl Iterator<Item = &'static Rust> {
    rust().iter().filter(|rust| !rust.file.starts_with("tests/"))
}

fn finding(rust: &Rust, line: usize, what: impl Into<String>) -> Finding {
    Finding { file: rust.file.clone(), line, what: what.into() }
}

#[test]
fn sql_is_in_the_store() {
    const VERBS: [&str; 8] = [
        "SELECT ",
        "INSERT ",
        "UPDATE ",
        "DELETE FROM ",
        "CREATE TABLE ",
        "ALTER TABLE ",
        "DROP TABLE ",
        "PRAGMA ",
    ];
    let mut findings = Vec::new();
    for rust in product().filter(|rust| !rust.file.starts_with("core/src/store/")) {
        for token in rust.tokens.iter().filter(|token| !token.is_test) {
            let is_sql =
                token.is_string && VERBS.iter().any(|verb| token.text.trim_start().starts_with(verb));
            if is_sql
                || (!token.is_string && (token.text == "rusqlite" || token.text == "rusqlite_migration"))
            {
                findings.push(finding(
                    rust,
                    token.line,
                    "the database outside core/src/store: add a function there",
                ));
            }
        }
    }
    none("SQL lives in core/src/store", findings);
}

#[test]
fn processes_are_started_in_their_places() {
    let places: Vec<&str> = PROCESSES.iter().map(|(place, _)| *place).collect();
    let mut findings = Vec::new();
    for rust in product().filter(|rust| !is_under(&rust.file, &places)) {
        let direct = rust.find_outside_tests(&["process", ":", ":", "Command"]);
        for token in direct.chain(imports_of(rust, "process", "Command")) {
            findings.push(finding(
                rust,
                token.line,
                "a process is started here: use core/src/os/tool for programs, core/src/vmm/process.rs for VMMs",
            ));
        }
    }
    none("external programs are run by core/src/os/tool, VMMs by core/src/vmm/process.rs", findings);
}

/// The places of `use module::{.., name, ..}`.
fn imports_of<'a>(
    rust: &'a Rust,
    module: &'a str,
    name: &'a str,
) -> impl Iterator<Item = &'a crate::source::Token> {
    rust.tokens.iter().enumerate().filter_map(move |(at, token)| {
        let opens = !token.is_test
            && token.text == module
            && [":", ":", "{"].iter().zip(&rust.tokens[at + 1..]).all(|(text, next)| next.text == *text);
        let listed =
            || rust.tokens[at..].iter().take_while(|next| next.text != "}").any(|next| next.text == name);
        (opens && listed()).then_some(token)
    })
}

#[test]
fn host_paths_are_in_their_places() {
    const STARTS: [&str; 5] = ["/var/", "/run/", "/etc/", "/tmp", "/usr/"];
    let mut findings = Vec::new();
    for rust in
        product().filter(|rust| !is_under(&rust.file, HOST_PATHS) && !rust.file.starts_with("examples/"))
    {
        for token in rust.tokens.iter().filter(|token| token.is_string && !token.is_test) {
            if STARTS.iter().any(|start| token.text.starts_with(start)) {
                findings.push(finding(
                    rust,
                    token.line,
                    format!("{:?} belongs in core/src/os/paths.rs", token.text),
                ));
            }
        }
    }
    none(
        "places of the host's file system are named in core/src/os/paths.rs and host-mcp/src/dirs.rs",
        findings,
    );
}

#[test]
fn unsafe_is_in_its_places() {
    let mut findings = Vec::new();
    for rust in product().filter(|rust| !is_under(&rust.file, UNSAFE)) {
        for token in rust.find_outside_tests(&["unsafe"]) {
            findings.push(finding(
                rust,
                token.line,
                "unsafe here: use rustix or nix, or move it to core/src/os",
            ));
        }
    }
    none("unsafe stands in few files, listed in tests/tidy/places.rs", findings);
}

#[test]
fn the_cli_is_a_client_like_any_other() {
    let mut findings = Vec::new();
    let ctl = product()
        .filter(|rust| rust.file.starts_with("host-mcp/src/ctl/") || rust.file.ends_with("bin/nexusctl.rs"));
    for rust in ctl {
        for token in rust.find(&["nexus_core"]) {
            findings.push(finding(rust, token.line, "nexusctl speaks MCP only: use nexus_schema and a tool"));
        }
    }
    none("host-mcp/src/ctl never uses nexus_core", findings);
}

#[test]
fn the_library_knows_no_terminal_environment_or_arguments() {
    let mut findings = Vec::new();
    for rust in product()
        .filter(|rust| rust.file.starts_with("core/src/") || rust.file.starts_with("tools-schema/src/"))
    {
        for name in ["args", "args_os", "var", "var_os", "vars", "vars_os", "current_dir", "home_dir"] {
            for token in rust.find_outside_tests(&["env", ":", ":", name]) {
                findings.push(finding(
                    rust,
                    token.line,
                    format!("env::{name} in a library: take it from Config"),
                ));
            }
        }
        for name in ["stdin", "stdout"] {
            for token in rust.find_outside_tests(&["io", ":", ":", name, "("]) {
                findings.push(finding(
                    rust,
                    token.line,
                    format!("io::{name} in a library: return or trace it"),
                ));
            }
        }
    }
    none("core and tools-schema never read environment, arguments or terminal", findings);
}

#[test]
fn nothing_panics_by_convenience() {
    let mut findings = Vec::new();
    for rust in product() {
        for token in rust.find_outside_tests(&[".", "unwrap", "(", ")"]) {
            findings.push(finding(
                rust,
                token.line,
                ".unwrap() outside tests: return an error, or expect(\"why it cannot fail\")",
            ));
        }
        for name in ["todo", "unimplemented", "dbg"] {
            for token in rust.find(&[name, "!"]) {
                findings.push(finding(rust, token.line, format!("{name}! left in")));
            }
        }
    }
    none("no unwrap outside tests, nothing left open", findings);
}

#[test]
fn every_test_runs() {
    let mut findings = Vec::new();
    for rust in rust() {
        for token in rust.find(&["#", "[", "ignore"]) {
            findings.push(finding(rust, token.line, "an ignored test: mend it or delete it"));
        }
    }
    none("no test is ignored", findings);
}

#[test]
fn modules_say_what_they_are() {
    let mut findings = Vec::new();
    for rust in rust() {
        let name = rust.file.rsplit('/').next().unwrap_or_default();
        if matches!(name, "mod.rs" | "lib.rs" | "main.rs" | "build.rs") && !rust.text.starts_with("//!") {
            findings.push(finding(rust, 1, "does not open with //!: say what it is and what it may not do"));
        }
    }
    none("every mod.rs, lib.rs and main.rs opens with //!", findings);
}

#[test]
fn files_are_rooms_not_halls() {
    const LONGEST: usize = 600;
    let mut findings = Vec::new();
    for rust in rust() {
        let lines = rust.text.lines().count();
        if lines > LONGEST {
            findings.push(finding(
                rust,
                lines,
                format!("{lines} lines: split it, something in it wants its own file"),
            ));
        }
    }
    none("no Rust file is longer than 600 lines", findings);
}
