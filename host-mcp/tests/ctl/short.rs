//! The verbs that users of other tools type first: each does what its name says.

use std::process::Stdio;
use std::sync::Mutex;
use std::time::SystemTime;

use data_encoding::BASE64;
use nexus_schema::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::fake::{Caller, Fake, Tool, World, fails, finish, gives, structured};

const OP: &str = "ccccccccccccc";
const VM: &str = "bbbbbbbbbbbbe";

fn row(name: &str, state: &str) -> Value {
    json!({ "id": VM, "name": name, "state": state, "image": "busybox", "vcpus": 1, "memory": "512MiB",
        "created_at": "2026-01-02T03:04:05Z", "protected": false, "tags": {}, "something_new": 1 })
}

fn details(state: &str) -> Value {
    json!({ "id": VM, "name": "web-1", "state": state, "owner": "uid:0", "vcpus": 1, "memory": "512MiB",
        "driver": "qemu", "init": "agent", "network": "none", "image": { "id": "ddddddddddddi", "name": "py" }, "kernel": "k",
        "drives": [], "cid": 3, "console_log": "/c", "protected": false, "tags": {},
        "created_at": "2026-01-02T03:04:05Z", "generation": 1 })
}

fn ended(result: Value) -> Value {
    json!({ "done": true, "op_id": OP, "state": "succeeded", "progress": { "step": "ready" },
        "subject_id": VM, "subject_name": "web-1", "result": result })
}

fn image(entrypoint: &[&str], cmd: &[&str]) -> Value {
    json!({ "id": "ddddddddddddi", "name": "py", "source": "oci:py", "installed": true, "default": false, "init": "agent",
        "arch": "x86_64", "used_by": 1, "config": { "entrypoint": entrypoint, "cmd": cmd, "user": "app:app" } })
}

/// A guest in which every command ends with this code.
fn runs(code: i32) -> Tool {
    Box::new(move |arguments: &Value, _: &Caller| {
        let stream = json!({ "total_bytes": 5, "omitted_bytes": 0, "lossy": false });
        let facts = json!({ "exit_code": code, "timed_out": false, "duration_ms": 1, "stdout": stream, "stderr": stream });
        let said = BASE64.encode(format!("{}\n", arguments["argv"]).as_bytes());
        Some(json!({ "_meta": { "dev.nexus/result": facts }, "content": [
            { "type": "text", "text": said, "_meta": { "dev.nexus/stream": "stdout" } },
        ]}))
    })
}

fn gone() -> Value {
    json!({ "done": true, "deleted": [{ "id": VM, "name": "web-1", "drives": [] }] })
}

fn cancelled() -> Value {
    json!({ "op_id": OP, "tool": "vm_create", "state": "succeeded", "owner": "uid:0", "progress": { "step": "" },
        "started_at": "2026-01-02T03:04:05Z" })
}

#[test]
fn ps_shows_what_runs_and_ls_shows_all() {
    let world = World::new();
    let vms =
        json!({ "vms": [row("a", "ready"), row("b", "stopped"), row("c", "starting"), row("d", "failed")] });
    let _fake = Fake::start(&world.runtime(), [("vm_list", gives(vms.clone()))]);
    let names = |line: &str| -> Vec<String> {
        let run = world.run(line);
        run.text().lines().skip(1).filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
    };
    for (line, shown) in [
        ("ps", &["a", "c"][..]),
        ("vm ps", &["a", "c"]),
        ("ps -a", &["a", "b", "c", "d"]),
        ("ps --state failed", &["a", "b", "c", "d"]),
        ("ls", &["a", "b", "c", "d"]),
        ("vm ls", &["a", "b", "c", "d"]),
    ] {
        assert_eq!(names(line), shown, "{line}");
    }
    assert!(world.run("ps").stderr.contains("2 VMs are not running: `nexusctl ps -a`"));
    let json = world.run("ps --json").json();
    assert_eq!(json, json!({ "vms": [vms["vms"][0], vms["vms"][2]] }));
    assert_eq!(world.run("ps -q").text(), format!("{VM}\n{VM}\n"));
}

#[test]
fn verbs_for_power_call_what_they_say() {
    let world = World::new();
    let tools = [
        ("vm_start", gives(ended(details("ready")))),
        ("vm_stop", gives(ended(details("stopped")))),
        ("vm_restart", gives(ended(details("ready")))),
    ];
    let fake = Fake::start(&world.runtime(), tools);
    let calls = || {
        let messages = fake.messages();
        let calls = messages.iter().filter(|m| m["method"] == "tools/call");
        calls
            .map(|m| (m["params"]["name"].clone(), m["params"]["arguments"]["force"].clone()))
            .collect::<Vec<_>>()
    };
    let (start, stop) = ((json!("vm_start"), Value::Null), (json!("vm_stop"), Value::Null));
    let kill = (json!("vm_stop"), json!(true));
    for (line, said, called) in [
        ("start web-1", "web-1 ready\n", vec![start]),
        ("stop web-1", "web-1 stopped\n", vec![stop]),
        ("kill web-1", "web-1 stopped\n", vec![kill.clone()]),
        ("vm kill web-1", "web-1 stopped\n", vec![kill]),
        ("restart web-1", "web-1 ready\n", vec![(json!("vm_restart"), Value::Null)]),
        ("vm restart -f web-1", "web-1 ready\n", vec![(json!("vm_restart"), json!(true))]),
    ] {
        let before = calls().len();
        let run = world.run(line);
        assert_eq!((run.code, run.text()), (0, said), "{line}: {run:?}");
        assert_eq!(calls()[before..], called, "{line}");
    }
}

#[test]
fn what_is_meant_for_one_boot_says_so() {
    const BOOT: &str = "aaaaaaaaaaaac";
    let world = World::new();
    let port = json!({ "guest_port": 80, "host_port": 8080, "address": "127.0.0.1:8080" });
    let tools = [
        ("vm_start", gives(ended(details("ready")))),
        ("vm_stop", gives(ended(details("stopped")))),
        ("vm_restart", gives(ended(details("ready")))),
        ("vm_publish", gives(port.clone())),
        ("vm_unpublish", gives(json!({ "unpublished": [port] }))),
    ];
    let fake = Fake::start(&world.runtime(), tools);
    for (line, tool) in [
        ("start web-1", "vm_start"),
        ("stop web-1", "vm_stop"),
        ("restart web-1", "vm_restart"),
        ("vm publish web-1 80", "vm_publish"),
        ("vm unpublish web-1 80", "vm_unpublish"),
    ] {
        for (option, given) in [(String::new(), Value::Null), (format!(" --if-boot-id {BOOT}"), json!(BOOT))]
        {
            let run = world.run(&format!("{line}{option}"));
            assert_eq!(run.code, 0, "{line}{option}: {run:?}");
            assert_eq!(fake.calls(tool).pop().unwrap()["if_boot_id"], given, "{line}{option}");
        }
    }
}

#[test]
fn a_vm_gets_another_name() {
    let world = World::new();
    let mut renamed = details("ready");
    renamed["name"] = "web-2".into();
    let fake = Fake::start(&world.runtime(), [("vm_rename", gives(renamed))]);
    let run = world.run("rename web-1 web-2");
    assert_eq!((run.code, run.text()), (0, "web-1 is now named web-2\n"));
    assert_eq!(fake.calls("vm_rename"), [json!({ "vm": "web-1", "name": "web-2" })]);
}

#[test]
fn wait_asks_until_it_is_so_or_too_late() {
    let world = World::new();
    let said = |done: bool| {
        json!({ "done": done, "id": VM, "name": "web-1", "state": "ready", "waited_ms": 1, "status": done.then_some(3),
            "waiting_for": "a server on port 80" })
    };
    let wait: Tool =
        Box::new(move |_, caller: &Caller| Some(structured(&said(caller.count("vm_wait") != 1))));
    let fake = Fake::start(&world.runtime(), [("vm_wait", wait)]);
    let run = world.run("wait web-1 --port 80");
    assert_eq!((run.code, run.text()), (0, "web-1 ready\n"), "{run:?}");
    assert_eq!(fake.calls("vm_wait")[1], json!({ "vm": "web-1", "port": 80, "wait_s": 45 }));
    assert_eq!(world.run("wait web-1 --command aaaaaaaaaaaac").text(), "3\n");
    assert_eq!(world.run("wait web-1 --port 80 --file /x").code, 2);

    drop(fake);
    let _fake = Fake::start(&world.runtime(), [("vm_wait", gives(said(false)))]);
    let late = world.run("wait web-1 --port 80 --timeout 0");
    assert_eq!((late.code, late.text()), (5, ""), "{late:?}");
    assert!(late.stderr.contains("waited 0s for a server on port 80 in vain"), "{}", late.stderr);
}

#[test]
fn stats_are_what_guests_say() {
    let world = World::new();
    let os: Tool = Box::new(|arguments: &Value, caller: &Caller| {
        assert_eq!(arguments["vm"], VM);
        if caller.count("guest_os_info") > 1 {
            return fails("guest_unreachable", "b does not answer", "")(arguments, caller);
        }
        Some(structured(&json!({ "hostname": "a", "kernel": "6.1", "arch": "x86_64", "cpus": 1,
            "memory_total_bytes": 500 << 20, "memory_available_bytes": 400 << 20, "disk_total_bytes": 8_u64 << 30,
            "disk_available_bytes": 7_u64 << 30, "load": [0.5, 0.25, 0.0], "uptime_s": 75.5, "init": "agent", "agent": "0.1.0" })))
    });
    let vms = json!({ "vms": [row("a", "ready"), row("b", "ready"), row("c", "stopped")] });
    let _fake = Fake::start(&world.runtime(), [("vm_list", gives(vms)), ("guest_os_info", os)]);
    insta::assert_snapshot!(world.run("stats").shown(), @"
    exit 0
    --- stdout
    NAME  STATE  UP          CPUS  CPU  LOAD  MEMORY              HOST MEM  DISK            ON HOST  NET OUT / IN
    a     ready  1 min 15 s  1     -    0.50  100 MiB of 500 MiB  -         1 GiB of 8 GiB  -        -
    b     ready  -           1     -    -     - of 512 MiB        -         -               -        -
    --- stderr
    ");
}

#[test]
fn run_makes_a_vm_for_one_command_and_deletes_it() {
    let world = World::new();
    let tools = [
        ("vm_create", gives(ended(details("ready")))),
        ("image_inspect", gives(image(&["entry.sh"], &["serve"]))),
        ("guest_run_command", runs(3)),
        ("op_cancel", gives(cancelled())),
        ("vm_delete", gives(gone())),
    ];
    let fake = Fake::start(&world.runtime(), tools);
    let run = world.run("run --cpus 2 -m 1G -e A=B python:3.12 python -V");
    assert_eq!((run.code, run.text()), (3, "[\"entry.sh\",\"python\",\"-V\"]\n"), "{run:?}");
    assert_eq!(
        fake.calls("vm_create"),
        [
            json!({ "from": "oci:python:3.12", "vcpus": 2, "memory": "1GiB", "ttl": "2m", "idle_stop": "0s", "wait_s": 0 })
        ]
    );
    let call = fake.calls("guest_run_command").pop().unwrap();
    assert_eq!((&call["env"], &call["user"]), (&json!({ "A": "B" }), &json!("app")));
    assert_eq!(fake.calls("vm_delete"), [json!({ "vm": VM, "force": true })]);

    // As the image means it, and as another user.
    assert_eq!(world.run("run -u root python:3.12").text(), "[\"entry.sh\",\"serve\"]\n");
    assert_eq!(fake.calls("guest_run_command").pop().unwrap()["user"], "root");

    // The network and the time to live are the VM's own; without --keep it is renewed up to that.
    assert_eq!(world.run("run --network none --ttl 1h python:3.12 -- true").code, 3);
    let made = fake.calls("vm_create").pop().unwrap();
    assert_eq!((&made["network"], &made["ttl"]), (&json!({ "mode": "none" }), &json!("2m")));
    assert_eq!(world.run("run --ttl 90s python:3.12 -- true").code, 3);
    assert_eq!(fake.calls("vm_create").pop().unwrap()["ttl"], "1m30s");
    assert_eq!(world.run("run --keep --ttl 1h python:3.12 -- true").code, 3);
    assert_eq!(fake.calls("vm_create").pop().unwrap()["ttl"], "1h");
    let deleted = fake.calls("vm_delete").len();

    let kept = world.run("run --keep python:3.12 -- true");
    assert_eq!(kept.code, 3);
    assert!(kept.stderr.contains("VM web-1 is kept"), "{}", kept.stderr);
    assert_eq!(fake.calls("vm_delete").len(), deleted);
}

#[test]
fn run_leaves_nothing_behind_when_it_fails_or_is_interrupted() {
    let world = World::new();
    let deleted = Mutex::new(0);
    let begun = json!({ "done": false, "op_id": OP, "state": "running", "progress": { "step": "booting" },
        "subject_id": VM, "subject_name": "web-1" });
    let get: Tool = Box::new(|arguments: &Value, caller: &Caller| match caller.count("op_get") {
        1 => fails("boot_failed", "web-1 did not boot", "look at vm_logs")(arguments, caller),
        _ => {
            caller.wait_for("notifications/cancelled");
            None
        }
    });
    let delete: Tool = Box::new(move |arguments: &Value, caller: &Caller| {
        let mut deleted = deleted.lock().unwrap();
        *deleted += 1;
        match *deleted {
            1 => Some(structured(&gone())),
            _ => fails("vm_not_found", "there is no VM", "")(arguments, caller),
        }
    });
    let tools = [
        ("vm_create", gives(begun)),
        ("op_get", get),
        ("op_cancel", gives(cancelled())),
        ("vm_delete", delete),
    ];
    let fake = Fake::start(&world.runtime(), tools);
    let run = world.run("run busybox:1 -- true");
    assert_eq!(run.code, 1, "{run:?}");
    assert!(
        run.stderr.ends_with("error: web-1 did not boot\nhint: look at `nexusctl vm logs web-1`\n"),
        "{}",
        run.stderr
    );
    assert_eq!(fake.calls("vm_delete").len(), 1);

    for (signal, calls) in [(Signal::INT, 2), (Signal::TERM, 3)] {
        let mut command = world.command("run busybox:1 -- true");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let polls = fake.calls("op_get").len();
        fake.wait(|messages| messages.iter().filter(|m| m["params"]["name"] == "op_get").count() > polls);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let run = finish(child);
        assert_eq!((run.code, run.stderr.as_str()), (130, "booting\nerror: interrupted\n"));
        assert_eq!(fake.calls("op_cancel").len(), calls);
        // One that the cancellation took away already is nothing to complain about.
        assert_eq!(fake.calls("vm_delete").len(), calls);
    }
}

#[test]
fn run_refuses_an_image_without_a_command_before_it_makes_a_vm() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("image_inspect", gives(image(&[], &[])))]);
    let run = world.run("run debian");
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("has no default command"), "{}", run.stderr);
    assert!(fake.calls("vm_create").is_empty());
}

#[test]
fn pull_takes_from_a_registry_and_says_what_is_here_already() {
    let world = World::new();
    let create: Tool = Box::new(|arguments: &Value, caller: &Caller| {
        let is_plan = arguments["dry_run"] == true;
        match (is_plan, caller.count("image_create")) {
            (true, _) => Some(structured(&json!({ "plan": {
                "makes": "image", "name": "oci-py", "download_bytes": 0, "free_bytes": 0, "steps": [] } }))),
            (false, 1) => Some(structured(&ended(image(&[], &["python3"])))),
            (false, _) => {
                fails("name_taken", "image oci-py already exists", "choose another name")(arguments, caller)
            }
        }
    });
    let fake =
        Fake::start(&world.runtime(), [("image_create", create), ("image_inspect", gives(image(&[], &[])))]);
    let run = world.run("pull python:3.12");
    assert_eq!((run.code, run.text().contains("py")), (0, true), "{run:?}");
    assert_eq!(fake.calls("image_create"), [json!({ "from": "oci:python:3.12", "wait_s": 0 })]);
    let again = world.run("pull python:3.12");
    assert_eq!(again.code, 0, "{again:?}");
    assert!(again.stderr.contains("the image is already up to date"), "{again:?}");
    assert_eq!(fake.calls("image_inspect"), [json!({ "image": "oci-py" })]);
    assert_eq!(world.run("pull python:3.12 --name mine").code, 4);
}

#[test]
fn whoever_waits_for_a_paused_vm_is_told_so_once() {
    let world = World::new();
    let wait: Tool = Box::new(move |_, caller: &Caller| {
        let is_done = caller.count("vm_wait") > 2;
        Some(structured(&json!({ "done": is_done, "id": VM, "name": "web-1", "waited_ms": 1,
            "state": if is_done { "ready" } else { "paused" }, "waiting_for": "state ready" })))
    });
    let fake = Fake::start(&world.runtime(), [("vm_wait", wait)]);
    let run = world.run("wait web-1");
    assert_eq!((run.code, run.text()), (0, "web-1 ready\n"), "{run:?}");
    assert_eq!(run.stderr, "web-1 is paused; to go on: nexusctl resume web-1\n");
    // The first look is short, so that this is not told late.
    assert_eq!(
        (&fake.calls("vm_wait")[0]["wait_s"], &fake.calls("vm_wait")[1]["wait_s"]),
        (&json!(1), &json!(45))
    );
}

#[test]
fn lifetimes_on_a_command_line_have_units() {
    let world = World::new();
    for line in [
        "vm update web-1 --ttl 5",
        "vm create --idle-stop 30",
        "wait web-1 --timeout 5",
        "run --ttl 10 busybox -- true",
    ] {
        let run = world.run(line);
        assert!(run.code == 2 && run.stderr.contains("has no unit"), "{line}: {run:?}");
    }
}

#[test]
fn the_audit_log_is_read_since_a_length_of_time_ago() {
    let world = World::new();
    let said = json!({ "calls": [], "last": 7 });
    let fake = Fake::start(&world.runtime(), [("audit_list", gives(said.clone()))]);
    let now = || Timestamp::from(SystemTime::now()).as_millis();
    let before = now();
    let run = world.run("audit --since 1h --until 2026-01-02T16:00:00+01:00");
    let after = now();
    assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", "no calls\n"));
    let asked = fake.calls("audit_list").pop().unwrap();
    let since: Timestamp = asked["since"].as_str().unwrap().parse().unwrap();
    assert!((before..=after).contains(&(since.as_millis() + 3_600_000)), "{asked}");
    assert_eq!((&asked["until"], &asked["limit"]), (&json!("2026-01-02T15:00:00.000Z"), &json!(500)));
    assert_eq!(world.run("audit --since 10m --json").json(), said);
    assert_eq!(world.run("audit --since yesterday").code, 2);
    assert_eq!(fake.calls("audit_list").len(), 2);
}

/// The calls of one page, newest first.
fn audited(seqs: std::ops::RangeInclusive<u64>, next: Option<&str>) -> Value {
    let call = |seq: u64| {
        json!({ "seq": seq, "at": "2026-01-02T03:04:05Z", "caller": "uid:0", "tool": "vm_list", "duration_us": 7,
        "outcome": "ok", "rule": "owner", "bytes_in": 2, "bytes_out": 3 })
    };
    let calls: Vec<Value> = seqs.rev().map(call).collect();
    json!({ "calls": calls, "last": 1200, "next_cursor": next })
}

#[test]
fn the_audit_log_since_a_time_is_read_to_its_end_and_without_one_says_that_there_is_more() {
    let world = World::new();
    let pages: Tool = Box::new(|arguments: &Value, _: &Caller| {
        Some(structured(&match (arguments["cursor"].as_str(), arguments["limit"].as_u64()) {
            (None, Some(500)) => audited(701..=1200, Some("701")),
            (Some("701"), Some(500)) => audited(201..=700, Some("201")),
            (Some("201"), Some(500)) => audited(1..=200, None),
            (None, Some(50)) => audited(1151..=1200, Some("1151")),
            (Some("701"), Some(100)) => audited(601..=700, Some("601")),
            other => panic!("{other:?}"),
        }))
    });
    let _fake = Fake::start(&world.runtime(), [("audit_list", pages)]);
    let all = world.run("audit --since 1h");
    assert_eq!((all.text().lines().count(), all.stderr.as_str()), (1201, ""));
    let whole = world.run("audit --since 1h --json").json();
    assert_eq!((whole["calls"].as_array().map(Vec::len), &whole["calls"][0]["seq"]), (Some(1200), &json!(1)));
    let some = world.run("audit");
    assert_eq!(some.text().lines().count(), 51);
    assert!(some.stderr.contains("newest 50 calls") && some.stderr.contains("--since"), "{some:?}");
    assert_eq!(world.run("-q audit -n 600").text().lines().count(), 600);
}
