//! VMs that exist for one command: they are gone when it has ended, whatever ends first.

use std::process::{Command, Stdio};

use nexus_tests::client::Client;
use nexus_tests::daemon::program;
use serde_json::{Value, json};

use crate::kills::{kill_at, last_op};
use crate::world::{SOON, World, refused, soon};

fn run_of(world: &World, name: &str, line: &str) -> Value {
    let mut arguments = world.arguments(name);
    arguments["run"] = line.into();
    arguments
}

fn vms(client: &mut Client) -> Value {
    client.must("vm_list", json!({}))["vms"].clone()
}

#[test]
fn a_run_gives_its_output_and_leaves_no_vm() {
    let world = World::new();
    let mut client = world.client();
    let line = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; echo end; exit 3";
    let vm = client.to_the_end("vm_create", run_of(&world, "once", line), SOON);
    let run = &vm["run"];
    assert_eq!(
        (&run["status"], &run["stderr"], &vm["state"]),
        (&json!(3), &json!("err\n"), &json!("stopped")),
        "{vm}"
    );
    let stdout = run["stdout"].as_str().expect("a text");
    assert!(stdout.starts_with("out\nxxx") && stdout.ends_with("xxx\nend\n"), "{stdout}");
    assert!(stdout.len() < 17_000 && run["omitted_bytes"].as_u64() > Some(20_000), "{}", stdout.len());
    assert_eq!(vms(&mut client), json!([]));
    let history = client.must("vm_history", json!({ "vm": "once", "limit": 1 }));
    assert_eq!(history["transitions"][0]["reason"], "deleted: its command has ended");

    // The model's tools tell the same in few words.
    let mut work = Client::connect_at(&world.daemon.socket(), "/mcp?tools=work").expect("it connects");
    let told = work.must("vm_create", run_of(&world, "once", "echo hi"));
    assert_eq!((&told["result"]["run"]["stdout"], told.get("next")), (&json!("hi\n"), None), "{told}");

    for (key, value) in [("start", json!(false)), ("protected", json!(true)), ("run", json!(" "))] {
        let mut arguments = run_of(&world, "never", "true");
        arguments[key] = value;
        assert_eq!(refused(&mut client, "vm_create", arguments).code, "invalid_argument", "{key}");
    }
    // Cancelled, it takes its VM along.
    let mut arguments = run_of(&world, "long", "sleep 7654");
    arguments["wait_s"] = 0.into();
    let op = client.must("vm_create", arguments)["op_id"].clone();
    client.wait_for_state("long", "ready");
    client.must("op_cancel", json!({ "op_id": op }));
    soon("the VM is gone", || (vms(&mut client) == json!([])).then_some(()));
    world.assert_in_order();
}

#[test]
fn a_run_survives_the_daemon() {
    let mut world = World::new();
    let mark = world.path("runs");
    for point in ["ready", "run-started", "run-ended"] {
        let line = format!("echo ran >> {}; sleep 1; echo end", mark.display());
        std::fs::write(&mark, "").expect("a file is written");
        let arguments = run_of(&world, "once", &line);
        let mut client = kill_at(&mut world, point, "vm_create", &arguments);
        let op = last_op(&mut client);
        let ended = client.must("op_get", json!({ "op_id": op["op_id"] }));
        assert_eq!(ended["result"]["run"]["stdout"], "end\n", "{point}: {ended}");
        assert_eq!(std::fs::read_to_string(&mark).expect("it is there"), "ran\n", "{point}: once, not twice");
        assert_eq!(vms(&mut client), json!([]), "{point}");
        world.assert_in_order();
    }
}

#[test]
fn a_run_whose_vm_does_not_start_leaves_nothing() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let failure = refused(&mut client, "vm_create", run_of(&world, "exits-1", "true"));
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    soon("the VM is gone", || (vms(&mut client) == json!([])).then_some(()));
    world.assert_in_order();
}

#[test]
fn nexusctl_run_leaves_nothing_even_if_it_is_killed() {
    let world = World::new();
    let mut client = world.client();
    let run = |more: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        command
            .args(["run", "--lease", "2s", "--disk", "128MiB"])
            .args(more)
            .envs(world.daemon.environment());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let done =
        run(&[&world.from, "--", "sh", "-c", "sleep 3; echo out; exit 4"]).output().expect("nexusctl runs");
    // It lived longer than its lease, which was renewed.
    assert_eq!(done.status.code(), Some(4), "{done:?}");
    assert_eq!(done.stdout, b"out\n");
    assert_eq!(vms(&mut client), json!([]));

    let mut child =
        run(&["--name", "left", &world.from, "--", "sleep", "4567"]).spawn().expect("nexusctl runs");
    client.must("vm_list", json!({}));
    soon("the VM", || {
        client.call("vm_inspect", json!({ "vm": "left" })).ok().filter(|vm| vm["state"] == "ready")
    });
    child.kill().expect("a child can be killed");
    child.wait().expect("a child can be waited for");
    soon("the VM is gone", || (vms(&mut client) == json!([])).then_some(()));
    let history = client.must("vm_history", json!({ "vm": "left", "limit": 1 }));
    assert_eq!(history["transitions"][0]["reason"], "deleted: its time to live is over");
    world.assert_in_order();
}
