//! Checks the systemd units: that they have what virtual machines need, and that systemd accepts them.

use std::collections::BTreeMap;
use std::process::Command;

use crate::source::{root, text};

const SYSTEM: &str = "host-mcp/systemd/nexus.service";
const USER: &str = "host-mcp/systemd/user/nexus.service";

/// Maps `[Section] Key` to its values.
fn parse(file: &str) -> BTreeMap<String, Vec<String>> {
    let mut section = String::new();
    let mut entries: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text(file).expect("a unit is text").lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if line.starts_with('[') {
            line.clone_into(&mut section);
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{file}: {line:?} is no entry"));
        entries.entry(format!("{section} {key}")).or_default().push(value.to_owned());
    }
    entries
}

#[test]
fn units_let_virtual_machines_live() {
    for file in [SYSTEM, USER] {
        let unit = parse(file);
        for (key, value) in [
            ("[Service] Type", "notify"),
            ("[Service] KillMode", "process"),
            ("[Service] OOMPolicy", "continue"),
            ("[Service] RuntimeDirectory", "nexus"),
            ("[Service] RuntimeDirectoryPreserve", "yes"),
            ("[Service] Restart", "on-failure"),
            ("[Service] ExecStart", "/usr/local/bin/nexusd"), // `make install` puts its PREFIX there
        ] {
            assert_eq!(unit.get(key), Some(&vec![value.to_owned()]), "{file}: {key}");
        }
        for forbidden in [
            "PrivateTmp",
            "PrivateDevices",
            "ProtectHome",
            "ProtectControlGroups",
            "MemoryDenyWriteExecute",
            "RestrictSUIDSGID",
        ] {
            let key = format!("[Service] {forbidden}");
            assert!(
                !unit.contains_key(&key),
                "{file}: {forbidden} would reach into virtual machines, see the unit's comment"
            );
        }
    }
    assert_eq!(parse(SYSTEM)["[Install] WantedBy"], ["multi-user.target"]);
    assert_eq!(parse(USER)["[Install] WantedBy"], ["default.target"]);
    assert!(
        !parse(USER).contains_key("[Service] NoNewPrivileges"),
        "a user's daemon needs newuidmap to make images"
    );
}

#[test]
fn systemd_takes_the_units() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for (file, manager) in [(SYSTEM, "--system"), (USER, "--user")] {
        let unit = text(file).expect("a unit is text");
        // systemd checks that the program exists; for this test it need not be installed.
        let unit = unit.replace("ExecStart=/usr/local/bin/nexusd", "ExecStart=/bin/true");
        let copy = directory.path().join("nexus.service");
        std::fs::write(&copy, unit).expect("write the copy");
        let output = Command::new("systemd-analyze")
            .args(["verify", manager, "--man=no"])
            .arg(&copy)
            .env("XDG_RUNTIME_DIR", directory.path())
            .current_dir(root())
            .output()
            .expect("systemd-analyze verifies units; `make setup` installs it");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && !said.contains("nexus.service"),
            "systemd-analyze verify {file}: {said}"
        );
    }
}

/// What `systemd-analyze security` thinks of the system's unit, without a service that runs.
#[test]
fn what_the_unit_leaves_open_is_explained() {
    let analyze = |arguments: &[&str]| {
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager"])
            .args(arguments)
            .arg(root().join(SYSTEM))
            .output()
            .expect("systemd-analyze judges units; `make setup` installs it");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (is_below, said) = analyze(&["--threshold=49"]);
    assert!(is_below, "the exposure is not below 5: {}", said.lines().last().unwrap_or_default());
    let (_, lines) = analyze(&["--json=short"]);
    let lines: Vec<serde_json::Value> = serde_json::from_str(&lines).expect("JSON");
    let page = text("docs/packages.md").expect("the page of packages is text");
    let open: Vec<&str> = lines
        .iter()
        .filter(|line| line["set"] == false && !line["exposure"].is_null())
        .filter_map(|line| line["name"].as_str())
        .filter(|name| !page.contains(&format!("`{name}`")))
        .collect();
    assert!(lines.len() > 50, "{} lines", lines.len());
    assert!(open.is_empty(), "docs/packages.md does not say why these stay open: {open:?}");
}

#[test]
fn units_are_installed_where_systemd_looks() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let prefix = home.path().join(".local");
    let output = Command::new("make")
        .args(["-n", "install", "DESTDIR=", "SUDO_USER=somebody"])
        .arg(format!("PREFIX={}", prefix.display()))
        .current_dir(root())
        .output()
        .expect("make says what it would do");
    let would = String::from_utf8_lossy(&output.stdout);
    let looks = Command::new("systemd-analyze")
        .args(["--user", "unit-paths"])
        .env("HOME", home.path())
        .env_remove("XDG_DATA_HOME")
        .env("XDG_RUNTIME_DIR", home.path())
        .output()
        .expect("systemd-analyze tells the paths; `make setup` installs it");
    let looks = String::from_utf8_lossy(&looks.stdout);
    let own: Vec<&str> = looks.lines().filter(|path| path.starts_with(&*prefix.to_string_lossy())).collect();
    assert!(!own.is_empty(), "systemd looks nowhere below {}: {looks}", prefix.display());
    assert!(
        own.iter().any(|path| would.contains(&format!("> {path}/nexus.service"))),
        "systemd looks in {own:?}, `make install` does this instead:\n{would}"
    );
}
