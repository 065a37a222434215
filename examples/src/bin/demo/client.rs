//! A small MCP client: JSON lines over the standard streams of a child process. It knows no more of Nexus than any client.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::show;

/// How long the server may take to answer one request; long work answers earlier and is asked after.
const ANSWER: Duration = Duration::from_mins(2);
/// How long the server may take to end once its input is closed.
const END: Duration = Duration::from_secs(30);

/// Why the demo cannot go on.
pub(crate) enum DemoError {
    /// A file or process of its own.
    Io { what: String, source: io::Error },
    /// The server ended; what it wrote last.
    Gone { log: String },
    /// The server took too long.
    Silent { method: String },
    /// The server answered with a protocol error.
    Protocol { method: String, error: Value },
    /// A tool said no.
    Tool { tool: String, said: String },
    /// A result was not what it must be.
    Unexpected { wanted: String, got: String },
}

impl fmt::Display for DemoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { what, source } => write!(f, "{what}: {source}"),
            Self::Gone { log } => write!(f, "nexusd ended; it wrote last:\n{log}"),
            Self::Silent { method } => write!(f, "no answer to {method} in {} s", ANSWER.as_secs()),
            Self::Protocol { method, error } => write!(f, "{method} was refused: {error}"),
            Self::Tool { tool, said } => write!(f, "{tool} failed: {said}"),
            Self::Unexpected { wanted, got } => write!(f, "expected {wanted:?} in {got}"),
        }
    }
}

fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> DemoError {
    let what = what.into();
    move |source| DemoError::Io { what, source }
}

/// One connection, and the server at its other end.
pub(crate) struct Client {
    server: Child,
    input: Option<ChildStdin>,
    answers: Receiver<Value>,
    log: PathBuf,
    last_id: u64,
}

impl Client {
    /// Starts the server with everything that it keeps under `directory`.
    pub(crate) fn start(nexusd: &Path, directory: &Path) -> Result<Self, DemoError> {
        fs::create_dir_all(directory).map_err(io(format!("create {}", directory.display())))?;
        let directory = fs::canonicalize(directory).map_err(io(format!("find {}", directory.display())))?;
        let log = directory.join("nexusd.log");
        let stderr = File::create(&log).map_err(io(format!("create {}", log.display())))?;
        let mut server = Command::new(nexusd)
            .arg("--stdio")
            .env("NEXUS_STATE_DIR", directory.join("state"))
            .env("NEXUS_RUNTIME_DIR", directory.join("run"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(io(format!("start {}", nexusd.display())))?;
        let input = server.stdin.take();
        let output = server.stdout.take().expect("the output was asked to be a pipe");
        let (send, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(message) = serde_json::from_str(&line)
                    && send.send(message).is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { server, input, answers, log, last_id: 0 })
    }

    /// Sends a request and waits for its answer; progress that comes meanwhile is shown.
    pub(crate) fn request(&mut self, method: &str, params: Value) -> Result<Value, DemoError> {
        self.last_id += 1;
        let id = self.last_id;
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let wait = deadline.saturating_duration_since(Instant::now());
            let mut message = match self.answers.recv_timeout(wait) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(DemoError::Silent { method: method.to_owned() });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
            };
            if message["method"] == "notifications/progress" {
                show::progress(&message["params"]);
            } else if message["id"] == id {
                show::end_progress();
                return match message.get_mut("error") {
                    Some(error) => {
                        Err(DemoError::Protocol { method: method.to_owned(), error: error.take() })
                    }
                    None => Ok(message["result"].take()),
                };
            }
        }
    }

    /// Sends a notification without parameters.
    pub(crate) fn notify(&mut self, method: &str) -> Result<(), DemoError> {
        self.send(&json!({ "jsonrpc": "2.0", "method": method }))
    }

    /// Calls a tool, with question and answer shown.
    pub(crate) fn call(&mut self, tool: &str, arguments: Value) -> Result<Value, DemoError> {
        show::question(tool, &arguments);
        let started = Instant::now();
        let token = self.last_id + 1;
        let params = json!({ "name": tool, "arguments": arguments, "_meta": { "progressToken": token } });
        let result = self.request("tools/call", params)?;
        if result["isError"] == true {
            let said = result["content"][0]["text"].as_str().unwrap_or("without a word").to_owned();
            return Err(DemoError::Tool { tool: tool.to_owned(), said });
        }
        show::result(&result, started.elapsed());
        Ok(result)
    }

    /// Calls a tool that starts long work, and asks after it until it is done. Returns the outcome.
    pub(crate) fn call_to_the_end(
        &mut self,
        tool: &str,
        arguments: Value,
        longest: Duration,
    ) -> Result<Value, DemoError> {
        let deadline = Instant::now() + longest;
        let mut outcome = self.call(tool, arguments)?["structuredContent"].take();
        while outcome["done"] != true {
            if Instant::now() > deadline {
                return Err(DemoError::Silent { method: tool.to_owned() });
            }
            outcome = self.call("op_get", json!({ "op_id": outcome["op_id"] }))?["structuredContent"].take();
        }
        if outcome["state"] != "succeeded" {
            return Err(DemoError::Tool { tool: tool.to_owned(), said: outcome.to_string() });
        }
        Ok(outcome)
    }

    /// Closes the connection, whereupon the server ends.
    pub(crate) fn finish(mut self) -> Result<(), DemoError> {
        self.input = None;
        match self.answers.recv_timeout(END) {
            Err(RecvTimeoutError::Disconnected) => {}
            Ok(_) | Err(RecvTimeoutError::Timeout) => self.server.kill().map_err(io("end nexusd"))?,
        }
        self.server.wait().map_err(io("wait for nexusd"))?;
        Ok(())
    }

    fn send(&mut self, message: &Value) -> Result<(), DemoError> {
        let Some(input) = &mut self.input else { return Err(self.gone()) };
        if writeln!(input, "{message}").and_then(|()| input.flush()).is_err() {
            return Err(self.gone());
        }
        Ok(())
    }

    fn gone(&self) -> DemoError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        DemoError::Gone { log: lines[lines.len().saturating_sub(20)..].join("\n") }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // After a failure: the daemon ends when its input does.
        self.input = None;
    }
}
