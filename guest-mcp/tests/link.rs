//! The guest's side of the link: hello, configuration, ports, bye.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use common::{
    Client, Guest, Host, PATIENCE, TOKEN, configure, dial, processes_with, spawn, until, wait, within,
};
use nexus_schema::link::{ByeReason, GuestFile, GuestMessage, HostMessage, PROTOCOL};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

#[test]
fn hello_says_who_it_is_and_the_configuration_is_acknowledged() {
    let guest = Guest::start();
    let hello = &guest.said.hello;
    assert_eq!((hello.protocol, hello.token.as_deref()), (PROTOCOL, None));
    assert!(!hello.kernel.is_empty() && !hello.kernel_boot_id.is_empty() && hello.uptime_ms > 0);
    assert_eq!(guest.said.ack.token, TOKEN);
    assert_eq!(guest.said.ack.problems, Vec::<String>::new());
}

#[test]
fn two_starts_are_two_boots() {
    let (one, two) = (Guest::start(), Guest::start());
    assert_ne!(one.said.hello.kernel_boot_id, two.said.hello.kernel_boot_id);
}

#[test]
fn a_process_does_not_touch_its_host() {
    let directory = tempfile::tempdir().unwrap();
    let host = Host::bind(directory.path());
    let path = directory.path().join("not-written");
    let file = GuestFile {
        path: path.to_str().unwrap().into(),
        content_base64: "aGk=".into(),
        mode: 0o600,
        user: None,
    };
    let mut process = spawn(directory.path(), &[]);
    let said = host.welcome(nexus_schema::link::Configure { files: vec![file], ..configure() });
    assert_eq!(said.ack.problems.len(), 1);
    assert!(!path.exists());
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn shutdown_is_answered_then_bye_is_said_then_the_guest_ends() {
    for (word, reason) in [("poweroff", ByeReason::Poweroff), ("reboot", ByeReason::Reboot)] {
        let mut guest = Guest::start();
        let mut client = guest.client();
        assert_eq!(client.request("nexus/shutdown", json!({ "reason": "fly" }))["error"]["code"], -32602);
        let answer = client.request("nexus/shutdown", json!({ "reason": word }));
        assert_eq!(answer["result"], json!({}), "{answer}");
        let mut stream = guest.host.accept();
        let GuestMessage::Bye(bye) = Host::hear(&mut stream) else { panic!("expected a bye") };
        assert_eq!((bye.token.as_str(), bye.reason), (TOKEN, reason));
        Host::say(&mut stream, &HostMessage::Welcome {});
        assert_eq!(guest.wait().code(), Some(0));
    }
}

#[test]
fn a_host_that_does_not_hear_the_bye_does_not_keep_the_guest() {
    let mut guest = Guest::start();
    guest.client().request("nexus/shutdown", json!({ "reason": "poweroff" }));
    // Accepts, and says nothing.
    let _silent = guest.host.accept();
    assert_eq!(guest.wait().code(), Some(0));
}

/// A process answers what time it is; the clock of its host is none of its business.
#[test]
fn the_host_looks_at_the_clock() {
    let guest = Guest::start();
    let mut client = guest.client();
    let now = || {
        u64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap()
    };
    let before = now();
    let answer = client.request("nexus/clock", json!({ "time_unix_ns": before + 90_000_000_000 }));
    let time = answer["result"]["time_unix_ns"].as_u64().unwrap_or_else(|| panic!("{answer}"));
    assert!((before..=now()).contains(&time), "{answer}");
    let info = client.good("os_info", json!({}));
    let skew = info["structuredContent"]["clock_skew_ms"].as_i64().unwrap_or_else(|| panic!("{info}"));
    assert!((-91_000..=-80_000).contains(&skew), "{info}");
    assert!(info["content"].to_string().contains("s behind the host's"), "{info}");
    let answer = client.request("nexus/clock", json!({ "time_unix_ns": now(), "add_ns": 1 }));
    assert!(answer["error"]["message"].as_str().unwrap().contains("a process of the host"), "{answer}");
    assert_eq!(client.request("nexus/clock", json!({}))["error"]["code"], -32602);
    assert!(client.good("os_info", json!({}))["structuredContent"]["system"].is_null());
}

#[test]
fn an_older_guest_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let host = Host::bind(directory.path());
    let mut process = spawn(directory.path(), &["--protocol", "0"]);
    let mut stream = host.accept();
    let GuestMessage::Hello(hello) = Host::hear(&mut stream) else { panic!("expected a hello") };
    assert_eq!((hello.protocol, hello.min_protocol), (0, 0));
    Host::say(&mut stream, &HostMessage::Refused { reason: "too old".into() });
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn hello_is_said_again_until_somebody_listens_and_whatever_was_answered() {
    let directory = tempfile::tempdir().unwrap();
    let mut process = spawn(directory.path(), &[]);
    until("the guest listens", || directory.path().join("v.sock").exists());
    let host = Host::bind(directory.path());
    for nonsense in ["", "nonsense\n", "{}\n", "{\"type\":\"welcome\"}\n"] {
        let mut stream = host.accept();
        Host::hear(&mut stream);
        stream.get_mut().write_all(nonsense.as_bytes()).unwrap();
    }
    host.welcome(configure());
    Client::connect(directory.path()).good("os_info", json!({}));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn directories_may_have_long_names_and_stale_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let long: PathBuf = directory.path().join("d".repeat(150));
    std::fs::create_dir(&long).unwrap();
    std::fs::write(long.join("v.sock"), "stale").unwrap();
    let host = Host::bind(&long);
    let mut process = spawn(&long, &[]);
    host.welcome(configure());
    Client::connect(&long).good("os_info", json!({}));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn only_four_ports_answer_and_the_handshake_takes_its_line_only() {
    let guest = Guest::start();
    let directory = guest.directory.path();
    let long = [b'x'; 4096];
    for handshake in
        [&b"CONNECT 204\n"[..], b"CONNECT 9\n", b"CONNECT x\n", b"GET / HTTP/1.1\n", b"\n", &long]
    {
        assert!(dial(directory, handshake).is_none(), "{}", String::from_utf8_lossy(handshake));
    }
    assert!(dial(directory, b"CONNECT 201\n").is_some());
    assert!(dial(directory, b"CONNECT 202\n").is_some());
    assert!(dial(directory, b"CONNECT 203\n").is_some());
    let ping = b"CONNECT 200\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n";
    let mut line = String::new();
    std::io::BufRead::read_line(&mut dial(directory, ping).unwrap(), &mut line).unwrap();
    assert!(line.contains("\"id\":1"), "{line}");
}

#[test]
fn both_eras_are_served() {
    let guest = Guest::start();
    let mut client = guest.client();
    assert_eq!(client.request("ping", json!({}))["result"], json!({}));
    let old = client.request("tools/list", json!({}));

    let mut stream = dial(guest.directory.path(), b"CONNECT 200\n").unwrap();
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": { "name": "test", "version": "1" },
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": { "_meta": meta } });
    writeln!(stream.get_mut(), "{request}").unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stream, &mut line).unwrap();
    let new: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(new["result"]["tools"], old["result"]["tools"], "{line}");
    let names: Vec<_> = old["result"]["tools"].as_array().unwrap().iter().map(|tool| &tool["name"]).collect();
    assert_eq!(names.len(), nexus_schema::tools::guest().len());
}

#[test]
fn lines_that_are_no_requests_do_no_harm() {
    let guest = Guest::start();
    let mut client = guest.client();
    client.send_line(b"not json");
    assert_eq!(client.read()["error"]["code"], -32700);
    client.send_line(br#"{"jsonrpc":"1.0","id":7,"method":"ping"}"#);
    assert_eq!(client.read()["error"]["code"], -32600);
    client.send_line(br#"{"jsonrpc":"2.0","method":"notifications/unheard-of"}"#);
    client.send_line(format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).as_bytes());
    assert_eq!(client.read()["error"]["code"], -32700);
    assert_eq!(client.request("no/such/method", json!({}))["error"]["code"], -32601);
    let unknown = client.request("tools/call", json!({ "name": "no_such_tool", "arguments": {} }));
    assert_eq!(unknown["error"]["code"], -32602);
    client.good("os_info", json!({}));
}

#[test]
fn a_line_of_17_mib_is_answered_and_skipped() {
    let guest = Guest::start();
    let mut client = guest.client();
    client.send_line(&vec![b'x'; 17 << 20]);
    let answer = client.read();
    assert_eq!(answer["error"]["code"], -32600, "{answer}");
    client.good("os_info", json!({}));
}

#[test]
fn a_guest_that_is_told_to_go_takes_its_commands_with_it() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.25", 50_000 + std::process::id());
    client.begin_call(
        "run_command",
        json!({ "command": format!("sleep {mark} & sleep {mark}"), "timeout_s": 600 }),
    );
    until("the command runs", || processes_with(&format!("sleep\0{mark}")) == 2);
    kill(Pid::from_raw(guest.process.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(guest.wait().code(), Some(143));
    until("the command is gone", || processes_with(&mark) == 0);
}

#[test]
fn a_hundred_calls_at_once_are_all_answered() {
    let guest = Guest::start();
    let mut client = guest.client();
    let content = "x".repeat(100);
    let path = guest.path("many");
    client.good("file_write", json!({ "path": path, "content": content }));
    within(PATIENCE, move || {
        let mut open = std::collections::BTreeSet::new();
        for number in 0..100 {
            let id = match number % 4 {
                0 => client
                    .begin_call("run_command", json!({ "command": format!("echo {number}; sleep 0.05") })),
                1 => client.begin_call("file_read", json!({ "path": path })),
                2 => client.begin_call("file_stat", json!({ "path": path })),
                _ => client.begin_call("os_info", json!({})),
            };
            open.insert(id);
        }
        while !open.is_empty() {
            let answer = client.read();
            assert_eq!(answer["result"]["isError"], false, "{answer}");
            assert!(open.remove(&answer["id"].as_i64().unwrap()), "{answer}");
        }
    });
}

#[test]
fn what_takes_long_keeps_nothing_else_and_an_id_is_used_once_at_a_time() {
    let guest = Guest::start();
    let mut client = guest.client();
    let call = |id: i64, tool: &str, arguments: serde_json::Value| {
        let params = json!({ "name": tool, "arguments": arguments });
        serde_json::to_string(
            &json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params }),
        )
        .unwrap()
    };
    // All of it comes with one write.
    let lines = [
        call(
            50,
            "run_command",
            json!({ "command": "read line; echo $line", "stdin": "done\n", "timeout_s": 20 }),
        ),
        call(51, "run_command", json!({ "command": "sleep 600", "timeout_s": 600 })),
        call(51, "os_info", json!({})),
        call(52, "file_stat", json!({ "path": "/" })),
        call(53, "no_such_tool", json!({})),
        r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":51}}"#.to_owned(),
        r#"{"jsonrpc":"2.0","id":54,"method":"ping"}"#.to_owned(),
        call(54, "file_stat", json!({ "path": "/" })),
    ];
    client.send_line(lines.join("\n").as_bytes());
    let mut answers = std::collections::BTreeMap::<_, Vec<_>>::new();
    for _ in 0..6 {
        let answer = client.read();
        answers.entry(answer["id"].as_i64().unwrap()).or_default().push(answer);
    }
    assert_eq!(answers[&50][0]["result"]["content"][1]["text"], "done\n", "{answers:?}");
    let [refused] = &answers[&51][..] else { panic!("{answers:?}") };
    assert_eq!(refused["error"]["message"], "a call with this id is in progress");
    assert_eq!(answers[&52][0]["result"]["isError"], false);
    assert_eq!(answers[&53][0]["error"]["code"], -32602, "{answers:?}");
    assert_eq!(answers[&54].len(), 2, "a call may have the id of a request that was answered: {answers:?}");
    client.good("os_info", json!({}));
}

#[test]
fn bad_arguments_are_refused() {
    let binary = env!("CARGO_BIN_EXE_nexus-guest");
    for arguments in [&["--nonsense"][..], &[], &["--unix"], &["init"]] {
        let output = std::process::Command::new(binary).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage:"));
    }
    let mut process = spawn(std::path::Path::new("/no/such/directory"), &[]);
    assert_eq!(wait(&mut process).code(), Some(1));
}
