//! Checks the tasks of users and developers: `make help`, the checklist of a release, and the changelog.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::source::{root, text};
use crate::{Finding, none};

const MAKEFILE: &str = "Makefile";

#[test]
fn make_help_has_every_target() {
    let makefile = text(MAKEFILE).expect("the Makefile is text");
    let joined = makefile.replace("\\\n", " ");
    let phony =
        joined.lines().find_map(|line| line.strip_prefix(".PHONY:")).expect("the Makefile has phony targets");
    let phony: BTreeSet<&str> = phony.split_whitespace().collect();
    let output = Command::new("make")
        .args(["--silent", "help"])
        .current_dir(root())
        .output()
        .expect("make prints its help");
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let shown: BTreeSet<&str> = help
        .lines()
        .filter_map(|line| line.trim().strip_prefix("make ")?.split_whitespace().next())
        .collect();

    let mut findings = Vec::new();
    let mut find = |line: usize, what: String| {
        findings.push(Finding { file: MAKEFILE.to_owned(), line, what });
    };
    let mut rules = BTreeSet::new();
    for (at, line) in makefile.lines().enumerate() {
        let Some((target, rest)) = line.split_once(':') else { continue };
        let is_name = target.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !is_name || target.is_empty() || rest.starts_with('=') {
            continue;
        }
        rules.insert(target);
        if !shown.contains(target) {
            find(at + 1, format!("make help does not show {target}: say what it does, after ##"));
        }
        if !phony.contains(target) {
            find(at + 1, format!("{target} is not in .PHONY"));
        }
    }
    for target in phony.difference(&rules) {
        find(1, format!(".PHONY has {target}, for which there is no rule"));
    }
    assert!(rules.len() > 20, "{} rules", rules.len());
    none("make help shows each target", findings);
}

#[test]
fn the_changelog_has_this_version() {
    let heading = format!("## [{}] - ", env!("CARGO_PKG_VERSION"));
    let changelog = text("CHANGELOG.md").expect("the changelog is text");
    let headings: Vec<&str> = changelog.lines().filter(|line| line.starts_with("## ")).collect();
    assert_eq!(headings.first(), Some(&"## [Unreleased]"));
    assert!(headings.iter().any(|line| line.starts_with(&heading)), "no {heading:?} in {headings:?}");
}

const CHANGELOG: &str = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- all of it\n";
const LOCK: &str = "version = 4\n\n[[package]]\nname = \"nexus-core\"\nversion = \"1.2.3\"\n\n\
    [[package]]\nname = \"serde\"\nversion = \"1.0.0\"\nsource = \"registry\"\n";

/// A repository with what the checklist looks at: version 1.2.3, ready to be released.
fn ready() -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, content: &str| {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("make its directory");
        fs::write(path, content).expect("write a file");
    };
    write("Cargo.toml", "[workspace]\n\n[workspace.package]\nversion = \"1.2.3\"\nedition = \"2024\"\n");
    write("Cargo.lock", LOCK);
    write("CHANGELOG.md", CHANGELOG);
    write("Makefile", "lint:\ntest:\naudit:\nrelease:\nmcpb: release\n");
    write("examples/harnesses/one/pyproject.toml", "[project]\nversion = \"1.2.3\"\n");
    write(".ci/empty", "");
    fs::copy(root().join(".ci/release"), directory.path().join(".ci/release")).expect("copy the script");
    git(directory.path(), &["init", "--quiet"]);
    commit(directory.path());
    directory
}

fn git(directory: &Path, arguments: &[&str]) {
    let output = Command::new("git")
        .args(["-c", "user.name=a", "-c", "user.email=a@host.example", "-c", "commit.gpgsign=false"])
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("git runs; install git");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn commit(directory: &Path) {
    git(directory, &["add", "--all"]);
    git(directory, &["commit", "--quiet", "--message", "x"]);
}

/// Whether the checklist finds nothing wrong, and what it says.
fn checklist(directory: &Path) -> (bool, String) {
    let output = Command::new("bash")
        .args([".ci/release", "--dry-run"])
        .current_dir(directory)
        .output()
        .expect("the script runs");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_tree_that_is_ready_passes_the_checklist() {
    let tree = ready();
    let (is_ready, said) = checklist(tree.path());
    assert!(is_ready && !said.contains("FAIL"), "{said}");
    for step in ["lint", "audit", "test", "release", "mcpb"] {
        assert!(said.contains(&format!("would run: make {step}\n")), "{step}: {said}");
    }
    assert!(!said.contains("make deb"), "this tree makes no package: {said}");
    assert!(said.contains("What a person has to do:") && said.contains("v1.2.3"), "{said}");
}

/// Takes something away that a release needs.
type Spoil = Box<dyn Fn(&Path)>;

#[test]
fn the_checklist_names_what_a_release_lacks() {
    let with = |file: &'static str, content: String| {
        move |tree: &Path| {
            fs::write(tree.join(file), &content).expect("write the file");
            commit(tree);
        }
    };
    let cases: [(Spoil, &str); 6] = [
        (
            Box::new(|tree: &Path| fs::write(tree.join("more"), "").expect("write a file")),
            "FAIL  the tree is not clean: commit, or put away: more\n",
        ),
        (Box::new(|tree: &Path| git(tree, &["tag", "v1.2.3"])), "FAIL  the tag v1.2.3 exists"),
        (
            Box::new(with("Cargo.lock", LOCK.replace("1.2.3", "1.2.2"))),
            "FAIL  versions differ from 1.2.3: nexus-core 1.2.2\n",
        ),
        (
            Box::new(with("examples/harnesses/one/pyproject.toml", "version = \"0.9\"\n".to_owned())),
            "FAIL  versions differ from 1.2.3: examples/harnesses/one/pyproject.toml 0.9\n",
        ),
        (
            Box::new(with("CHANGELOG.md", CHANGELOG.replace("2026-01-02", "soon"))),
            "FAIL  CHANGELOG.md has no date for 1.2.3",
        ),
        (
            Box::new(with("CHANGELOG.md", CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n\n- more\n"))),
            "FAIL  CHANGELOG.md has entries under Unreleased",
        ),
    ];
    for (spoil, said) in cases {
        let tree = ready();
        spoil(tree.path());
        let (is_ready, all) = checklist(tree.path());
        assert!(!is_ready && all.contains(said), "{said:?} is not in {all}");
        assert_eq!(all.matches("FAIL").count(), 1, "{all}");
    }
}
