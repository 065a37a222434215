//! Streams into machines: exec and forward as users use them, and what happens to each when its client, the daemon or the
//! machine disappears.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::{kill_process, program, signal};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::world::{World, soon};

pub(crate) fn nexusctl(world: &World, words: &[&str]) -> Command {
    let mut command = Command::new(program("nexusctl"));
    command.args(words).envs(world.daemon.environment());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command line to its end, with this input.
pub(crate) fn run(world: &World, words: &[&str], input: &[u8]) -> Output {
    let mut command = nexusctl(world, words);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("nexusctl runs");
    let (mut stdin, input) = (child.stdin.take().expect("its input"), input.to_vec());
    let writing = thread::spawn(move || {
        // It may end before it has read all input.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("nexusctl ends");
    writing.join().expect("the writer ends");
    output
}

pub(crate) fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn ended(child: &mut Child) -> ExitStatus {
    soon("it ends", || child.try_wait().expect("a child can be asked"))
}

/// Reads lines until one is `expected`.
fn wait_for_line(lines: &mut impl BufRead, expected: &str) {
    let mut line = String::new();
    while line.trim_end() != expected {
        line.clear();
        assert_ne!(lines.read_line(&mut line).expect("it can be read"), 0, "it ended before {expected}");
    }
}

fn numbers(last: u32) -> Vec<u8> {
    (1..=last).map(|n| format!("{n}\n")).collect::<String>().into_bytes()
}

/// The newest command of a machine.
fn newest(client: &mut Client) -> Value {
    let list = client.call_whole("guest_command_list", json!({ "vm": "web-1" })).expect("it lists");
    let commands = list["_meta"]["dev.nexus/result"]["commands"].as_array().expect("a list").clone();
    commands.into_iter().max_by_key(|command| command["started_at"].to_string()).expect("a command")
}

#[test]
fn exec_is_byte_exact_and_ends_as_the_command_does() {
    let world = World::new();
    world.create(&mut world.client(), "web-1");
    let output = run(
        &world,
        &["exec", "web-1", "--", "sh", "-c", "seq 1 1000000; printf '\\377\\0' >&2; exit 7"],
        b"",
    );
    assert_eq!(code(&output), Some(7), "{}", text(&output.stderr));
    assert!(output.stdout == numbers(1_000_000), "{} bytes", output.stdout.len());
    assert_eq!(output.stderr, b"\xff\0");

    // Any amount of input, which is streamed; without -i there is none.
    let input = numbers(1_500_000);
    let output = run(&world, &["exec", "-i", "web-1", "cat"], &input);
    assert!(output.stdout == input, "{} bytes: {}", output.stdout.len(), text(&output.stderr));
    let output = run(&world, &["exec", "web-1", "cat"], &input);
    assert_eq!((code(&output), output.stdout), (Some(0), Vec::new()));
    // A command that does not read all input ends normally.
    let output = run(&world, &["exec", "-i", "web-1", "head", "-n", "1"], &input);
    assert_eq!((code(&output), text(&output.stdout)), (Some(0), "1\n".into()));

    // A single call of a tool gives all of it, too, in as many pieces as it takes.
    let output = run(&world, &["guest", "run", "web-1", "--", "seq", "1", "100000"], b"");
    assert_eq!((code(&output), output.stdout.len()), (Some(0), 588_895), "{}", text(&output.stderr));
    assert!(output.stdout == numbers(100_000), "the bytes differ");

    let line = "echo $A $B; pwd";
    let output = run(&world, &["exec", "-e", "A=one", "-e", "B=two", "-w", "/tmp", "web-1", "-c", line], b"");
    assert_eq!(text(&output.stdout), "one two\n/tmp\n", "{}", text(&output.stderr));
    let whose = ["exec", "-u", "54321:54322", "-w", "/", "web-1", "-c", "id -u; id -g"];
    let output = run(&world, &whose, b"");
    assert_eq!(text(&output.stdout), "54321\n54322\n", "{}", text(&output.stderr));
    for (words, expected) in [
        (&["web-1", "/no/such/program"][..], 127),
        (&["web-1", "/etc/passwd"], 126),
        (&["web-1", "-c", "kill -9 $$"], 137),
        (&["--timeout", "1", "web-1", "sleep", "60"], 124),
        (&["no-such-vm", "true"], 3),
        (&["-w", "/no/such/directory", "web-1", "true"], 7),
        (&["-it", "web-1", "true"], 2),
    ] {
        let output = run(&world, &[&["exec"], words].concat(), b"");
        assert_eq!(code(&output), Some(expected), "{words:?}: {}", text(&output.stderr));
    }
    let output = run(&world, &["exec", "-d", "web-1", "-c", "exit 3"], b"");
    let id = text(&output.stdout).trim().to_owned();
    assert_eq!(newest(&mut world.client())["command_id"], json!(id));
    world.assert_in_order();
}

/// All of a flood is counted, the most of it is not kept, and other calls are answered meanwhile.
#[test]
fn ten_gigabytes_of_output_keep_no_call_waiting() {
    const ALL: u64 = 10 << 30;
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    let flood = json!({ "vm": "web-1", "argv": ["head", "-c", ALL.to_string(), "/dev/zero"] });
    let started = client.call_whole("guest_command_start", flood).expect("it starts");
    let read = json!({ "vm": "web-1", "id": started["_meta"]["dev.nexus/result"]["command_id"], "limit": 1 });
    let mut waits = Vec::new();
    let stdout = soon("its end", || {
        let begun = Instant::now();
        let seen = client.call_whole("guest_command_output", read.clone()).expect("it is read");
        waits.push(begun.elapsed());
        let facts = &seen["_meta"]["dev.nexus/result"];
        (facts["state"] == "ended").then(|| facts["stdout"].clone())
    });
    let kept = nexus_schema::limits::KEEP_DEFAULT;
    assert_eq!(
        (stdout["total_bytes"].as_u64(), stdout["dropped_bytes"].as_u64()),
        (Some(ALL), Some(ALL - kept)),
        "{stdout}"
    );
    waits.sort_unstable();
    assert!(waits[waits.len() / 2] < Duration::from_secs(1), "{waits:?}");
    world.assert_in_order();
}

#[test]
fn signals_are_passed_on() {
    let world = World::new();
    world.create(&mut world.client(), "web-1");
    for (sent, name) in
        [(Signal::INT, "INT"), (Signal::TERM, "TERM"), (Signal::HUP, "HUP"), (Signal::QUIT, "QUIT")]
    {
        let line = format!("trap 'echo got {name}; exit 9' {name}; echo up; while :; do sleep 0.05; done");
        let mut child = nexusctl(&world, &["exec", "web-1", "-c", &line]).spawn().expect("nexusctl runs");
        let mut lines = BufReader::new(child.stdout.take().expect("its output"));
        wait_for_line(&mut lines, "up");
        signal(child.id(), sent);
        wait_for_line(&mut lines, &format!("got {name}"));
        assert_eq!(ended(&mut child).code(), Some(9));
    }
    // A command that ignores signals does not keep its client, and continues.
    let line = "trap '' INT; echo up; while :; do sleep 0.05; done";
    let mut child = nexusctl(&world, &["exec", "web-1", "-c", line]).spawn().expect("nexusctl runs");
    wait_for_line(&mut BufReader::new(child.stdout.take().expect("its output")), "up");
    let status = soon("three interrupts end it", || {
        signal(child.id(), Signal::INT);
        child.try_wait().expect("a child can be asked")
    });
    assert_eq!(status.code(), Some(130));
    assert_eq!(newest(&mut world.client())["state"], "running");
}

#[test]
fn a_reader_that_ends_ends_the_command() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    let mut child = nexusctl(&world, &["exec", "web-1", "yes"]).spawn().expect("nexusctl runs");
    let mut lines = BufReader::new(child.stdout.take().expect("its output"));
    wait_for_line(&mut lines, "y");
    drop(lines);
    assert_eq!(ended(&mut child).code(), Some(141));
    soon("the command has ended", || (newest(&mut client)["state"] == "ended").then_some(()));
}

#[test]
fn a_command_goes_on_without_its_client_and_without_the_daemon() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    let go = world.path("go");
    let line = format!("echo up; until [ -e {} ]; do sleep 0.05; done; seq 1 100000; exit 4", go.display());
    let mut start = |killed: &str| {
        let mut child = nexusctl(&world, &["exec", "web-1", "-c", &line]).spawn().expect("nexusctl runs");
        wait_for_line(&mut BufReader::new(child.stdout.take().expect("its output")), "up");
        let id = newest(&mut client)["command_id"].clone();
        if killed == "client" {
            kill_process(child.id());
        }
        (child, id)
    };
    let (mut killed, first) = start("client");
    ended(&mut killed);
    let (mut left, second) = start("daemon");
    world.daemon.kill();
    let status = ended(&mut left);
    let mut said = String::new();
    left.stderr.take().expect("its errors").read_to_string(&mut said).expect("it can be read");
    assert_eq!(status.code(), Some(6), "{said}");
    assert!(said.contains(&format!("--attach {}", second.as_str().expect("an id"))), "{said}");
    world.daemon.restart();
    std::fs::write(&go, "").expect("a file is written");
    let mut client = world.client();
    for id in [first, second] {
        let facts = soon("it has ended", || {
            let read = client.call_whole("guest_command_output", json!({ "vm": "web-1", "id": id }));
            let facts = read.ok()?["_meta"]["dev.nexus/result"].clone();
            (facts["state"] == "ended").then_some(facts)
        });
        assert_eq!((&facts["exit_code"], &facts["stdout"]["total_bytes"]), (&json!(4), &json!(588_898)));
    }
}

#[test]
fn streams_end_with_their_machine_and_do_not_keep_the_daemon() {
    let mut world = World::new();
    let mut client = world.client();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let start = |world: &World| {
        let mut exec =
            nexusctl(world, &["exec", "web-1", "-c", "echo up; sleep 1000"]).spawn().expect("nexusctl runs");
        let mut lines = BufReader::new(exec.stdout.take().expect("its output"));
        wait_for_line(&mut lines, "up");
        let (mut forward, address) = forward(world, port);
        let mut connection = TcpStream::connect(address).expect("it is connected");
        let (mut accepted, _) = listener.accept().expect("it comes through");
        connection.write_all(b"x").expect("it is written");
        accepted.read_exact(&mut [0]).expect("it is read");
        let ends = thread::spawn(move || {
            // It may be reset or closed, but it must not stay open.
            let _ = connection.read_to_end(&mut Vec::new());
            let _ = accepted.read_to_end(&mut Vec::new());
        });
        (exec, ends, move || {
            signal(forward.id(), Signal::INT);
            ended(&mut forward)
        })
    };
    for how in [json!({ "vm": "web-1", "wait_s": 45 }), json!({ "vm": "web-1", "force": true, "wait_s": 45 })]
    {
        if how["force"].is_null() {
            world.create(&mut client, "web-1");
        } else {
            client.must("vm_start", json!({ "vm": "web-1", "wait_s": 45 }));
        }
        let (mut exec, ends, mut interrupt) = start(&world);
        client.must("vm_stop", how);
        assert_ne!(ended(&mut exec).code(), Some(0));
        soon("connections end", || ends.is_finished().then_some(()));
        assert_eq!(interrupt().code(), Some(0));
    }
    client.must("vm_start", json!({ "vm": "web-1", "wait_s": 45 }));
    let (mut exec, ends, mut interrupt) = start(&world);
    let begun = Instant::now();
    world.daemon.stop();
    assert!(begun.elapsed() < Duration::from_secs(60), "it stopped after {:?}", begun.elapsed());
    assert_eq!(ended(&mut exec).code(), Some(6));
    soon("connections end", || ends.is_finished().then_some(()));
    assert_eq!(interrupt().code(), Some(0));
    // The machine outlives it; only a daemon deletes it at the end.
    world.daemon.restart();
}

/// Forwards a free host port to `port`; returns its address.
fn forward(world: &World, port: u16) -> (Child, String) {
    let mut forward =
        nexusctl(world, &["-q", "forward", "web-1", &format!("0:{port}")]).spawn().expect("nexusctl runs");
    let mut address = String::new();
    BufReader::new(forward.stdout.take().expect("its output"))
        .read_line(&mut address)
        .expect("it says where");
    (forward, address.trim().to_owned())
}

#[test]
fn ports_are_forwarded_with_half_close_many_at_once() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            thread::spawn(move || {
                // The answer is the whole question, once it is complete.
                let mut question = Vec::new();
                (&connection).read_to_end(&mut question).and_then(|_| (&connection).write_all(&question))
            });
        }
    });
    let (mut forward, address) = forward(&world, port);
    let ask = |address: &str, question: &[u8]| {
        let mut connection = TcpStream::connect(address).expect("it is connected");
        connection.write_all(question).expect("it is written");
        connection.shutdown(Shutdown::Write).expect("one direction ends");
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).expect("it is read");
        answer
    };
    let question = numbers(500_000);
    assert!(ask(&address, &question) == question);
    let asking: Vec<_> = (0..50_u32)
        .map(|number| {
            let address = address.clone();
            thread::spawn(move || assert_eq!(ask(&address, &number.to_be_bytes()), number.to_be_bytes()))
        })
        .collect();
    for asked in asking {
        asked.join().expect("each is answered");
    }
    // If nothing listens, the connection is reset and the reason is printed.
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address").port();
    let (mut nowhere, address) = self::forward(&world, free);
    let cut = TcpStream::connect(address).and_then(|mut connection| connection.read(&mut [0]));
    assert!(!matches!(cut, Ok(1..)), "{cut:?}");
    let mut said = String::new();
    BufReader::new(nowhere.stderr.take().expect("its errors")).read_line(&mut said).expect("it says why");
    assert!(said.contains("nothing is listening there"), "{said}");
    for forward in [&mut forward, &mut nowhere] {
        signal(forward.id(), Signal::INT);
        assert_eq!(ended(forward).code(), Some(0));
    }
    let output = run(&world, &["forward", "no-such-vm", "0:80"], b"");
    assert_eq!(code(&output), Some(3));
    soon("no stream is left", || {
        let metrics = get(&world, "/metrics", "");
        metrics.contains("\nnexus_guest_streams 0\n").then_some(())
    });
}

/// Requests a path of the daemon's Unix socket; returns head and body of the response, or everything that comes over a stream.
fn get(world: &World, path: &str, headers: &str) -> String {
    let mut stream = UnixStream::connect(world.daemon.socket()).expect("the daemon listens");
    stream.set_read_timeout(Some(Duration::from_mins(2))).expect("a limit");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").expect("it is written");
    let mut answer = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let mut line = String::new();
        assert_ne!(answer.read_line(&mut line).expect("it can be read"), 0, "{head}");
        if let Some(number) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = number.trim().parse().expect("a number");
        }
        head.push_str(&line);
    }
    let most = if head.starts_with("HTTP/1.1 101 ") { u64::MAX } else { length };
    let mut body = Vec::new();
    answer.take(most).read_to_end(&mut body).expect("it ends");
    head + &text(&body)
}

#[test]
fn a_ticket_opens_one_stream_of_one_boot() {
    const UPGRADE: &str = "Connection: upgrade\r\nUpgrade: nexus-stream\r\n";
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web-1");
    let exec = json!({ "exec": { "start": { "command": "echo once" } } });
    let mut ticket = || {
        let given = client.must("guest_stream_open", json!({ "vm": "web-1", "open": exec }));
        given["path"].as_str().expect("a path").to_owned()
    };
    let path = ticket();
    for (path, headers, status) in [
        ("/stream", UPGRADE, "403"),
        ("/stream?ticket=", UPGRADE, "403"),
        (&*format!("{path}0"), UPGRADE, "403"),
        (&*path, "", "400"),
        (&*path, "Connection: upgrade\r\nUpgrade: mcp-stream\r\n", "400"),
        (&*format!("{path}&more=1"), UPGRADE, "101"),
        (&*path, UPGRADE, "403"),
    ] {
        let answer = get(&world, path, headers);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path} {headers:?}: {answer}");
        let is_open = answer.contains("{\"ok\":{\"command_id\":") && answer.contains("once\n");
        assert_eq!(is_open, status == "101", "{answer}");
    }
    let path = ticket();
    for (tool, arguments) in [
        ("vm_stop", json!({ "vm": "web-1", "wait_s": 45 })),
        ("vm_start", json!({ "vm": "web-1", "wait_s": 45 })),
    ] {
        world.client().must(tool, arguments);
    }
    let answer = get(&world, &path, UPGRADE);
    assert!(answer.contains("\"vm_gone\""), "{answer}");
    let mut client = world.client();
    for (open, words) in [
        (json!({ "sftp": {} }), "unknown variant `sftp`"),
        (json!({ "tcp": { "port": 80, "host": "10.0.0.1" } }), "unknown field `host`"),
        (json!({ "exec": { "start": { "command": "x".repeat(70_000) } } }), "the maximum is 65536"),
    ] {
        let failure =
            client.call("guest_stream_open", json!({ "vm": "web-1", "open": open })).expect_err("refused");
        assert!(failure.text.contains(words), "{}", failure.text);
    }
}

/// A hostile guest can only harm its own stream.
#[test]
fn a_hostile_guest_on_the_port_of_streams_hurts_its_own_streams_only() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    for (name, expected) in [
        ("stream-garbage-1", 1),
        ("stream-hangup-1", 1),
        ("stream-lies-1", 1),
        ("stream-frames-1", 6),
        ("stream-credit-1", 6),
        ("stream-flood-1", 6),
        ("stream-nothing-1", 6),
    ] {
        world.create(&mut client, name);
        let mut child = nexusctl(&world, &["exec", name, "true"]);
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nexusctl runs");
        let status = ended(&mut child);
        assert_eq!(status.code(), Some(expected), "{name}");
    }
    // An endless stream is read as long as its client wants; no other client is blocked.
    world.create(&mut client, "stream-endless-1");
    let mut endless = nexusctl(&world, &["exec", "stream-endless-1", "true"]);
    let mut endless = endless.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nexusctl runs");
    let slowest = (0..20).map(|_| {
        let begun = Instant::now();
        client.must("vm_list", json!({}));
        begun.elapsed()
    });
    let slowest = slowest.max().expect("calls");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    signal(endless.id(), Signal::KILL);
    ended(&mut endless);
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.daemon.pid())).expect("its status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < 160 << 10, "the daemon took {peak} KiB");
    soon("no stream is left", || {
        get(&world, "/metrics", "").contains("\nnexus_guest_streams 0\n").then_some(())
    });
}
