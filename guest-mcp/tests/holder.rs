//! Commands outlive the agent and whoever started them; what holds them stays small.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use common::{Client, Guest, configure, facts, holder, processes_with, spawn, stream, until, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::pty::OpenptFlags;
use serde_json::{Value, json};

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

fn sigkill(pid: u32) {
    send(pid, Signal::SIGKILL);
}

/// Kills the agent and starts another one in its place.
fn replace_agent(guest: &mut Guest) {
    sigkill(guest.process.id());
    wait(&mut guest.process);
    guest.process = spawn(guest.directory.path(), &[]);
    guest.host.welcome(configure());
}

fn memory(pid: u32) -> u64 {
    common::memory(pid, "RssAnon:")
}

fn states(client: &mut Client, ids: &[Value]) -> Vec<Value> {
    let list = client.good("command_list", json!({ "limit": 500 }));
    let commands = facts(&list)["commands"].as_array().unwrap();
    let state = |id| {
        commands
            .iter()
            .find(|command| &command["command_id"] == id)
            .map_or(Value::Null, |c| c["state"].clone())
    };
    ids.iter().map(state).collect()
}

#[test]
fn commands_go_on_and_are_found_again_when_the_agent_is_killed() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    let go = guest.path("go");
    let mut ids = Vec::new();
    for number in 0..10 {
        let line = format!(
            "echo first {number}; until [ -e {go} ]; do sleep 0.05; done; echo last {number}; exit {number}"
        );
        ids.push(facts(&client.good("command_start", json!({ "command": line })))["command_id"].clone());
    }
    let terminal = client.good("command_start", json!({ "command": "read l; echo got $l", "tty": true }));
    let terminal = &facts(&terminal)["command_id"];
    // A call is under way as well.
    let line = format!("echo waited for; until [ -e {go} ]; do sleep 0.05; done; seq 1 1000000");
    client.begin_call("run_command", json!({ "command": line }));
    until("it is there", || {
        let list = guest.client().good("command_list", json!({}));
        facts(&list)["commands"].as_array().unwrap().len() == 12
    });

    replace_agent(&mut guest);
    let mut client = guest.client();
    assert_eq!(states(&mut client, &ids), vec![json!("running"); 10]);
    std::fs::write(&go, "").unwrap();
    for (number, id) in ids.iter().enumerate() {
        until("it has ended", || states(&mut client, std::slice::from_ref(id)) == [json!("ended")]);
        let result = client.good("command_output", json!({ "id": id }));
        assert_eq!(stream(&result, "stdout"), format!("first {number}\nlast {number}\n"));
        assert_eq!(facts(&result)["exit_code"], number);
    }
    client.good("command_input", json!({ "id": terminal, "input": "through\n" }));
    until("the terminal works", || {
        let result = client.good("command_output", json!({ "id": terminal, "wait_ms": 100 }));
        stream(&result, "stdout").ends_with("got through\n")
    });
    let list = client.good("command_list", json!({}));
    let commands = facts(&list)["commands"].as_array().unwrap().clone();
    let waited = commands.iter().find(|c| c["command"].as_str().unwrap().starts_with("echo waited")).unwrap();
    let mut result = Value::Null;
    until("all of its output is there", || {
        result = client.good("command_output", json!({ "id": waited["command_id"] }));
        facts(&result)["state"] == "ended"
    });
    assert_eq!(facts(&result)["stdout"]["total_bytes"], 6_888_896 + 11);
}

/// As in a checkpoint whose agent is killed, when the holder waits for a command that stands still before it has begun.
#[test]
fn an_agent_says_hello_beside_a_holder_that_stands_still_and_finds_it_later() {
    let mut guest = Guest::start();
    let begun =
        guest.client().good("command_start", json!({ "command": "read l; echo got $l", "tty": true }));
    let id = &facts(&begun)["command_id"];
    let holder = holder(&guest);
    send(holder, Signal::SIGSTOP);
    replace_agent(&mut guest);
    let mut client = guest.client();
    assert_eq!(client.request("ping", json!({}))["result"], json!({}));
    send(holder, Signal::SIGCONT);
    client.good("command_input", json!({ "id": id, "input": "through\n" }));
    until("the terminal works", || {
        let result = client.good("command_output", json!({ "id": id, "wait_ms": 100 }));
        stream(&result, "stdout").ends_with("got through\n")
    });
}

#[test]
fn an_orderly_end_ends_the_commands_of_a_holder_that_was_not_found_at_first() {
    let mut guest = Guest::start();
    let mark = format!("{}.015625", 30_000 + std::process::id());
    guest.client().good("command_start", json!({ "argv": ["sleep", mark] }));
    until("it runs", || processes_with(&format!("sleep\0{mark}")) == 1);
    let holder = holder(&guest);
    send(holder, Signal::SIGSTOP);
    replace_agent(&mut guest);
    send(holder, Signal::SIGCONT);
    send(guest.process.id(), Signal::SIGTERM);
    wait(&mut guest.process);
    // Without an agent, it would keep them for a while.
    assert_eq!(processes_with(&format!("sleep\0{mark}")), 0);
}

#[test]
fn what_a_killed_holder_had_is_told_as_lost() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.0625", 20_000 + std::process::id());
    let line = format!("sleep {mark} & setsid sleep {mark}");
    let result = client.good("run_command", json!({ "command": line, "yield_after_s": 0.3 }));
    let id = facts(&result)["command_id"].clone();
    let ended = client.good("run_command", json!({ "argv": ["true"] }));
    let ended = facts(&ended)["command_id"].clone();
    until("it runs", || processes_with(&format!("sleep\0{mark}")) == 2);
    let call = client.begin_call("run_command", json!({ "argv": ["sleep", mark] }));
    until("the call runs", || processes_with(&format!("sleep\0{mark}")) == 3);
    until("it is in the list", || {
        let list = client.good("command_list", json!({}));
        facts(&list)["commands"].as_array().unwrap().len() == 3
    });

    sigkill(holder(&guest));
    let answer = client.read();
    assert_eq!((&answer["id"], &answer["result"]["isError"]), (&json!(call), &json!(true)), "{answer}");
    assert!(answer.to_string().contains("the command holder was killed"), "{answer}");
    let list = client.good("command_list", json!({}));
    let commands = facts(&list)["commands"].as_array().unwrap();
    assert_eq!(commands.len(), 2, "{list}");
    let lost = commands.iter().find(|command| command["command_id"] == id).unwrap();
    assert_eq!(lost["state"], "lost");
    assert!(lost["problem"].as_str().unwrap().contains("was killed"), "{lost}");
    until("nothing of it is left", || processes_with(&format!("sleep\0{mark}")) == 0);
    assert_eq!(client.bad("command_output", json!({ "id": id })), "command_not_found");
    let said = client.call("command_output", json!({ "id": id })).to_string();
    assert!(said.contains("is lost"), "{said}");
    assert_eq!(client.bad("command_output", json!({ "id": ended })), "command_not_found");
    // All goes on.
    assert_eq!(stream(&client.good("run_command", json!({ "command": "echo again" })), "stdout"), "again\n");
}

/// The holder leads a session: a terminal that it opens could become its own, and would hang it up.
#[test]
fn a_terminal_in_the_place_of_a_file_ends_no_command() {
    let guest = Guest::start();
    let mut client = guest.client();
    let started = client.good("command_start", json!({ "argv": ["sleep", "600"] }));
    let id = facts(&started)["command_id"].clone();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = rustix::pty::openpt(flags).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    // Somebody still has it open when it is hung up.
    let _theirs = rustix::pty::ioctl_tiocgptpeer(&terminal, flags).unwrap();
    let path = rustix::pty::ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
    for place in ["stdin_path", "log"] {
        let arguments = json!({ "argv": ["true"], (place): path });
        assert_eq!(client.bad("run_command", arguments), "file_refused", "{place}");
    }
    drop(terminal);
    assert_eq!(states(&mut client, std::slice::from_ref(&id)), [json!("running")]);
    client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
}

#[test]
fn a_connection_that_ends_leaves_its_commands_running_and_to_be_found() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.125", 40_000 + std::process::id());
    let arguments = json!({ "command": format!("echo begun; sleep {mark}") });
    let meta = json!({ "dev.nexus/client": "somebody" });
    client.begin("tools/call", json!({ "name": "run_command", "arguments": arguments, "_meta": meta }));
    until("the command runs", || processes_with(&format!("sleep\0{mark}")) == 1);
    drop(client);
    let mut client = guest.client();
    let list = client.good("command_list", json!({}));
    let found = &facts(&list)["commands"][0];
    assert_eq!((&found["state"], &found["client"]), (&json!("running"), &json!("somebody")), "{list}");
    let result = client.good("command_output", json!({ "id": found["command_id"] }));
    assert_eq!(stream(&result, "stdout"), "begun\n");
    assert_eq!(processes_with(&format!("sleep\0{mark}")), 1);

    // So does a caller that is cut off, as the host says it; one that cancels does not.
    let id = client.begin_call("run_command", json!({ "argv": ["sleep", mark] }));
    until("the command runs", || processes_with(&format!("sleep\0{mark}")) == 2);
    let cancel = |id: i64, reason: &str| json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": id, "reason": reason } });
    client.send(&cancel(id, nexus_schema::link::CUT_OFF));
    let id = client.begin_call("run_command", json!({ "argv": ["sleep", format!("{mark}1")] }));
    until("another one runs", || processes_with(&format!("sleep\0{mark}1")) == 1);
    client.send(&cancel(id, "cancelled by the caller"));
    until("it is gone", || processes_with(&format!("sleep\0{mark}1")) == 0);
    assert_eq!(processes_with(&format!("sleep\0{mark}")), 2);
    let mut running = Vec::new();
    // Its end may be noted a moment after its process is gone.
    until("only two are left", || {
        let list = client.good("command_list", json!({}));
        let commands = facts(&list)["commands"].as_array().unwrap();
        running = commands.iter().filter(|command| command["state"] == "running").cloned().collect();
        running.len() == 2
    });
    for command in running {
        client.good("command_signal", json!({ "id": command["command_id"], "signal": "KILL" }));
    }
}

/// 100 at once, and more output than is kept: the agent answers, and what is kept has a limit for all together.
#[test]
fn many_commands_and_much_output_are_bounded() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mut ids = Vec::new();
    for _ in 0..100 {
        // 16 MiB each, 1.6 GiB in all; more than the quarter of it would be wanted.
        let arguments =
            json!({ "command": "head -c 16777216 /dev/zero; echo done >&2", "keep_bytes": 16_777_216 });
        ids.push(facts(&client.good("command_start", arguments))["command_id"].clone());
    }
    let (holder, mut peak, mut slowest) = (holder(&guest), 0, Duration::ZERO);
    until("all have ended", || {
        peak = peak.max(memory(holder));
        let begun = Instant::now();
        client.good("os_info", json!({}));
        slowest = slowest.max(begun.elapsed());
        states(&mut client, &ids).iter().all(|state| state == "ended")
    });
    // The C library of tests keeps some of what it was given back.
    assert!(peak < 192 << 20, "the holder had {peak} bytes");
    assert!(slowest < Duration::from_secs(5), "the agent answered after {slowest:?}");
    let mut kept = 0;
    for id in &ids {
        let result = client.good("command_output", json!({ "id": id, "limit": 1 }));
        let stdout = &facts(&result)["stdout"];
        assert_eq!(stdout["total_bytes"], 16_777_216);
        kept += 16_777_216 - stdout["dropped_bytes"].as_u64().unwrap_or(0);
    }
    assert!((4 << 20..=64 << 20).contains(&kept), "{kept} bytes are kept");
    assert!(memory(guest.process.id()) < 16 << 20, "the agent has {} bytes", memory(guest.process.id()));
}

/// What has ended is forgotten, the oldest first; what runs never is.
#[test]
fn only_so_many_that_ended_are_remembered() {
    let guest = Guest::start();
    let mut client = guest.client();
    let running = client.good("command_start", json!({ "argv": ["sleep", "600"] }));
    let first = client.good("run_command", json!({ "argv": ["true"] }));
    for _ in 0..257 {
        client.good("run_command", json!({ "argv": ["true"] }));
    }
    let list = client.good("command_list", json!({ "limit": 500 }));
    assert_eq!(facts(&list)["commands"].as_array().unwrap().len(), 257);
    assert_eq!(
        client.bad("command_output", json!({ "id": facts(&first)["command_id"] })),
        "command_not_found"
    );
    client.good("command_signal", json!({ "id": facts(&running)["command_id"], "signal": "KILL" }));
}

#[test]
fn a_holder_without_an_agent_kills_its_commands_and_goes() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.03125", 10_000 + std::process::id());
    client.good("command_start", json!({ "argv": ["sleep", mark] }));
    let holder = holder(&guest);
    drop(guest);
    until("nothing is left of it", || {
        processes_with(&format!("sleep\0{mark}")) == 0
            && !std::path::Path::new(&format!("/proc/{holder}")).exists()
    });
    // Nobody is confused by a socket that nobody listens on.
    let guest = Guest::start_configured(|root, _| {
        std::fs::create_dir_all(root.join("commands")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(root.join("commands/socket")));
    });
    guest.client().good("run_command", json!({ "argv": ["true"] }));
    // A holder is nobody's business but the agent's.
    let mut alone = std::process::Command::new(env!("CARGO_BIN_EXE_nexus-guest"));
    let status = alone.arg0("nexus-guest").arg("hold").status().unwrap();
    assert_eq!(status.code(), Some(2));
}
