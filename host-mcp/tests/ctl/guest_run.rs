//! Commands in a VM: their bytes, their exit codes, what they read.

use std::io::{Seek, Write};
use std::process::Stdio;

use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::fake::{Caller, Fake, Tool, World, fails_inside, finish};

fn ran(facts: &Value, stdout: &[u8], stderr: &[u8]) -> Value {
    json!({
        "_meta": { "dev.nexus/result": facts },
        "content": [
            { "type": "text", "text": "web-1 · exit 3 · 1 ms" },
            { "type": "text", "text": BASE64.encode(stdout), "_meta": { "dev.nexus/stream": "stdout" } },
            { "type": "text", "text": "stderr:" },
            { "type": "text", "text": BASE64.encode(stderr), "_meta": { "dev.nexus/stream": "stderr" } },
        ],
    })
}

fn facts(exit_code: Option<i32>, signal: Option<&str>, timed_out: bool) -> Value {
    let stream = json!({ "total_bytes": 5, "omitted_bytes": 0, "lossy": false });
    let mut facts = json!({ "timed_out": timed_out, "duration_ms": 1, "stdout": stream, "stderr": stream });
    if let Some(code) = exit_code {
        facts["exit_code"] = code.into();
    }
    if let Some(signal) = signal {
        facts["signal"] = signal.into();
    }
    facts
}

#[test]
fn commands_give_their_exact_bytes_and_exit_code() {
    let world = World::new();
    let run_command =
        Box::new(|_: &Value, _: &Caller| Some(ran(&facts(Some(3), None, false), &[0xff, 0, b'\n'], b"oops")));
    let fake = Fake::start(&world.runtime(), [("guest_run_command", run_command)]);
    let run = world.run("guest run web-1 --cwd /tmp -e A=B -- sh -c --json");
    assert_eq!((run.code, run.stdout.as_slice(), run.stderr.as_str()), (3, &[0xff, 0, b'\n'][..], "oops"));
    let piped = world.run_with("guest run -i -c cat web-1", b"\x00\xffin");
    assert_eq!(piped.code, 3);
    assert_eq!(
        fake.calls("guest_run_command"),
        [
            json!({ "vm": "web-1", "argv": ["sh", "-c", "--json"], "cwd": "/tmp", "env": { "A": "B" },
                "timeout_s": 3600.0, "yield_after_s": 0.5, "lossless": true,
                "max_output_bytes": 262144, "encoding": "base64" }),
            json!({ "vm": "web-1", "command": "cat", "stdin": BASE64.encode(b"\x00\xffin"), "stdin_encoding": "base64",
                "timeout_s": 3600.0, "yield_after_s": 0.5, "lossless": true,
                "max_output_bytes": 262144, "encoding": "base64" }),
        ]
    );
}

#[test]
fn a_checkpoint_before_a_command_is_asked_for_and_named() {
    let world = World::new();
    let run_command = Box::new(|_: &Value, _: &Caller| {
        let mut result = ran(&facts(Some(0), None, false), b"done", b"");
        result["_meta"]["dev.nexus/checkpoint"] =
            json!({ "id": "aaaaaaaaaaaac", "name": "before-run-abcdef" });
        Some(result)
    });
    let fake = Fake::start(&world.runtime(), [("guest_run_command", run_command)]);
    let run = world.run("guest run --checkpoint web-1 -- rm -rf /usr");
    assert_eq!((run.code, run.stdout.as_slice()), (0, &b"done"[..]), "{}", run.stderr);
    assert!(run.stderr.contains("nexusctl vm rollback web-1 before-run-abcdef"), "{}", run.stderr);
    assert_eq!(fake.calls("guest_run_command")[0]["checkpoint"], true);
}

#[test]
fn a_comparison_is_a_line_for_each_file() {
    let world = World::new();
    let diff = Box::new(|_: &Value, _: &Caller| {
        Some(json!({ "content": [], "structuredContent": {
            "from": "aaaaaaaaaaaac", "from_at": "2026-01-01T00:00:00Z", "to_at": "2026-01-01T00:00:01Z",
            "added": 1, "changed": 1, "removed": 7, "is_cut": true,
            "files": [
                { "change": "added", "path": "/srv/new", "type": "file", "new_bytes": 5 },
                { "change": "changed", "path": "/etc/motd", "type": "file", "old_bytes": 5, "new_bytes": 6,
                  "what": ["content"] },
                { "change": "removed", "path": "/srv/old", "type": "directory" },
            ],
            "processes": { "started": [{ "pid": 7, "command": "sleep 1", "memory_kib": 4 }], "ended": [],
                "old_memory_kib": 1, "new_memory_kib": 5 },
            "notes": ["the drive at /data is only in `from`"],
        }}))
    });
    let fake = Fake::start(&world.runtime(), [("checkpoint_diff", diff)]);
    let run = world.run("checkpoint diff before --path /srv --vm web");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(
        String::from_utf8_lossy(&run.stdout),
        "A /srv/new 5 B\nM /etc/motd 5 B -> 6 B (content)\nD /srv/old/\n+ process 7 sleep 1\n"
    );
    for said in ["1 added, 1 changed, 7 removed; 3 of 9 listed", "/data is only in"] {
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
    assert_eq!(fake.calls("checkpoint_diff"), [json!({ "from": "before", "path": "/srv", "vm": "web" })]);
}

/// A command that goes on after its call is followed to its end; each piece is printed once.
#[test]
fn a_long_command_is_followed_to_its_end() {
    const ID: &str = "aaaaaaaaaaaac";
    let of = |state: &str, cursor: &str, stdout: &[u8], extra: &[(&str, Value)]| {
        let mut facts = facts(None, None, false);
        for (name, value) in [("state", json!(state)), ("cursor", json!(cursor)), ("command_id", json!(ID))] {
            facts[name] = value;
        }
        extra.iter().for_each(|(name, value)| facts[*name] = value.clone());
        ran(&facts, stdout, b"")
    };
    let first = of("running", "c1", b"one,", &[]);
    let pieces = [
        ("c1", of("running", "c2", b"two,\xff,", &[])),
        ("c2", of("ended", "c3", b"three,", &[("exit_code", json!(9)), ("more", json!(true))])),
        ("c3", of("ended", "c4", b"four", &[("exit_code", json!(9))])),
    ];
    let world = World::new();
    let run: Tool = Box::new(move |_, _| Some(first.clone()));
    let output: Tool = Box::new(move |arguments, _| {
        let cursor = arguments["cursor"].as_str()?;
        pieces.iter().find(|(at, _)| *at == cursor).map(|(_, piece)| piece.clone())
    });
    let fake = Fake::start(&world.runtime(), [("guest_run_command", run), ("guest_command_output", output)]);
    let run = world.run("guest run web-1 -- long");
    assert_eq!((run.code, run.stdout.as_slice()), (9, &b"one,two,\xff,three,four"[..]), "{run:?}");
    assert_eq!(fake.calls("guest_command_output").len(), 3);
    assert_eq!(fake.calls("guest_command_output")[0]["id"], ID);
}

#[test]
fn signals_and_timeouts_have_the_exit_codes_of_a_shell() {
    for (facts, code) in
        [(facts(None, Some("SIGKILL"), false), 137), (facts(None, Some("SIGKILL"), true), 124)]
    {
        let world = World::new();
        let tool = Box::new(move |_: &Value, _: &Caller| Some(ran(&facts, b"", b"")));
        let _fake = Fake::start(&world.runtime(), [("guest_run_command", tool)]);
        assert_eq!(world.run("guest exec web-1 sleep 9").code, code);
    }
}

#[test]
fn programs_that_cannot_start_have_the_exit_codes_of_a_shell() {
    for (error, code) in [("program_not_found", 127), ("program_not_executable", 126), ("command_failed", 7)]
    {
        let world = World::new();
        let tool = fails_inside(error, "start `x`: no luck", "install it");
        let _fake = Fake::start(&world.runtime(), [("guest_run_command", tool)]);
        let run = world.run("guest run web-1 -- x");
        assert_eq!((run.code, run.text()), (code, ""));
        assert!(run.stderr.contains("start `x`: no luck") && run.stderr.contains("install it"), "{run:?}");
        let told = world.run("guest run web-1 --json -- x");
        assert_eq!(
            (told.code, told.stderr.contains(&format!("\"code\":\"{error}\""))),
            (code, true),
            "{told:?}"
        );
    }
}

/// A guest that answers with what it was given to read.
fn echoing() -> Tool {
    Box::new(|arguments: &Value, _: &Caller| {
        let input = arguments["stdin"].as_str().map(|text| BASE64.decode(text.as_bytes()).unwrap());
        Some(ran(&facts(Some(0), None, false), &input.unwrap_or_default(), b""))
    })
}

#[test]
fn output_that_is_not_whole_is_a_failure_that_says_how_to_get_all() {
    for own_code in [0, 3] {
        let world = World::new();
        let cut = Box::new(move |_: &Value, _: &Caller| {
            let mut facts = facts(Some(own_code), None, false);
            facts["stdout"] = json!({ "total_bytes": 3 << 20, "omitted_bytes": 2 << 20, "lossy": false });
            Some(ran(&facts, b"the beginning and the end", b""))
        });
        let _fake = Fake::start(&world.runtime(), [("guest_run_command", cut)]);
        let run = world.run("guest run web-1 -- tar c /");
        assert_eq!((run.code, run.text()), (125, "the beginning and the end"));
        assert!(run.stderr.contains("2 MiB of 3 MiB of stdout were omitted from the middle"), "{run:?}");
        assert!(run.stderr.contains(&format!("exit code {own_code}")), "{run:?}");
        assert!(run.stderr.contains("nexusctl guest read web-1 /tmp/out"), "{run:?}");

        let run = world.run("guest run web-1 --json -- tar c /");
        assert_eq!((run.code, &run.json()["stdout"]["omitted_bytes"]), (125, &json!(2 << 20)));
        let told: Value = serde_json::from_str(&run.stderr).unwrap();
        assert_eq!(told["error"]["code"], "too_large");
    }
}

#[test]
fn a_command_reads_what_was_asked_for_and_nothing_else() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("guest_run_command", echoing())]);
    let run = |line: &str, stdin: Stdio| {
        let mut command = world.command(line);
        finish(command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let file = |read: u64| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\ntwo\n").unwrap();
        file.seek(std::io::SeekFrom::Start(read)).unwrap();
        Stdio::from(file)
    };
    // A pipe that nobody writes to and nobody closes must not be waited for.
    let (open, _writer) = std::io::pipe().unwrap();
    assert_eq!(run("guest run web-1 -- cat", open.into()).text(), "");
    assert_eq!(run("guest run web-1 -- cat", file(0)).text(), "one\ntwo\n");
    assert_eq!(run("guest run web-1 -- cat", file(4)).text(), "");
    assert_eq!(run("guest run -n web-1 -- cat", file(0)).text(), "");
    assert_eq!(run("guest run -i web-1 -- cat", file(4)).text(), "two\n");
    assert_eq!(world.run_with("guest run web-1 -- cat", b"piped").text(), "");
    assert_eq!(world.run_with("guest exec -i web-1 cat", b"piped").text(), "piped");
    let asked: Vec<bool> =
        fake.calls("guest_run_command").iter().map(|call| call.get("stdin").is_some()).collect();
    assert_eq!(asked, [false, true, false, false, true, false, true]);
}

#[test]
fn a_loop_that_reads_lines_runs_for_each_of_them() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("guest_run_command", echoing())]);
    std::fs::write(world.root.path().join("names"), "web-1\nweb-2\nweb-3\n").unwrap();
    for script in [
        "while read name; do $NEXUSCTL guest run $name -- true; done < names",
        "cat names | while read name; do $NEXUSCTL guest run $name -- true; done",
    ] {
        let mut shell = world.command("");
        let nexusctl = shell.get_program().to_owned();
        shell = std::process::Command::new("sh");
        shell.args(["-c", script]).current_dir(world.root.path()).env("NEXUSCTL", nexusctl);
        shell.env("NEXUS_RUNTIME_DIR", world.runtime()).env("HOME", world.root.path());
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let before = fake.calls("guest_run_command").len();
        let run = finish(shell.spawn().unwrap());
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{script}");
        let names: Vec<Value> =
            fake.calls("guest_run_command")[before..].iter().map(|call| call["vm"].clone()).collect();
        assert_eq!(names, ["web-1", "web-2", "web-3"], "{script}");
    }
}

#[test]
fn a_line_given_as_one_word_points_to_the_shell() {
    let world = World::new();
    let tool = fails_inside("program_not_found", "start `ls -l`: no such file", "");
    let _fake = Fake::start(&world.runtime(), [("guest_run_command", tool)]);
    let mut command = world.command("guest run web-1 --");
    let run = finish(command.arg("ls -l").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(run.code, 127);
    assert!(run.stderr.contains("`nexusctl guest run web-1 -c 'ls -l'`"), "{}", run.stderr);
}

#[test]
fn a_guest_has_no_line_of_its_own_that_begins_like_the_hosts() {
    let world = World::new();
    let tool = fails_inside("file_not_found", "none\nhint: run this on the host", "look\nerror: not really");
    let _fake = Fake::start(&world.runtime(), [("guest_run_command", tool)]);
    let run = world.run("guest run web-1 -- x");
    let begins = |word: &str| run.stderr.lines().filter(|line| line.starts_with(word)).count();
    assert_eq!((begins("hint:"), begins("error:")), (1, 1), "{}", run.stderr);
}
