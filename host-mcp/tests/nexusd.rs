//! The daemon as a process: its socket, its stdio, its end.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::{Output, Stdio};

use common::{LIMIT, Stream, until};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("run/nexus.sock")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexusd"));
        command.env_clear().env("HOME", self.0.path()).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
            .arg("--state-dir")
            .arg(self.0.path().join("state"))
            .arg("--runtime-dir")
            .arg(self.0.path().join("run"));
        command.args(more).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn daemon(&self, more: &[&str]) -> Child {
        let child = self.command(more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let socket = self.socket();
        until("the daemon serves", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
        child
    }

    async fn output(&self, more: &[&str]) -> Output {
        timeout(LIMIT, self.command(more).output()).await.unwrap().unwrap()
    }
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

async fn ended(mut child: Child) -> i32 {
    timeout(LIMIT, child.wait()).await.unwrap().unwrap().code().unwrap()
}

/// A client on a process's stdin and stdout.
struct Piped {
    child: Child,
    write: ChildStdin,
    read: BufReader<ChildStdout>,
}

impl Piped {
    fn start(place: &Place) -> Self {
        let mut child =
            place.command(&["--stdio"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (write, read) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, write, read }
    }

    async fn request(&mut self, id: u64, method: &str, params: Value) -> Value {
        let line = format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}));
        self.write.write_all(line.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, self.read.read_line(&mut answer)).await.unwrap().unwrap();
        let answer: Value = serde_json::from_str(&answer).expect("stdout holds JSON lines and nothing else");
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }

    async fn initialize(&mut self) {
        let params = json!({"protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": {"name": "test", "version": "0"}});
        let answer = self.request(1, "initialize", params).await;
        assert_eq!(answer["result"]["protocolVersion"], "2025-06-18");
    }
}

#[tokio::test]
async fn the_daemon_serves_and_ends_in_order() {
    let place = Place::new();
    let daemon = place.daemon(&[]).await;
    let mut client = Stream::open(&place.socket(), "/mcp").await;
    client.initialize().await;
    let list = client.request("tools/list", json!({})).await;
    assert!(list["result"]["tools"].as_array().unwrap().len() > 20);

    let second = place.output(&["run"]).await;
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another nexusd"), "{said}");

    terminate(&daemon);
    assert_eq!(ended(daemon).await, 0);
    assert!(!place.socket().exists());
    // The next one starts where this one ended, also after a kill.
    let mut daemon = place.daemon(&[]).await;
    daemon.kill().await.unwrap();
    let daemon = place.daemon(&[]).await;
    terminate(&daemon);
    assert_eq!(ended(daemon).await, 0);
}

#[tokio::test]
async fn stdio_is_daemon_and_server_in_one_and_a_bridge_beside_another() {
    let place = Place::new();
    let mut first = Piped::start(&place);
    first.initialize().await;
    let socket = place.socket();
    assert!(UnixStream::connect(&socket).await.is_ok(), "it serves the socket too");
    let mut second = Piped::start(&place);
    second.initialize().await;
    for client in [&mut first, &mut second] {
        let list = client.request(2, "tools/list", json!({})).await;
        assert!(list["result"]["tools"].as_array().unwrap().len() > 20);
    }
    // The first client's process stays as long as others use its daemon.
    drop((first.write, first.read));
    let list = second.request(3, "tools/list", json!({})).await;
    assert!(list["result"]["tools"].is_array());
    drop((second.write, second.read));
    assert_eq!(ended(second.child).await, 0);
    assert_eq!(ended(first.child).await, 0);
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_piped_in_conversation_is_answered_whole() {
    let place = Place::new();
    let mut child = place.command(&["--stdio"]).stdin(Stdio::piped()).spawn().unwrap();
    let lines = [
        json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25",
            "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}}),
        json!({"jsonrpc": "2.0", "method": "notifications/initialized"}),
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list"}),
        json!({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "guest_os_info", "arguments": {}}}),
    ];
    let mut stdin = child.stdin.take().unwrap();
    // The last line has no newline.
    let lines: Vec<_> = lines.iter().map(Value::to_string).collect();
    stdin.write_all(lines.join("\n").as_bytes()).await.unwrap();
    drop(stdin);
    let output = timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert!(output.status.success());
    let answers: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let mut ids: Vec<_> = answers.iter().map(|a| a["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
}

#[tokio::test]
async fn mistakes_are_told_at_once_and_doctor_answers() {
    let place = Place::new();
    let output = place.output(&["--http", "0.0.0.0:1", "--driver", "xen"]).await;
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--http") && said.contains("--driver"), "{said}");
    assert!(output.stdout.is_empty());

    let report: Value = serde_json::from_slice(&place.output(&["doctor", "--json"]).await.stdout).unwrap();
    assert!(report["ok"].is_boolean() && !report["checks"].as_array().unwrap().is_empty());
    let text = String::from_utf8(place.output(&["doctor"]).await.stdout).unwrap();
    assert!(text.contains("VMs "), "{text}");
}

#[tokio::test]
async fn http_is_served_when_asked_for() {
    let place = Place::new();
    let log = place.0.path().join("log");
    let mut command = place.command(&["--http", "127.0.0.1:0"]);
    command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let _daemon = command.spawn().unwrap();
    let mut address = String::new();
    until("the daemon says where it serves", || {
        let said = std::fs::read_to_string(&log).unwrap();
        let told = said.split_once("url=http://").and_then(|(_, rest)| rest.split_once("/mcp"));
        address = told.map_or_else(String::new, |(address, _)| address.to_owned());
        !address.is_empty()
    })
    .await;
    let token = std::fs::read_to_string(place.0.path().join("state/http-token")).unwrap();
    let bearer = format!("Bearer {}", token.trim());
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut http = common::Http::new(stream).await;
    http.initialize("/mcp", &[("authorization", &bearer)]).await;
    assert_eq!(http.send("GET", "/mcp", &[], &Value::Null).await.status(), 401);
}
