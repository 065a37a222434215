//! Long work, from the call that starts it to its end.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::fake::{Caller, Fake, Tool, World, fails, finish, structured};

const OP: &str = "ccccccccccccc";

fn details() -> Value {
    json!({ "id": "bbbbbbbbbbbbe", "name": "web-1", "state": "ready", "owner": "uid:0", "vcpus": 1, "memory": "512MiB",
        "driver": "qemu", "init": "agent", "network": "none", "image": { "name": "busybox" }, "kernel": "k",
        "drives": [], "cid": 3, "console_log": "/c", "protected": false, "tags": {},
        "created_at": "2026-01-02T03:04:05Z", "generation": 1 })
}

fn outcome(step: &str, result: Option<Value>) -> Value {
    let mut outcome = json!({ "done": result.is_some(), "op_id": OP, "progress": { "step": step },
        "state": if result.is_some() { "succeeded" } else { "running" },
        "subject_id": "bbbbbbbbbbbbe", "subject_name": "web-1" });
    if let Some(result) = result {
        outcome["result"] = result;
    }
    structured(&outcome)
}

fn create() -> Tool {
    Box::new(|_, _| Some(outcome("queued", None)))
}

#[test]
fn work_is_followed_to_its_end() {
    let world = World::new();
    let polls = std::sync::atomic::AtomicUsize::new(0);
    let get: Tool = Box::new(move |_, caller: &Caller| {
        if polls.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            caller.progress(1, "downloading kernel");
            caller.progress(2, "downloading kernel: 31%");
            caller.progress(3, "downloading kernel: 1048576");
            return Some(outcome("making the drive", None));
        }
        Some(outcome("ready", Some(details())))
    });
    let fake = Fake::start(&world.runtime(), [("vm_create", create()), ("op_get", get)]);
    insta::assert_snapshot!(world.run("vm create web-1 --from busybox -m 1G").shown(), @"
    exit 0
    --- stdout
    NAME   ID             STATE  IMAGE    CPUS  MEMORY   BOOTED IN
    web-1  bbbbbbbbbbbbe  ready  busybox  1     512 MiB
    --- stderr
    queued
    downloading kernel
    making the drive
    ready
    ");
    assert_eq!(
        fake.calls("vm_create"),
        [json!({ "name": "web-1", "from": "busybox", "memory": "1GiB", "wait_s": 0 })]
    );
    assert_eq!(fake.calls("op_get")[0], json!({ "op_id": OP, "wait_s": 10 }));
    assert_eq!(world.run("vm create -q").shown(), "exit 0\n--- stdout\nbbbbbbbbbbbbe\n--- stderr\n");
    assert_eq!(world.run("vm create --json").json()["result"], details());
}

#[test]
fn what_is_so_already_is_told() {
    let world = World::new();
    let with = |state: &str, step: &str| {
        let mut details = details();
        details["state"] = state.into();
        outcome(step, Some(details))
    };
    let stop: Tool = Box::new(move |_, _| Some(with("stopped", "nothing to do")));
    let start: Tool = Box::new(move |_, _| Some(with("ready", "nothing to do")));
    let _fake = Fake::start(&world.runtime(), [("vm_stop", stop), ("vm_start", start)]);
    assert_eq!(world.run("vm stop web-1").text(), "web-1 was already stopped\n");
    assert_eq!(world.run("vm start web-1").text(), "web-1 was already ready\n");
}

#[test]
fn detached_work_is_left_alone() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("vm_create", create())]);
    for line in ["vm create --detach", "vm create --wait 0"] {
        let run = world.run(line);
        assert_eq!((run.code, run.text()), (0, "web-1\n"));
        let said = format!("creating web-1 (op {OP}): follow it with `nexusctl op get {OP}`");
        assert!(run.stderr.starts_with(&said), "{}", run.stderr);
    }
    assert!(fake.calls("op_get").is_empty());
}

#[test]
fn failures_of_the_work_are_the_commands() {
    let world = World::new();
    let get = fails("boot_failed", "web-1 did not boot: Kernel panic", "see vm_logs");
    let _fake = Fake::start(&world.runtime(), [("vm_create", create()), ("op_get", get)]);
    let run = world.run("vm create");
    assert_eq!((run.code, run.text()), (1, ""));
    assert!(
        run.stderr.ends_with("error: web-1 did not boot: Kernel panic\nhint: see `nexusctl vm logs web-1`\n"),
        "{}",
        run.stderr
    );
}

#[test]
fn time_is_up_when_it_is_limited() {
    let world = World::new();
    let get: Tool = Box::new(|_, _| {
        std::thread::park_timeout(std::time::Duration::from_millis(300));
        Some(outcome("downloading", None))
    });
    let _fake = Fake::start(&world.runtime(), [("vm_create", create()), ("op_get", get)]);
    let run = world.run("vm create --wait 1");
    assert_eq!(run.code, 5);
    assert!(
        run.stderr.contains(&format!("hint: it is still running: follow it with `nexusctl op get {OP}`")),
        "{run:?}"
    );
}

#[test]
fn ctrl_c_leaves_the_work_and_says_how_to_go_on() {
    let world = World::new();
    let get: Tool = Box::new(|_, caller: &Caller| {
        caller.wait_for("notifications/cancelled");
        None
    });
    let fake = Fake::start(&world.runtime(), [("vm_create", create()), ("op_get", get)]);
    let mut command = world.command("vm create");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    fake.wait(|messages| messages.iter().any(|m| m["params"]["name"] == "op_get"));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let run = finish(child);
    assert_eq!((run.code, run.text()), (130, ""));
    assert!(run.stderr.contains(&format!("operation {OP} is still running")), "{}", run.stderr);
    fake.wait(|messages| messages.iter().any(|m| m["method"] == "notifications/cancelled"));
    assert!(fake.calls("op_cancel").is_empty());
}

#[test]
fn ctrl_c_cancels_a_command_in_the_guest() {
    let world = World::new();
    let run_command: Tool = Box::new(|_, _| None);
    let fake = Fake::start(&world.runtime(), [("guest_run_command", run_command)]);
    let mut command = world.command("guest run web-1 -- sleep 100");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    fake.wait(|messages| messages.iter().any(|m| m["params"]["name"] == "guest_run_command"));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(finish(child).code, 130);
    let is_cancel = |m: &Value| m["method"] == "notifications/cancelled";
    fake.wait(|messages| messages.iter().any(is_cancel));
    let messages = fake.messages();
    let call = messages.iter().find(|m| m["method"] == "tools/call").unwrap();
    assert_eq!(messages.iter().find(|m| is_cancel(m)).unwrap()["params"]["requestId"], call["id"]);
}
