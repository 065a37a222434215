//! What is said when something is not right: mistakes, what has ended already, what is not there.

use serde_json::{Value, json};

use crate::fake::{Fake, World, fails, gives};

#[test]
fn hints_carry_the_name_that_was_used() {
    let world = World::new();
    let down = || fails("vm_not_running", "web-1 is stopped", "call vm_start");
    let tools = [
        ("guest_os_info", down()),
        (
            "vm_delete",
            fails("vm_wrong_state", "web-1 runs", "call vm_stop first, or vm_delete with force: true"),
        ),
    ];
    let _fake = Fake::start(&world.runtime(), tools);
    let hint = |line: &str| world.run(line).stderr.lines().last().unwrap_or_default().to_owned();
    assert_eq!(hint("guest info web-1"), "hint: run `nexusctl vm start web-1`");
    assert_eq!(
        hint("rm web-1"),
        "hint: run `nexusctl vm stop web-1` first, or `nexusctl vm delete web-1 --force`"
    );
    let why = json!({ "code": "vm_wrong_state", "message": "web-2 runs", "retryable": false,
        "hint": "call vm_stop first, or vm_delete with force: true" });
    let failed = json!({ "done": true, "deleted": [], "failed": [{ "id": "bbbbbbbbbbbbe", "name": "web-2", "error": why }] });
    let waited =
        json!({ "done": false, "id": "bbbbbbbbbbbbe", "name": "web-3", "state": "stopped", "waited_ms": 1 });
    let other = World::new();
    let _other = Fake::start(&other.runtime(), [("vm_delete", gives(failed)), ("vm_wait", gives(waited))]);
    let hint_there = |line: &str| other.run(line).stderr.lines().last().unwrap_or_default().to_owned();
    assert_eq!(
        hint_there("rm --tag a=b"),
        "hint: run `nexusctl vm stop web-2` first, or `nexusctl vm delete web-2 --force`"
    );
    assert_eq!(
        hint_there("wait web-3 --timeout 0"),
        "hint: run `nexusctl vm inspect web-3` to see how it is"
    );
    // Programs get the tool's own words.
    assert!(world.run("guest info web-1 --json").stderr.contains("\"hint\":\"call vm_start\""));
}

#[test]
fn a_wrong_command_line_is_json_where_json_was_asked_for() {
    let world = World::new();
    for (line, message, hint) in [
        (
            "drive create data --image debian --json",
            "unexpected argument '--image' found",
            "here that is `--from`",
        ),
        ("--json vm lst", "unrecognized subcommand 'lst'", "'list'"),
        ("vm create --json --memory 512", "add a unit: 512MiB", ""),
        ("vm inspect --json", "the following required arguments were not provided: <VM>", "usage: nexusctl"),
    ] {
        let run = world.run(line);
        let told: Value =
            serde_json::from_str(&run.stderr).unwrap_or_else(|e| panic!("{line}: {e}: {run:?}"));
        let error = &told["error"];
        assert_eq!((run.code, run.text(), &error["code"]), (2, "", &json!("invalid_argument")), "{line}");
        assert!(error["message"].as_str().unwrap().contains(message), "{line}: {error}");
        assert!(error["hint"].as_str().unwrap_or_default().contains(hint), "{line}: {error}");
    }
    // Help that was asked for is no mistake.
    let help = world.run("vm create --json --help");
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
}

#[test]
fn what_has_ended_is_not_cancelled_and_that_is_said() {
    let world = World::new();
    let op = |state: &str| {
        json!({ "op_id": "ccccccccccccc", "tool": "vm_create", "state": state, "owner": "uid:0",
            "progress": { "step": "" }, "started_at": "2026-01-02T03:04:05Z" })
    };
    let outcome = |done: bool, state: &str| json!({ "done": done, "op_id": "ccccccccccccc", "state": state, "progress": { "step": "" } });
    for (before, state, said) in [
        (outcome(true, "succeeded"), "succeeded", "operation ccccccccccccc had already ended (succeeded)\n"),
        (outcome(true, "cancelled"), "cancelled", "operation ccccccccccccc had already ended (cancelled)\n"),
        (outcome(false, "running"), "cancelled", "operation ccccccccccccc cancelled\n"),
        (
            outcome(false, "running"),
            "succeeded",
            "operation ccccccccccccc ended before it could be cancelled (succeeded)\n",
        ),
    ] {
        let world = World::new();
        let _fake =
            Fake::start(&world.runtime(), [("op_get", gives(before)), ("op_cancel", gives(op(state)))]);
        let run = world.run("op cancel ccccccccccccc");
        assert_eq!((run.code, run.text()), (0, said));
    }
    drop(world);
}

#[test]
fn packages_of_a_template_are_added_to_those_before() {
    let world = World::new();
    let template = json!({ "id": "bbbbbbbbbbbbe", "name": "web", "version": 1, "owner": "uid:0",
        "spec": { "source": "debian", "packages": ["curl"], "init": "agent" },
        "versions": [], "builds": [], "created_at": "2026-01-02T03:04:05Z" });
    let tools = [("template_inspect", gives(template.clone())), ("template_update", gives(template))];
    let fake = Fake::start(&world.runtime(), tools);
    let packages = |line: &str| {
        let run = world.run(line);
        assert_eq!(run.code, 0, "{run:?}");
        fake.calls("template_update").pop().unwrap()["packages"].clone()
    };
    assert_eq!(packages("template update web -p nginx -p curl"), json!(["curl", "nginx"]));
    assert_eq!(packages("template update web --remove-package curl -p git"), json!(["git"]));
    assert_eq!(packages("template update web --no-packages -p git"), json!(["git"]));
    assert_eq!(packages("template update web --no-packages"), json!([]));
    assert_eq!(packages("template update web --init agent"), Value::Null);
    assert_eq!(world.run("template update web --remove-package git").code, 2);
}

#[test]
fn a_download_that_is_not_the_default_says_so() {
    let world = World::new();
    let asset = |default: bool| {
        json!({ "done": true, "op_id": "ccccccccccccc", "state": "succeeded", "progress": { "step": "" },
            "result": { "id": "bbbbbbbbbbbbe", "name": "debian-6-1", "kind": "kernel", "provider": "debian", "version": "6.1",
                "arch": "x86_64", "installed": true, "default": default, "drivers": [] } })
    };
    for (default, told) in [(false, true), (true, false)] {
        let world = World::new();
        let _fake = Fake::start(&world.runtime(), [("asset_download", gives(asset(default)))]);
        let run = world.run("kernel download debian 6.1");
        assert_eq!((run.code, run.stderr.contains("--make-default")), (0, told), "{run:?}");
    }
    drop(world);
}

#[test]
fn a_client_is_configured_only_for_what_exists() {
    let world = World::new();
    let file = world.root.path().join(".cursor/mcp.json");
    // The sets of tools are known without a daemon.
    for line in
        ["mcp install cursor --tools nosuch", "mcp config cursor --tools work,nosuch", "mcp --tools nosuch"]
    {
        let run = world.run(line);
        assert_eq!((run.code, run.text()), (2, ""), "{line}: {run:?}");
        assert!(run.stderr.contains("unknown set of tools `nosuch`; valid: work"), "{line}: {}", run.stderr);
    }
    assert!(!file.exists());

    let missing = || fails("vm_not_found", "there is no VM nosuch", "call vm_list to see the VMs");
    let fake = Fake::start(&world.runtime(), [("vm_inspect", missing())]);
    for verb in ["config", "install"] {
        let run = world.run(&format!("mcp {verb} cursor --vm nosuch"));
        assert_eq!((run.code, run.text()), (3, ""), "{run:?}");
        assert!(run.stderr.starts_with("error: there is no VM nosuch\n"), "{}", run.stderr);
    }
    assert!(!file.exists());
    // The daemon behind an address may be another one.
    let other = world.run("mcp config cursor --vm nosuch --http=http://127.0.0.1:9/mcp");
    assert_eq!(other.code, 0, "{other:?}");
    assert!(other.stderr.contains("warning: cannot check whether VM nosuch exists"), "{}", other.stderr);
    assert_eq!(world.run("mcp install cursor --vm nosuch --remove").code, 0);
    assert_eq!(fake.calls("vm_inspect"), vec![json!({ "vm": "nosuch" }); 3]);
    drop(fake);

    let run = world.run("mcp install cursor --vm nosuch");
    assert_eq!(run.code, 0, "{run:?}");
    assert!(
        run.stderr.contains("warning: cannot check whether VM nosuch exists: no daemon is listening"),
        "{}",
        run.stderr
    );
    assert!(file.exists());
}
