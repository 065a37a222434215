//! A log that nobody reads.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use nexus_tests::daemon::program;
use serde_json::{Value, json};

use crate::world::{SOON, soon};

/// More than the capacity of a pipe plus the daemon's buffer for slow readers.
const CALLS: u64 = 500;

#[test]
fn a_stdio_daemon_whose_log_nobody_reads_goes_on() {
    let things = tempfile::Builder::new().prefix("nexus-log-").tempdir().expect("a directory");
    let mut nexusd = Command::new(program("nexusd"));
    nexusd.args(["--stdio", "--log", "trace", "--driver", "process", "--guest", "/bin/false"]);
    nexusd.env_remove("NEXUS_SOCKET").env("NEXUS_STATE_DIR", things.path().join("state"));
    nexusd.env("NEXUS_RUNTIME_DIR", things.path().join("run"));
    let mut nexusd = nexusd
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nexusd starts");
    let mut stdin = nexusd.stdin.take().expect("its stdin");
    let stdout = BufReader::new(nexusd.stdout.take().expect("its stdout"));
    let mut stderr = nexusd.stderr.take().expect("its stderr");
    let (answers_tx, answers) = mpsc::channel::<Value>();
    thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let answer: Value = serde_json::from_str(&line).expect("a message");
            if !answer["id"].is_null() && answers_tx.send(answer).is_err() {
                return;
            }
        }
    });
    let mut say = |message: Value| writeln!(stdin, "{message}").expect("it reads");
    let initialize = json!({
        "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "test", "version": "0" }
    });
    say(json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": initialize }));
    answers.recv_timeout(SOON).expect("an answer");
    say(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
    for id in 1..=CALLS {
        let call = json!({ "name": "vm_list", "arguments": { "limit": id } });
        say(json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": call }));
        let answer = answers.recv_timeout(SOON).expect("an answer while nobody reads the log");
        assert_eq!((&answer["id"], &answer["result"]["isError"]), (&json!(id), &json!(false)), "{answer}");
    }
    drop(stdin);
    soon("its end", || nexusd.try_wait().ok().flatten().filter(std::process::ExitStatus::success));
    let mut log = Vec::new();
    stderr.read_to_end(&mut log).expect("its log");
    // A pipe of 64 KiB whose pages are not completely filled; the rest was dropped.
    assert!(log.len() >= 48 << 10, "this filled no pipe: {} bytes", log.len());
}
