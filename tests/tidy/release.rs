//! Checks what is said of a release's parts, and that the files of its packages agree.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::source::{root, text};

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
