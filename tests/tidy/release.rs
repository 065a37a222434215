//! Checks what is said of a release's parts, that the files of its packages agree, and the scripts that make them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::source::{files, root, text};
use crate::{Finding, none};

fn inventory(directory: &Path) -> (Value, String) {
    let output = Command::new("python3")
        .arg(root().join(".ci/inventory"))
        .arg(directory)
        .args(["0123456", "1700000000"])
        .output()
        .expect("python3 runs; `make setup` installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).expect("it is written");
    (serde_json::from_str(&read("sbom.cdx.json")).expect("it is JSON"), read("licences.txt"))
}

#[test]
fn every_part_of_a_release_has_a_version_and_a_licence() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (sbom, licences) = inventory(directory.path());
    assert_eq!(sbom["bomFormat"], "CycloneDX");
    assert_eq!(sbom["specVersion"], "1.5");
    assert_eq!(sbom["metadata"]["timestamp"], "2023-11-14T22:13:20Z");
    let parts = sbom["components"].as_array().expect("it has parts");
    assert!(parts.len() > 200, "{} parts", parts.len());
    let text_of = |part: &Value, key: &str| part[key].as_str().unwrap_or_default().to_owned();
    for part in parts {
        let licence = part["licenses"][0]["expression"].as_str().unwrap_or_default();
        assert!(!licence.is_empty() && !text_of(part, "version").is_empty(), "{part}");
    }
    // Whatever is bundled in another language is there too.
    for name in ["sqlite", "zstd", "liblzma", "xterm.js", "rust-standard-library", "nexus-guest"] {
        let part = parts.iter().find(|part| text_of(part, "name") == name);
        let version = part.map(|part| text_of(part, "version")).unwrap_or_default();
        assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{name}: {version:?}");
    }
    for name in ["clap ", "tokio ", "xterm.js 5", "musl "] {
        assert!(licences.lines().any(|line| line.starts_with(name)), "licences.txt has no {name}");
    }
    assert!(licences.contains("Permission is hereby granted"));
    assert_eq!(inventory(directory.path()), (sbom, licences), "the same sources give the same bytes");
}

#[test]
fn packages_start_the_daemon_that_they_bring() {
    for script in [".ci/deb", "packaging/arch/PKGBUILD.in"] {
        let script_text = text(script).expect("it is text");
        assert!(
            script_text.contains("s#/usr/local/bin/#/usr/bin/#"),
            "{script} leaves units with another program"
        );
        assert!(script_text.contains("etc/nexus"), "{script} brings no configuration");
    }
    let conffiles = text("packaging/debian/nexus.conffiles").expect("it is text");
    assert_eq!(conffiles, "/etc/nexus/nexus.toml\n");
    // All of it is a comment: the defaults are the program's.
    let configuration = text("packaging/nexus.toml").expect("it is text");
    let set: Vec<&str> =
        configuration.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    assert!(set.is_empty(), "{set:?}");
}

/// Those of packages are run by dpkg, as root.
#[test]
fn scripts_can_be_read_and_stop_at_what_is_not_set() {
    let mut findings = Vec::new();
    let mut count = 0;
    let is_script = |file: &&String| file.starts_with(".ci/") || file.starts_with("packaging/debian/");
    for file in files().iter().filter(is_script) {
        let script = text(file).unwrap_or_default();
        let (reader, must_have): (&[&str], &str) = match script.lines().next() {
            Some("#!/usr/bin/env bash") => (&["bash", "-n"], "\nset -"),
            Some("#!/bin/sh") => (&["sh", "-n"], "\nset -e\n"),
            Some("#!/usr/bin/env python3") => {
                (&["python3", "-c", "import ast, sys; ast.parse(open(sys.argv[1]).read())"], "")
            }
            Some(_) | None => continue,
        };
        count += 1;
        let output = Command::new(reader[0])
            .args(&reader[1..])
            .arg(root().join(file))
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", reader[0]));
        let mut find = |what: String| findings.push(Finding { file: file.clone(), line: 1, what });
        if !output.status.success() {
            find(format!("cannot be read: {}", String::from_utf8_lossy(&output.stderr)));
        }
        if !script.contains(must_have) || (reader[0] == "bash" && !script.contains("uo pipefail\n")) {
            find("goes on after an unset variable or a failure in a pipe: set -euo pipefail".to_owned());
        }
    }
    assert!(count > 18, "{count} scripts");
    none("scripts of the repository can be read, and stop at mistakes", findings);
}

#[test]
fn checksums_are_of_the_files_of_this_version() {
    let target = tempfile::tempdir().expect("a temporary directory");
    let dist = target.path().join("dist");
    std::fs::create_dir(&dist).expect("make a directory");
    let of = |version: &str| {
        [
            format!("nexus-{version}-x86_64-linux.tar.xz"),
            format!("nexus-{version}.cdx.json"),
            format!("nexus-{version}.mcpb"),
            format!("nexus_{version}-1_amd64.deb"),
            format!("nexus-net_{version}-1_amd64.deb"),
            format!("nexus-bin-{version}-1-x86_64.pkg.tar.zst"),
            format!("nexus-net-bin-{version}-1-x86_64.pkg.tar.zst"),
        ]
    };
    let now = of(env!("CARGO_PKG_VERSION"));
    for name in now.iter().chain(&of("0.0.1")) {
        std::fs::write(dist.join(name), name).expect("write a file");
    }
    let output = Command::new("bash")
        .args([".ci/dist", "sums"])
        .current_dir(root())
        .env("CARGO_TARGET_DIR", target.path())
        .env_remove("SIGN_KEY")
        .output()
        .expect("the script runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sums = std::fs::read_to_string(dist.join("SHA256SUMS")).expect("it is written");
    let listed: BTreeSet<&str> = sums.lines().filter_map(|line| Some(line.split_once("  ")?.1)).collect();
    assert_eq!(listed, now.iter().map(String::as_str).collect::<BTreeSet<_>>(), "{sums}");
    let checked = Command::new("sha256sum")
        .args(["--check", "--quiet", "--strict", "SHA256SUMS"])
        .current_dir(&dist)
        .status()
        .expect("sha256sum runs");
    assert!(checked.success(), "{sums}");
}
