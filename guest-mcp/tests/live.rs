//! Commands that outlive their call: followed, written to, signalled, found again.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::{Duration, Instant};

use common::{Client, Guest, PATIENCE, facts, header, processes_with, stream, until};
use data_encoding::BASE64;
use serde_json::{Value, json};

/// Calls of `command_output` until the command has ended and all was read; its streams, and the last facts.
fn follow(client: &mut Client, id: &Value) -> (Vec<u8>, Vec<u8>, Value) {
    let (mut stdout, mut stderr, mut cursor) = (Vec::new(), Vec::new(), Value::Null);
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "in vain waited for the end of {id}");
        let mut arguments = json!({ "id": id, "wait_ms": 5000, "limit": 262_144, "encoding": "base64" });
        if !cursor.is_null() {
            arguments["cursor"] = cursor;
        }
        let result = client.good("command_output", arguments);
        for (name, all) in [("stdout", &mut stdout), ("stderr", &mut stderr)] {
            all.extend(BASE64.decode(stream(&result, name).as_bytes()).unwrap());
        }
        let facts = facts(&result);
        cursor = facts["cursor"].clone();
        if facts["state"] == "ended" && facts["more"].is_null() {
            return (stdout, stderr, facts.clone());
        }
    }
}

fn start(client: &mut Client, arguments: Value) -> Value {
    let result = client.good("command_start", arguments);
    assert_eq!(facts(&result)["state"], "running", "{result}");
    facts(&result)["command_id"].clone()
}

#[test]
fn a_call_lets_go_of_what_takes_long_and_nothing_is_lost() {
    let guest = Guest::start();
    let mut client = guest.client();
    let go = guest.path("go");
    let line =
        format!("echo first; echo oops >&2; until [ -e {go} ]; do sleep 0.02; done; echo last; exit 7");
    let begun = Instant::now();
    let result = client.good("run_command", json!({ "command": line, "yield_after_s": 0.5, "cwd": "/usr" }));
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert!(header(&result).starts_with("web-1 · still running · "), "{result}");
    assert_eq!((stream(&result, "stdout"), stream(&result, "stderr")), ("first\n", "oops\n"));
    let yielded = facts(&result);
    assert_eq!((&yielded["state"], &yielded["cwd"]), (&json!("running"), &json!("/usr")));
    assert!(yielded["exit_code"].is_null() && yielded["status"].is_null(), "{result}");
    let (id, cursor) = (yielded["command_id"].clone(), yielded["cursor"].clone());
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.contains(&format!("command_output with id {} and cursor", id.as_str().unwrap())), "{text}");

    // Without waiting there is nothing new.
    let result = client.good("command_output", json!({ "id": id, "cursor": cursor }));
    assert_eq!((stream(&result, "stdout"), &facts(&result)["state"]), ("", &json!("running")));
    std::fs::write(&go, "").unwrap();
    let arguments = json!({ "id": id, "cursor": cursor, "wait_ms": 45_000 });
    let result = client.good("command_output", arguments);
    assert_eq!(stream(&result, "stdout"), "last\n");
    let (stdout, stderr, end) = follow(&mut client, &id);
    assert_eq!((stdout.as_slice(), stderr.as_slice()), (&b"first\nlast\n"[..], &b"oops\n"[..]));
    assert_eq!((&end["exit_code"], &end["status"], &end["timed_out"]), (&json!(7), &json!(7), &json!(false)));
    assert_eq!(client.bad("command_output", json!({ "id": id, "wait_ms": 45_001 })), "invalid_argument");
    assert_eq!(client.bad("command_output", json!({ "id": id, "offset": 1 })), "invalid_argument");
    assert_eq!(client.bad("command_output", json!({ "id": id, "cursor": "x" })), "invalid_argument");
}

#[test]
fn a_call_that_does_not_wait_answers_at_once() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("run_command", json!({ "argv": ["sleep", "600"], "yield_after_s": 0 }));
    assert_eq!(facts(&result)["state"], "running", "{result}");
    let id = &facts(&result)["command_id"];
    let result = client.good("command_signal", json!({ "id": id, "signal": "int" }));
    assert_eq!(facts(&result)["signal"], "SIGINT");
    let (_, _, end) = follow(&mut client, id);
    assert_eq!((&end["signal"], &end["status"]), (&json!("SIGINT"), &json!(130)));
    assert_eq!(client.bad("command_signal", json!({ "id": id })), "command_ended");
    assert_eq!(client.bad("command_signal", json!({ "id": id, "signal": "NOPE" })), "invalid_argument");
}

/// What harnesses demand: no byte of a stream that fits is lost, and what does not fit is counted.
#[test]
fn output_is_kept_to_the_byte() {
    let guest = Guest::start();
    let mut client = guest.client();
    let most = 16 << 20;
    for (bytes, keep) in [(1 << 20, None), (3_000_000, Some(3_000_000)), (most, Some(most))] {
        let line = format!("head -c {bytes} /dev/urandom | tee {}", guest.path("all"));
        let mut arguments = json!({ "command": line, "encoding": "base64" });
        if let Some(keep) = keep {
            arguments["keep_bytes"] = json!(keep);
        }
        let result = client.good("run_command", arguments);
        let shown = BASE64.decode(stream(&result, "stdout").as_bytes()).unwrap();
        let all = std::fs::read(guest.path("all")).unwrap();
        assert_eq!(shown[..16_384], all[..16_384]);
        assert_eq!(shown[16_384..], all[all.len() - 16_384..], "base64 has the tail, too");
        assert!(facts(&result)["stdout"]["dropped_bytes"].is_null(), "{result}");
        let (stdout, _, _) = follow(&mut client, &facts(&result)["command_id"]);
        assert!(stdout == all, "{bytes} bytes came back as {}", stdout.len());
    }

    // The middle of what does not fit is gone, counted, and passed over.
    let result = client.good("run_command", json!({ "command": "seq 1 100000", "keep_bytes": 1000 }));
    let (total, id) = (588_895_u64, &facts(&result)["command_id"]);
    assert_eq!(facts(&result)["stdout"]["dropped_bytes"], total - 1000);
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(
        text.contains(&format!("{0} bytes left out of the middle, {0} of them gone", total - 1000)),
        "{text}"
    );
    let result = client.good("command_output", json!({ "id": id }));
    assert_eq!(stream(&result, "stdout").len(), 500);
    let cursor = &facts(&result)["cursor"];
    let result = client.good("command_output", json!({ "id": id, "cursor": cursor }));
    assert!(stream(&result, "stdout").ends_with("99999\n100000\n"));
    assert_eq!(facts(&result)["stdout"]["omitted_bytes"], total - 1000);
    assert_eq!(facts(&result)["stdout"]["offset"], total - 500);
    let part = json!({ "id": id, "stream": "stdout", "offset": 2, "limit": 5, "encoding": "base64" });
    let result = client.good("command_output", part);
    assert_eq!(BASE64.decode(stream(&result, "stdout").as_bytes()).unwrap(), b"2\n3\n4");
}

/// A command whose output must all arrive waits for whoever reads it.
#[test]
fn a_command_waits_for_its_reader_where_nothing_may_be_dropped() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "seq 1 2000000; echo end >&2";
    let arguments = json!({ "command": line, "lossless": true, "keep_bytes": 100_000, "yield_after_s": 45 });
    let begun = Instant::now();
    let result = client.good("run_command", arguments);
    assert!(begun.elapsed() < Duration::from_secs(30), "the call yields once its output has to be read");
    assert_eq!(facts(&result)["state"], "running", "{result}");
    let (stdout, stderr, end) = follow(&mut client, &facts(&result)["command_id"]);
    let all: String = (1..=2_000_000).map(|number| format!("{number}\n")).collect();
    assert!(stdout == all.as_bytes(), "{} bytes of {}", stdout.len(), all.len());
    assert_eq!((stderr.as_slice(), &end["exit_code"]), (&b"end\n"[..], &json!(0)));
    assert_eq!(end["stdout"]["dropped_bytes"], all.len() as u64 - 100_000, "what was read is not kept");
}

#[test]
fn the_end_is_waited_for_in_one_call() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done; exit 3";
    let id = start(&mut client, json!({ "command": line }));
    let result = client.good("command_output", json!({ "id": id, "wait_ms": 45_000, "until_end": true }));
    assert_eq!((stream(&result, "stdout"), &facts(&result)["exit_code"]), ("1\n2\n3\n4\n5\n", &json!(3)));
    // No longer than is said.
    let id = start(&mut client, json!({ "argv": ["sleep", "600"] }));
    let result = client.good("command_output", json!({ "id": id, "wait_ms": 100, "until_end": true }));
    assert_eq!(facts(&result)["state"], "running");
    client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
}

#[test]
fn streams_are_apart_or_merged_in_order() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done";
    let result = client.good("run_command", json!({ "command": line, "merge": true }));
    assert_eq!(stream(&result, "stdout"), "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n");
    assert_eq!(facts(&result)["stderr"]["total_bytes"], 0);
    let result = client.good("run_command", json!({ "command": line }));
    assert_eq!(
        (stream(&result, "stdout"), stream(&result, "stderr")),
        ("o1\no2\no3\no4\no5\n", "e1\ne2\ne3\ne4\ne5\n")
    );
}

#[test]
fn all_output_goes_into_a_file_as_well() {
    let guest = Guest::start();
    let mut client = guest.client();
    let log = guest.path("log");
    std::fs::write(&log, "old").unwrap();
    let arguments = json!({ "command": "seq 1 300000; echo end >&2", "keep_bytes": 100, "log": log });
    let result = client.good("run_command", arguments);
    assert_eq!(facts(&result)["log"], json!({ "path": log, "written_bytes": 1_988_899 }));
    let text = std::fs::read_to_string(&log).unwrap();
    assert_eq!(text.len(), 1_988_899);
    assert!(text.starts_with("1\n2\n") && text.contains("end\n") && !text.contains("old"));
}

/// A tmpfs of the test's own.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: String, size: &str) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &path, "tmpfs", flags, Some(options.as_c_str())).ok()?;
        Some(Self(path.into()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_ends_the_log_and_not_the_command() {
    let guest = Guest::start();
    let Some(disk) = SmallDisk::mount(guest.path("small"), "256k") else {
        eprintln!("SKIPPED: nothing can be mounted here (it takes root)");
        return;
    };
    let mut client = guest.client();
    let log = disk.0.join("log");
    let result = client.good("run_command", json!({ "command": "seq 1 300000; echo last", "log": log }));
    assert_eq!(facts(&result)["exit_code"], 0, "{result}");
    assert!(stream(&result, "stdout").ends_with("300000\nlast\n"));
    let facts = &facts(&result)["log"];
    assert_eq!(facts["problem"], "no space left on device", "{facts}");
    assert_eq!(facts["written_bytes"], std::fs::metadata(&log).unwrap().len());
    assert!(std::fs::read_to_string(&log).unwrap().starts_with("1\n2\n3\n"));
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("log: incomplete: no space left on device"), "{text}");
}

#[test]
fn input_comes_from_a_file_or_in_pieces() {
    let guest = Guest::start();
    let mut client = guest.client();
    let input = guest.path("input");
    std::fs::write(&input, "x".repeat(5 << 20)).unwrap();
    let result = client.good("run_command", json!({ "argv": ["wc", "-c"], "stdin_path": input }));
    assert_eq!(stream(&result, "stdout").trim(), "5242880");

    let id = start(&mut client, json!({ "argv": ["cat"], "stdin": "first ", "stdin_open": true }));
    let result = client.good("command_input", json!({ "id": id, "input": "second\n", "wait_ms": 5000 }));
    assert_eq!(facts(&result)["written_bytes"], 7, "{result}");
    let result =
        client.good("command_input", json!({ "id": id, "input": "/wA=", "encoding": "base64", "eof": true }));
    assert_eq!(facts(&result)["written_bytes"], 2);
    let (stdout, _, end) = follow(&mut client, &id);
    assert_eq!((stdout.as_slice(), &end["exit_code"]), (&b"first second\n\xFF\0"[..], &json!(0)));
    // After its end, and to those that never took any.
    assert_eq!(client.bad("command_input", json!({ "id": id, "input": "late" })), "input_closed");
    let id = start(&mut client, json!({ "argv": ["sleep", "600"] }));
    assert_eq!(client.bad("command_input", json!({ "id": id, "input": "x" })), "input_closed");
    client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
}

#[test]
fn input_that_nobody_reads_is_told() {
    let guest = Guest::start();
    let mut client = guest.client();
    // It closes its input and goes on.
    let id = start(&mut client, json!({ "command": "exec <&-; echo closed; sleep 600", "stdin_open": true }));
    until("it closed its input", || {
        let result = client.good("command_output", json!({ "id": id }));
        stream(&result, "stdout") == "closed\n"
    });
    assert_eq!(client.bad("command_input", json!({ "id": id, "input": "x" })), "input_closed");
    client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
    // It does not read: what fits in the pipe is taken, the rest is not.
    let id = start(&mut client, json!({ "argv": ["sleep", "600"], "stdin_open": true }));
    let result = client.good("command_input", json!({ "id": id, "input": "x".repeat(100_000) }));
    assert_eq!(facts(&result)["written_bytes"], 65_536, "{result}");
    let result = client.good("command_input", json!({ "id": id, "input": "x" }));
    assert_eq!(facts(&result)["written_bytes"], 0, "{result}");
    client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
    follow(&mut client, &id);
}

#[test]
fn input_that_is_not_read_has_a_limit_for_all_commands_together() {
    let guest = Guest::start();
    let mut client = guest.client();
    let large = "x".repeat(2 << 20);
    let unread = json!({ "argv": ["sleep", "600"], "stdin": large });
    let ids: Vec<Value> = (0..32).map(|_| start(&mut client, unread.clone())).collect();
    assert_eq!(client.bad("command_start", unread.clone()), "too_large");
    assert_eq!(client.bad("run_command", json!({ "argv": ["cat"], "stdin": "x" })), "too_large");
    // Others are started, and take no input.
    let id = start(&mut client, json!({ "argv": ["cat"], "stdin_open": true }));
    let input = json!({ "id": id, "input": "x" });
    let result = client.good("command_input", input.clone());
    assert_eq!(facts(&result)["written_bytes"], 0, "{result}");
    let kill = |client: &mut Client, id: &Value| {
        client.good("command_signal", json!({ "id": id, "signal": "KILL" }));
    };
    kill(&mut client, &ids[0]);
    until("the end of one has made room", || {
        facts(&client.good("command_input", input.clone()))["written_bytes"] == 1
    });
    let last = start(&mut client, unread);
    ids[1..].iter().chain([&id, &last]).for_each(|id| kill(&mut client, id));
}

#[test]
fn a_terminal_is_a_terminal() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "tty >/dev/null && stty size && test -t 0 && test -t 1 && test -t 2 && echo $TERM; trap 'stty size' WINCH; while read l; do echo got $l; done; echo bye";
    let arguments =
        json!({ "command": line, "tty": true, "cols": 100, "rows": 30, "user": "daemon", "cwd": "/" });
    let id = start(&mut client, arguments);
    let mut all = String::new();
    let mut cursor = Value::Null;
    let mut read_until = |client: &mut Client, what: &str| {
        until(what, || {
            let mut arguments = json!({ "id": id, "wait_ms": 1000 });
            if !cursor.is_null() {
                arguments["cursor"] = cursor.clone();
            }
            let result = client.good("command_output", arguments);
            cursor = facts(&result)["cursor"].clone();
            all.push_str(stream(&result, "stdout"));
            all.contains(what)
        });
    };
    read_until(&mut client, "30 100\nxterm-256color\n");
    client.good("command_input", json!({ "id": id, "input": "héllo\n" }));
    read_until(&mut client, "got héllo\n");
    client.good("command_input", json!({ "id": id, "cols": 60, "rows": 20 }));
    client.good("command_input", json!({ "id": id, "input": "\n" }));
    read_until(&mut client, "20 60\n");
    client.good("command_input", json!({ "id": id, "eof": true }));
    read_until(&mut client, "bye\n");
    let (_, _, end) = follow(&mut client, &id);
    assert_eq!(end["exit_code"], 0);

    // Ctrl-C reaches what is in front.
    let id = start(&mut client, json!({ "argv": ["sleep", "600"], "tty": true }));
    client.good("command_input", json!({ "id": id, "input": "\u{3}", "wait_ms": 5000 }));
    let (_, _, end) = follow(&mut client, &id);
    assert_eq!(end["signal"], "SIGINT");
    assert_eq!(client.bad("command_start", json!({ "argv": ["true"], "cols": 3 })), "invalid_argument");
}

#[test]
fn a_timeout_takes_fractions_and_asks_first_if_wanted() {
    let guest = Guest::start();
    let mut client = guest.client();
    let begun = Instant::now();
    let result = client.good("run_command", json!({ "argv": ["sleep", "600"], "timeout_s": 0.2 }));
    assert!(header(&result).starts_with("web-1 · timed out after 0.2 s and was killed"), "{result}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    let facts_ = facts(&result);
    assert_eq!((&facts_["timed_out"], &facts_["status"]), (&json!(true), &json!(137)));

    // 0 is no timeout, and not one that is over at once.
    let result = client.good("run_command", json!({ "command": "sleep 0.2; echo done", "timeout_s": 0 }));
    assert_eq!((stream(&result, "stdout"), &facts(&result)["exit_code"]), ("done\n", &json!(0)));
    assert!(facts(&result)["timed_out"] != true, "{result}");

    let mark = format!("{}.375", 30_000 + std::process::id());
    let line =
        format!("sleep {mark} & trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done");
    let result = client.good("run_command", json!({ "command": line, "timeout_s": 2, "kill_grace_s": 30 }));
    assert_eq!(stream(&result, "stdout"), "ready\nasked\n");
    assert_eq!((&facts(&result)["timed_out"], &facts(&result)["exit_code"]), (&json!(true), &json!(3)));
    assert_eq!(processes_with(&mark), 0, "what it left behind is killed with it");
    // Who does not heed it is killed.
    let line = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let result =
        client.good("run_command", json!({ "command": line, "timeout_s": 1.5, "kill_grace_s": 0.2 }));
    assert_eq!((stream(&result, "stdout"), &facts(&result)["signal"]), ("ready\n", &json!("SIGKILL")));
}

#[test]
fn ids_and_cursors_are_of_one_boot() {
    let (guest, other) = (Guest::start(), Guest::start());
    let (mut client, mut elsewhere) = (guest.client(), other.client());
    let result = client.good("run_command", json!({ "argv": ["true"] }));
    let own = facts(&client.good("run_command", json!({ "argv": ["true"] })))["command_id"].clone();
    elsewhere.good("run_command", json!({ "argv": ["true"] }));
    for tool in ["command_output", "command_input", "command_signal"] {
        let arguments = json!({ "id": facts(&result)["command_id"] });
        assert_eq!(elsewhere.bad(tool, arguments.clone()), "command_not_found", "{tool}");
        let said = elsewhere.call(tool, arguments).to_string();
        assert!(said.contains("is from another boot"), "{said}");
    }
    let said = client.call("command_output", json!({ "id": own, "cursor": facts(&result)["cursor"] }));
    assert!(said.to_string().contains("cursor is for command"), "{said}");
    assert_eq!(client.bad("command_output", json!({ "id": "nonsense" })), "invalid_argument");
}

#[test]
fn a_list_tells_who_runs_what() {
    let guest = Guest::start();
    let mut client = guest.client();
    let call = json!({
        "name": "command_start", "arguments": { "command": "sleep 600; echo \u{1b}[1m", "cwd": "/usr", "user": "daemon" },
        "_meta": { "dev.nexus/client": "claude-code" },
    });
    let started = client.request("tools/call", call)["result"].clone();
    let id = &facts(&started)["command_id"];
    client.good("run_command", json!({ "argv": ["false"] }));
    let result = client.good("command_list", json!({}));
    let commands = facts(&result)["commands"].as_array().unwrap().clone();
    assert_eq!(commands.len(), 2, "{result}");
    let first = &commands[0];
    assert_eq!((&first["command_id"], &first["state"]), (id, &json!("running")));
    assert_eq!(
        (&first["client"], &first["cwd"], &first["user"]),
        (&json!("claude-code"), &json!("/usr"), &json!("daemon"))
    );
    assert_eq!(first["command"], "sleep 600; echo  [1m");
    assert_eq!((&commands[1]["state"], &commands[1]["status"]), (&json!("ended"), &json!(1)));
    let text = result["content"][1]["text"].as_str().unwrap();
    assert!(text.contains("by claude-code · sleep 600") && text.contains("status 1"), "{text}");
    let page = client.good("command_list", json!({ "limit": 1 }));
    assert_eq!(facts(&page)["commands"].as_array().unwrap().len(), 1);
    let page = client.good("command_list", json!({ "limit": 1, "cursor": facts(&page)["next_cursor"] }));
    assert_eq!(facts(&page)["commands"][0]["status"], 1);
    assert!(facts(&page)["next_cursor"].is_null());
    client.good("command_signal", json!({ "id": id, "signal": "9" }));
}

#[test]
fn the_newest_lines_are_told_while_a_call_waits() {
    let guest = Guest::start();
    let mut client = guest.client();
    let go = guest.path("go");
    let line = format!("printf 'one\\n\\033[31mtwo\\033[0m\\n'; until [ -e {go} ]; do sleep 0.02; done");
    let id = client.begin(
        "tools/call",
        json!({ "name": "run_command", "arguments": { "command": line }, "_meta": { "progressToken": "t" } }),
    );
    // The first note may come between the two lines; the next one has both.
    let mut told = 0_u32;
    loop {
        let note = client.read();
        assert_eq!(note["method"], "notifications/progress", "{note}");
        told += 1;
        let params = &note["params"];
        assert_eq!((&params["progressToken"], &params["progress"]), (&json!("t"), &json!(told)), "{note}");
        if params["message"] == "one ⏎ two" {
            break;
        }
        assert!(told == 1 && params["message"] == "one", "{note}");
    }
    std::fs::write(&go, "").unwrap();
    let answer = client.read();
    assert_eq!((&answer["id"], &answer["result"]["isError"]), (&json!(id), &json!(false)), "{answer}");
    // Who does not ask is told nothing; a flood is throttled.
    let flood = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; sleep 1";
    let begun = Instant::now();
    client.begin(
        "tools/call",
        json!({ "name": "run_command", "arguments": { "command": flood }, "_meta": { "progressToken": 9 } }),
    );
    let mut notes = 0;
    while client.read()["method"] == "notifications/progress" {
        notes += 1;
    }
    let most = begun.elapsed().as_millis() / 500 + 1;
    assert!((1..=most).contains(&notes), "{notes} notes in {:?}", begun.elapsed());
    client.good("run_command", json!({ "command": "echo quiet; sleep 0.6" }));
}

/// Of too many commands those that ended first are forgotten, not those that were started first.
#[test]
fn a_long_command_is_found_after_many_short_ones() {
    let guest = Guest::start();
    let mut client = guest.client();
    let gate = guest.path("gate");
    let line = format!("until [ -e '{gate}' ]; do sleep 0.05; done; echo important; exit 9");
    let long = client.good("command_start", json!({ "command": line }));
    let id = facts(&long)["command_id"].clone();
    for _ in 0..270 {
        client.good("run_command", json!({ "argv": ["true"] }));
    }
    std::fs::write(&gate, "").unwrap();
    until("it has ended", || {
        facts(&client.good("command_output", json!({ "id": id, "wait_ms": 1000 })))["state"] == "ended"
    });
    client.good("run_command", json!({ "argv": ["true"] }));
    let result = client.good("command_output", json!({ "id": id }));
    assert_eq!(
        (&facts(&result)["exit_code"], stream(&result, "stdout")),
        (&json!(9), "important\n"),
        "{result}"
    );
}
