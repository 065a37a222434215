//! A small MCP client: JSON lines over the standard streams of a child process. Nothing in it is specific to Nexus.

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

/// The timeout for one answer; long work answers earlier and is polled.
const ANSWER: Duration = Duration::from_mins(2);
/// How long the server may take to exit after its input was closed.
const END: Duration = Duration::from_secs(30);

/// Why a conversation failed.
pub enum ClientError {
    /// A local file or process failed.
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The server exited; the end of its log.
    Gone {
        /// The end of its log.
        log: String,
    },
    /// The server timed out.
    Silent {
        /// The request's method.
        method: String,
    },
    /// The server answered with a protocol error.
    Protocol {
        /// The request's method.
        method: String,
        /// The answer.
        error: Value,
    },
    /// A tool returned an error.
    Tool {
        /// The tool.
        tool: String,
        /// Its message.
        said: String,
    },
    /// A result is not as expected.
    Unexpected {
        /// What was expected.
        wanted: String,
        /// The actual result.
        got: String,
    },
}

impl fmt::Display for ClientError {
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

fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> ClientError {
    let what = what.into();
    move |source| ClientError::Io { what, source }
}

/// A connection to a server.
pub struct Client {
    server: Child,
    input: Option<ChildStdin>,
    answers: Receiver<Value>,
    log: PathBuf,
    last_id: u64,
    counts: Counts,
}

/// The cost of tool calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// The number of calls.
    pub calls: u64,
    /// The bytes of their names and arguments.
    pub sent: usize,
    /// The bytes of their results that a model would see: the structured part if there is one, else the texts.
    pub shown: usize,
}

impl Client {
    /// Starts the server with all its files under `directory`.
    pub fn start(nexusd: &Path, directory: &Path) -> Result<Self, ClientError> {
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
        Ok(Self { server, input, answers, log, last_id: 0, counts: Counts::default() })
    }

    /// Opens the session and prints who answers.
    pub fn greet(&mut self, name: &str) -> Result<Value, ClientError> {
        let hello = self.request(
            "initialize",
            json!({
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "clientInfo": { "name": name, "version": env!("CARGO_PKG_VERSION") },
            }),
        )?;
        self.notify("notifications/initialized")?;
        Ok(hello)
    }

    /// The number of tool calls so far, and the bytes that they and their results took.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Sends a request and waits for its answer; shows progress meanwhile.
    pub fn request(&mut self, method: &str, params: Value) -> Result<Value, ClientError> {
        self.last_id += 1;
        let id = self.last_id;
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let wait = deadline.saturating_duration_since(Instant::now());
            let mut message = match self.answers.recv_timeout(wait) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(ClientError::Silent { method: method.to_owned() });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
            };
            if message["method"] == "notifications/progress" {
                show::progress(&message["params"]);
            } else if message["id"] == id {
                show::end_progress();
                return match message.get_mut("error") {
                    Some(error) => {
                        Err(ClientError::Protocol { method: method.to_owned(), error: error.take() })
                    }
                    None => Ok(message["result"].take()),
                };
            }
        }
    }

    /// Sends a notification without parameters.
    pub fn notify(&mut self, method: &str) -> Result<(), ClientError> {
        self.send(&json!({ "jsonrpc": "2.0", "method": method }))
    }

    /// Calls a tool; prints the call and its result.
    pub fn call(&mut self, tool: &str, arguments: Value) -> Result<Value, ClientError> {
        show::question(tool, &arguments);
        let started = Instant::now();
        let token = self.last_id + 1;
        self.counts.calls += 1;
        self.counts.sent += tool.len() + arguments.to_string().len();
        let params = json!({ "name": tool, "arguments": arguments, "_meta": { "progressToken": token } });
        let result = self.request("tools/call", params)?;
        if result["isError"] == true {
            let said = result["content"][0]["text"].as_str().unwrap_or("without a word").to_owned();
            return Err(ClientError::Tool { tool: tool.to_owned(), said });
        }
        self.counts.shown += match &result["structuredContent"] {
            Value::Null => {
                let blocks = result["content"].as_array().into_iter().flatten();
                blocks.filter_map(|block| block["text"].as_str()).map(str::len).sum()
            }
            structured => structured.to_string().len(),
        };
        show::result(&result, started.elapsed());
        Ok(result)
    }

    /// Calls a tool that starts long work, and polls until it is done. Returns the outcome.
    pub fn call_to_the_end(
        &mut self,
        tool: &str,
        arguments: Value,
        longest: Duration,
    ) -> Result<Value, ClientError> {
        let deadline = Instant::now() + longest;
        let mut outcome = self.call(tool, arguments)?["structuredContent"].take();
        while outcome["done"] != true {
            if Instant::now() > deadline {
                return Err(ClientError::Silent { method: tool.to_owned() });
            }
            outcome = self.call("op_get", json!({ "op_id": outcome["op_id"] }))?["structuredContent"].take();
        }
        if outcome["state"] != "succeeded" {
            return Err(ClientError::Tool { tool: tool.to_owned(), said: outcome.to_string() });
        }
        Ok(outcome)
    }

    /// Closes the connection, which stops the server.
    pub fn finish(mut self) -> Result<(), ClientError> {
        self.input = None;
        match self.answers.recv_timeout(END) {
            Err(RecvTimeoutError::Disconnected) => {}
            Ok(_) | Err(RecvTimeoutError::Timeout) => self.server.kill().map_err(io("end nexusd"))?,
        }
        self.server.wait().map_err(io("wait for nexusd"))?;
        Ok(())
    }

    fn send(&mut self, message: &Value) -> Result<(), ClientError> {
        let Some(input) = &mut self.input else { return Err(self.gone()) };
        if writeln!(input, "{message}").and_then(|()| input.flush()).is_err() {
            return Err(self.gone());
        }
        Ok(())
    }

    fn gone(&self) -> ClientError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        ClientError::Gone { log: lines[lines.len().saturating_sub(20)..].join("\n") }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // After a failure: closing its input stops the daemon.
        self.input = None;
    }
}
