//! The examples that run a script in a VM of its own, each over stdio and over HTTP.

use std::fs;
use std::process::{Command, Output};

use nexus_tests::daemon::Daemon;
use serde_json::json;

use crate::kit::{Kit, example};

const SCRIPT: &str =
    "#!/bin/sh\necho \"hello from $(hostname)\"\necho careful >&2\necho kept > result\nexit 3\n";

#[test]
fn the_python_example_runs_a_script() {
    let kit = Kit::find();
    runs_a_script(&kit, || kit.python(&example("python/sandbox.py")));
}

#[test]
fn the_typescript_example_runs_a_script() {
    let kit = Kit::find();
    let path = example("typescript/sandbox.ts");
    runs_a_script(&kit, || kit.typescript(&path));
}

fn runs_a_script(kit: &Kit, program: impl Fn() -> Command) {
    let daemon = Daemon::start_with(&["--http", "127.0.0.1:0"]);
    let script = kit.home().join("job.sh");
    fs::write(&script, SCRIPT).expect("write the script");

    let over_stdio = program().envs(daemon.environment()).args(["--from", "busybox"]).arg(&script).output();
    ran(over_stdio.expect("the example runs"), &daemon);

    let (url, token) = daemon.http();
    let over_http = program()
        .env("NEXUS_HTTP_TOKEN", token)
        .args(["--url", &url, "--from", "busybox"])
        .arg(&script)
        .output();
    ran(over_http.expect("the example runs"), &daemon);

    let refused = program().envs(daemon.environment()).args(["--from", "nothing-such"]).arg(&script).output();
    let refused = refused.expect("the example runs");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("image_not_found") && said.contains("image_list"), "{said}");
}

#[track_caller]
fn ran(output: Output, daemon: &Daemon) {
    let (printed, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(3), "{printed}\n{said}\n{}", daemon.log());
    let name = said.lines().find_map(|line| line.strip_prefix("machine ")?.split(',').next());
    let name = name.unwrap_or_else(|| panic!("no machine is named: {said}"));
    assert_eq!(printed, format!("hello from {name}\nkept\n"), "{said}");
    assert!(said.ends_with("careful\n"), "{said}");
    let left = daemon.client().must("vm_list", json!({}));
    assert_eq!(left["vms"], json!([]), "the machine is deleted");
}

/// Machines that can be saved run under QEMU.
#[test]
fn the_python_examples_of_checkpoints_undo_and_choose() {
    let (kit, daemon) = (Kit::find(), Daemon::start());
    let ran = |name: &str| {
        let mut program = kit.python(&example(name));
        let output = program.envs(daemon.environment()).args(["--from", "busybox"]).output();
        let output = output.expect("the example runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {said}\n{}", daemon.log());
        (String::from_utf8_lossy(&output.stdout).into_owned(), said)
    };
    let (undone, _) = ran("python/undo.py");
    assert_eq!(
        undone,
        "before: checkpoint before-run\nworks after 'rm -rf /usr /bin /sbin': False\nfiles are gone: True\n\
         works after the rollback: True\nnote: precious\n"
    );
    assert_eq!(daemon.client().must("vm_list", json!({}))["vms"], json!([]), "the machine is deleted");

    let (chosen, said) = ran("python/three_fixes.py");
    let expected = "before: fails\nswap: fails\nsort: fails\nturn: passes\nkept turn: ";
    assert!(chosen.starts_with(expected) && chosen.contains("-gt"), "{chosen}");
    let kept = said.lines().find_map(|line| line.strip_prefix("machine ")).expect("a machine is named");
    let left = daemon.client().must("vm_list", json!({}));
    let ids: Vec<&str> =
        left["vms"].as_array().expect("a list").iter().filter_map(|vm| vm["id"].as_str()).collect();
    assert_eq!(ids, [kept], "the others are deleted");
}
