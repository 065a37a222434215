//! A daemon that is small and works: JSON lines on a Unix socket after the upgrade, tools as closures.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything in these tests may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a tool does: its arguments, and a way to send notifications before it answers. `None` never answers.
pub type Tool = Box<dyn Fn(&Value, &Caller) -> Option<Value> + Send + Sync>;

/// The connection that a call came on.
pub struct Caller {
    stream: UnixStream,
    token: Value,
    shared: Arc<Shared>,
}

impl Caller {
    /// Sends a progress notification.
    pub fn progress(&self, count: u64, message: &str) {
        let params = json!({ "progressToken": self.token, "progress": count, "message": message });
        send(
            &self.stream,
            &json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params }),
        );
    }

    /// How often a tool was called, this call included.
    pub fn count(&self, tool: &str) -> usize {
        let seen = self.shared.seen.lock().unwrap();
        seen.messages.iter().filter(|m| m["method"] == "tools/call" && m["params"]["name"] == tool).count()
    }

    /// Waits until the client sent a message of this method.
    pub fn wait_for(&self, method: &str) {
        self.shared.wait(|seen| seen.messages.iter().any(|m| m["method"] == method));
    }
}

#[derive(Default)]
struct Seen {
    messages: Vec<Value>,
    paths: Vec<String>,
    streams: Vec<UnixStream>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
    closed: AtomicBool,
}

impl Shared {
    fn update(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait(&self, condition: impl Fn(&Seen) -> bool) {
        let seen = self.seen.lock().unwrap();
        let (seen, result) =
            self.changed.wait_timeout_while(seen, DEADLINE, |seen| !condition(seen)).unwrap();
        assert!(!result.timed_out(), "did not come: {:#?}", seen.messages);
    }
}

/// A running daemon.
pub struct Fake {
    socket: PathBuf,
    shared: Arc<Shared>,
}

impl Fake {
    /// Listens on `nexus.sock` in a directory.
    pub fn start<const N: usize>(directory: &Path, tools: [(&str, Tool); N]) -> Self {
        let tools: BTreeMap<String, Tool> =
            tools.into_iter().map(|(name, tool)| (name.to_owned(), tool)).collect();
        let socket = directory.join("nexus.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let shared = Arc::<Shared>::default();
        let (tools, accepting) = (Arc::new(tools), shared.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.closed.load(Ordering::SeqCst) {
                    return;
                }
                let (tools, shared) = (tools.clone(), accepting.clone());
                thread::spawn(move || serve(stream, &tools, &shared));
            }
        });
        Self { socket, shared }
    }

    /// Every message that came, in order.
    pub fn messages(&self) -> Vec<Value> {
        self.shared.seen.lock().unwrap().messages.clone()
    }

    /// The arguments of the calls of a tool.
    pub fn calls(&self, tool: &str) -> Vec<Value> {
        let messages = self.messages();
        let calls = messages.iter().filter(|m| m["method"] == "tools/call" && m["params"]["name"] == tool);
        calls.map(|m| m["params"]["arguments"].clone()).collect()
    }

    /// The paths that were asked for.
    pub fn paths(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().paths.clone()
    }

    /// Waits until the messages that came are enough.
    pub fn wait(&self, condition: impl Fn(&[Value]) -> bool) {
        self.shared.wait(|seen| condition(&seen.messages));
    }

    /// Sends a message to every client.
    pub fn send(&self, message: &Value) {
        self.shared.seen.lock().unwrap().streams.iter().for_each(|stream| send(stream, message));
    }
}

impl Drop for Fake {
    /// Goes away as a killed daemon does, but leaves no socket behind.
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which then drops the listener.
        drop(UnixStream::connect(&self.socket));
        drop(std::fs::remove_file(&self.socket));
        self.shared.update(|seen| {
            for stream in seen.streams.drain(..) {
                drop(stream.shutdown(Shutdown::Both));
            }
        });
    }
}

fn serve(stream: UnixStream, tools: &Arc<BTreeMap<String, Tool>>, shared: &Arc<Shared>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if reader.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
    }
    let path = request.split(' ').nth(1).unwrap().to_owned();
    assert!(request.to_ascii_lowercase().contains("upgrade: mcp-stream\r\n"), "{request}");
    if let Some(vm) = path.strip_prefix("/mcp/vm/").filter(|vm| *vm == "missing") {
        let error = json!({ "code": "vm_not_found", "message": format!("no VM {vm}"), "retryable": false });
        let body = json!({ "error": error }).to_string();
        let head = format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n", body.len());
        (&stream).write_all((head + &body).as_bytes()).unwrap();
        return;
    }
    shared.update(|seen| {
        seen.paths.push(path);
        seen.streams.push(stream.try_clone().unwrap());
    });
    let head = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: mcp-stream\r\n\r\n";
    if (&stream).write_all(head).is_err() {
        return;
    }
    for line in reader.lines().map_while(Result::ok) {
        let message: Value = serde_json::from_str(&line).unwrap();
        shared.update(|seen| seen.messages.push(message.clone()));
        if message.get("id").is_none() || message.get("method").is_none() {
            continue;
        }
        let caller = Caller {
            stream: stream.try_clone().unwrap(),
            token: message["params"]["_meta"]["progressToken"].clone(),
            shared: shared.clone(),
        };
        let tools = tools.clone();
        thread::spawn(move || {
            if let Some(mut answer) = answer(&message, &tools, &caller) {
                answer["jsonrpc"] = "2.0".into();
                answer["id"] = message["id"].clone();
                send(&caller.stream, &answer);
            }
        });
    }
}

fn answer(message: &Value, tools: &BTreeMap<String, Tool>, caller: &Caller) -> Option<Value> {
    match message["method"].as_str().unwrap() {
        "initialize" => Some(json!({ "result": {
            "protocolVersion": message["params"]["protocolVersion"],
            "capabilities": { "tools": {} },
            "serverInfo": { "name": "nexus", "version": "0.0.0" },
        }})),
        "tools/call" => match tools.get(message["params"]["name"].as_str().unwrap()) {
            Some(tool) => {
                tool(&message["params"]["arguments"], caller).map(|result| json!({ "result": result }))
            }
            None => Some(json!({ "error": { "code": -32602, "message": "unknown tool" } })),
        },
        "ping" => Some(json!({ "result": {} })),
        method => Some(json!({ "error": { "code": -32601, "message": method } })),
    }
}

/// One write a line, so that threads do not mix theirs.
fn send(mut stream: &UnixStream, message: &Value) {
    // The client may be gone; that is its own affair.
    drop(stream.write_all(format!("{message}\n").as_bytes()));
}

/// A tool that always gives the same structured result.
pub fn gives(value: Value) -> Tool {
    Box::new(move |_, _| Some(structured(&value)))
}

/// A tool that always fails.
pub fn fails(code: &'static str, message: &'static str, hint: &'static str) -> Tool {
    fails_with(code, message, hint, json!({}))
}

/// A failure inside the VM, by the word of its guest.
pub fn fails_inside(code: &'static str, message: &'static str, hint: &'static str) -> Tool {
    fails_with(code, message, hint, json!({ "dev.nexus/from": "guest" }))
}

fn fails_with(code: &'static str, message: &'static str, hint: &'static str, mut meta: Value) -> Tool {
    meta["dev.nexus/error"] = json!({ "code": code, "message": message, "retryable": false, "hint": hint });
    Box::new(move |_, _| {
        Some(json!({
            "isError": true, "_meta": meta,
            "content": [{ "type": "text", "text": format!("{code}: {message}\n{hint}") }],
        }))
    })
}

/// A structured result.
pub fn structured(value: &Value) -> Value {
    json!({ "structuredContent": value, "content": [{ "type": "text", "text": value.to_string() }] })
}

/// An environment of its own for `nexusctl`.
pub struct World {
    /// Everything is under this.
    pub root: tempfile::TempDir,
}

impl World {
    /// Empty directories.
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["state", "run"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        Self { root }
    }

    /// Where the daemon's socket is.
    pub fn runtime(&self) -> PathBuf {
        self.root.path().join("run")
    }

    /// `nexusctl`, told nothing but where this world is.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nexusctl"));
        command.args(line.split_whitespace()).env_clear();
        command
            .env("NEXUS_STATE_DIR", self.root.path().join("state"))
            .env("NEXUS_RUNTIME_DIR", self.runtime());
        command.env("HOME", self.root.path()).stdin(Stdio::null());
        command
    }

    /// Runs a command line to its end.
    pub fn run(&self, line: &str) -> Run {
        finish(self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// The same with something to read.
    pub fn run_with(&self, line: &str, input: &[u8]) -> Run {
        let mut command = self.command(line);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        finish(child)
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Run {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Run {
    /// What it wrote to stdout, as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// What it wrote to stdout, as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Everything, for snapshots.
    pub fn shown(&self) -> String {
        format!("exit {}\n--- stdout\n{}--- stderr\n{}", self.code, self.text(), self.stderr)
    }
}

/// Waits for a child, with a deadline.
pub fn finish(mut child: Child) -> Run {
    let id = rustix::process::Pid::from_child(&child);
    let done = Arc::new((Mutex::new(false), Condvar::new()));
    let watched = done.clone();
    let watchdog = thread::spawn(move || {
        let (ended, changed) = &*watched;
        let ended = ended.lock().unwrap();
        let (_ended, result) = changed.wait_timeout_while(ended, DEADLINE, |ended| !*ended).unwrap();
        if result.timed_out() {
            let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
        }
        result.timed_out()
    });
    drop(child.stdin.take());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    *done.0.lock().unwrap() = true;
    done.1.notify_all();
    assert!(!watchdog.join().unwrap(), "hung: {}", String::from_utf8_lossy(&stderr));
    let code = status.code().unwrap_or(-1);
    Run { code, stdout, stderr: String::from_utf8_lossy(&stderr).into_owned() }
}

/// Waits for a condition that nobody announces.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::park_timeout(Duration::from_millis(10));
    }
}

/// Reads lines of a child without blocking the test forever.
pub struct Lines {
    lines: std::sync::mpsc::Receiver<String>,
}

impl Lines {
    /// Reads in a thread of its own.
    pub fn of(stream: impl Read + Send + 'static) -> Self {
        let (sender, lines) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { lines }
    }

    /// The next line as JSON.
    pub fn next(&self) -> Value {
        let line = self.lines.recv_timeout(DEADLINE).expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}"))
    }

    /// Whether the stream ended without another line.
    pub fn is_at_end(&self) -> bool {
        self.lines.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
    }
}
