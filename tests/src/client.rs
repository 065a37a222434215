//! A plain MCP client for tests: JSON lines over the daemon's upgraded Unix stream, one call after another. As the SDKs do, it checks each
//! result against the tool's schema; facts of text tools too, in `_meta["dev.nexus/result"]`.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nexus_schema::schema::{of, shared};
use nexus_schema::tool::GUEST_PREFIX;
use nexus_schema::{Tool, for_each_guest_tool, for_each_host_tool};
use serde_json::{Map, Value, json};

use crate::schema::violation;
use crate::wait::until;

/// The timeout for one answer; every tool of Nexus answers earlier.
const ANSWER: Duration = Duration::from_mins(3);
/// The timeout for a VM to become ready under software emulation on a busy machine.
pub const BOOT: Duration = Duration::from_mins(4);

/// The schema of each tool's facts by the tool's name on the host: with definitions, as in lists, but also with what concerns the host alone.
static SCHEMAS: LazyLock<HashMap<String, Map<String, Value>>> = LazyLock::new(|| {
    let mut all = HashMap::new();
    macro_rules! of_host {
        ($($tool:path => $method:ident,)*) => {$(
            all.insert(<$tool>::NAME.to_owned(), shared(of::<<$tool as Tool>::Output>()));
        )*};
    }
    for_each_host_tool!(of_host);
    macro_rules! of_guest {
        ($($tool:path => $method:ident,)*) => {$(
            let name = format!("{GUEST_PREFIX}{}", <$tool>::NAME);
            all.insert(name, shared(of::<<$tool as Tool>::Output>()));
        )*};
    }
    for_each_guest_tool!(of_guest);
    all
});

/// One connection.
#[derive(Debug)]
pub struct Client {
    lines: BufReader<UnixStream>,
    last_id: u64,
    /// Whether results have all that their schemas require; those for a model do not.
    is_whole: bool,
}

/// A tool's `isError` result.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The stable code.
    pub code: String,
    /// Everything that a client sees.
    pub text: String,
}

/// The result of a command in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its exit code; `None` if a signal ended it.
    pub exit_code: Option<i64>,
    /// Its stdout.
    pub stdout: String,
    /// Its stderr.
    pub stderr: String,
}

impl Client {
    /// Connects, upgrades and initializes.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Self::connect_at(socket, "/mcp")
    }

    /// The same with another endpoint of the socket.
    pub fn connect_at(socket: &Path, path: &str) -> io::Result<Self> {
        Self::connect_as(socket, path, "", json!({}))
    }

    /// The same with the rights of a token.
    pub fn connect_with(socket: &Path, token: &str) -> io::Result<Self> {
        Self::connect_as(socket, "/mcp", &format!("Authorization: Bearer {token}\r\n"), json!({}))
    }

    /// The same with these lines in the head of its request, as a client with these capabilities.
    pub fn connect_as(socket: &Path, path: &str, lines: &str, capabilities: Value) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let has_token = lines.contains("Authorization");
        let head = format!(
            "HTTP/1.1\r\nHost: localhost\r\n{lines}Connection: upgrade\r\nUpgrade: mcp-stream\r\n\r\n"
        );
        stream.write_all(format!("GET {path} {head}").as_bytes())?;
        let mut lines = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if lines.read_line(&mut head)? == 0 {
                return Err(io::Error::other(format!("no upgrade: {head:?}")));
            }
        }
        if !head.starts_with("HTTP/1.1 101") {
            return Err(io::Error::other(format!("no upgrade: {head:?}")));
        }
        // A token may be offered a set whose results are for a model.
        let is_whole = path == "/mcp" && !has_token;
        let mut client = Self { lines, last_id: 0, is_whole };
        client.request(
            "initialize",
            &json!({ "protocolVersion": "2025-11-25", "capabilities": capabilities, "clientInfo": { "name": "test", "version": "0" } }),
        )?;
        client.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }))?;
        Ok(client)
    }

    /// Sends one request without waiting for its answer; returns its id.
    pub fn start(&mut self, method: &str, params: &Value) -> io::Result<u64> {
        self.last_id += 1;
        let id = self.last_id;
        self.send(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }))?;
        Ok(id)
    }

    /// Sends a line unchanged.
    pub fn send_line(&mut self, line: &str) -> io::Result<()> {
        self.lines.get_mut().write_all(format!("{line}\n").as_bytes())
    }

    /// The answer to a request, as an unparsed line.
    pub fn answer(&mut self, id: u64) -> io::Result<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("no answer to request {id}"),
                ));
            }
            if serde_json::from_str::<Value>(&line)?["id"] == id {
                return Ok(line);
            }
        }
    }

    /// The next line from the daemon, as JSON; an error once it has disconnected.
    pub fn next_message(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends one request; returns its `result`, or an error for a protocol error.
    pub fn request(&mut self, method: &str, params: &Value) -> io::Result<Value> {
        let id = self.start(method, params)?;
        let mut message: Value = serde_json::from_str(&self.answer(id)?)?;
        match message.get("error") {
            Some(error) => Err(io::Error::other(format!("{method}: {error}"))),
            None => Ok(message["result"].take()),
        }
    }

    /// Calls a tool; returns its whole result, or its failure.
    pub fn call_whole(&mut self, tool: &str, arguments: Value) -> Result<Value, Failure> {
        let params = json!({ "name": tool, "arguments": arguments });
        let result = self.request("tools/call", &params).unwrap_or_else(|e| panic!("{tool}: {e}"));
        if result["isError"] == true {
            let code = result["_meta"]["dev.nexus/error"]["code"].as_str().unwrap_or("without a code");
            let text = result["content"][0]["text"].as_str().unwrap_or_default();
            assert!(
                result.get("structuredContent").is_none_or(Value::is_null),
                "a failure with structuredContent: {result}"
            );
            return Err(Failure { code: code.to_owned(), text: text.to_owned() });
        }
        if let Some(schema) = SCHEMAS.get(tool).filter(|_| self.is_whole) {
            let structured = &result["structuredContent"];
            let facts = if structured.is_null() { &result["_meta"]["dev.nexus/result"] } else { structured };
            let violation = violation(schema, facts);
            assert_eq!(violation, None, "the result of {tool} is not of its schema: {facts}");
        }
        Ok(result)
    }

    /// Calls a tool; returns its structured result, or its failure.
    pub fn call(&mut self, tool: &str, arguments: Value) -> Result<Value, Failure> {
        self.call_whole(tool, arguments).map(|mut result| result["structuredContent"].take())
    }

    /// The same, and confirms what needs a confirmation.
    pub fn call_confirmed(&mut self, tool: &str, mut arguments: Value) -> Result<Value, Failure> {
        let outcome = self.call(tool, arguments.clone());
        let Err(failure) = &outcome else { return outcome };
        if failure.code != "confirmation_required" {
            return outcome;
        }
        let token = failure.text.split(r#""confirm":""#).nth(1).and_then(|rest| rest.split('"').next());
        arguments["confirm"] = token.expect("a token in the hint").into();
        self.call(tool, arguments)
    }

    /// The same for calls that must succeed.
    #[track_caller]
    pub fn must_confirmed(&mut self, tool: &str, arguments: Value) -> Value {
        self.call_confirmed(tool, arguments).unwrap_or_else(|e| panic!("{tool}: {}", e.text))
    }

    /// The same for calls that must succeed.
    #[track_caller]
    pub fn must(&mut self, tool: &str, arguments: Value) -> Value {
        self.call(tool, arguments).unwrap_or_else(|e| panic!("{tool}: {}", e.text))
    }

    /// Calls a tool that starts long work, and waits for its end. Returns the `result` of the outcome.
    #[track_caller]
    pub fn to_the_end(&mut self, tool: &str, arguments: Value, longest: Duration) -> Value {
        let deadline = Instant::now() + longest;
        let mut outcome = self.must(tool, arguments);
        while outcome["done"] != true {
            assert!(Instant::now() < deadline, "{tool} is not done in {longest:?}: {outcome}");
            outcome = self.must("op_get", json!({ "op_id": outcome["op_id"], "wait_s": 20 }));
        }
        assert_eq!(outcome["state"], "succeeded", "{tool}: {outcome}");
        outcome["result"].take()
    }

    /// Creates a VM and waits until it is ready.
    #[track_caller]
    pub fn create(&mut self, arguments: Value) -> Value {
        let vm = self.to_the_end("vm_create", arguments, BOOT);
        assert_eq!(vm["state"], "ready", "{vm}");
        vm
    }

    /// A VM's details.
    #[track_caller]
    pub fn inspect(&mut self, vm: &str) -> Value {
        self.must("vm_inspect", json!({ "vm": vm }))
    }

    /// Waits until a VM is in a state; returns its details.
    #[track_caller]
    pub fn wait_for_state(&mut self, vm: &str, state: &str) -> Value {
        self.wait_for(vm, state, |details| details["state"] == state)
    }

    /// Waits until a VM's details satisfy `wanted`.
    #[track_caller]
    pub fn wait_for(&mut self, vm: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let reached = until(BOOT, || Some(self.inspect(vm)).filter(|details| wanted(details)));
        match reached {
            Some(details) => details,
            None => panic!("{vm} never got to {what}: {}", self.inspect(vm)),
        }
    }

    /// Runs a command to its end, however long that takes; returns the result of `command_output` with all output.
    pub fn run_to_the_end(&mut self, mut arguments: Value) -> Result<Value, Failure> {
        let vm = arguments["vm"].clone();
        arguments["yield_after_s"] = 45.into();
        let mut result = self.call_whole("guest_run_command", arguments)?;
        let facts = |result: &Value| result["_meta"]["dev.nexus/result"].clone();
        let id = facts(&result)["command_id"].clone();
        if facts(&result)["state"] == "ended" {
            return Ok(result);
        }
        while facts(&result)["state"] == "running" {
            let cursor = facts(&result)["cursor"].clone();
            let wait = json!({ "vm": vm, "id": id, "cursor": cursor, "wait_ms": 45_000 });
            result = self.call_whole("guest_command_output", wait)?;
        }
        self.call_whole("guest_command_output", json!({ "vm": vm, "id": id, "limit": 48_000 }))
    }

    /// Runs a shell line in a VM.
    #[track_caller]
    pub fn run(&mut self, vm: &str, command: &str) -> Ran {
        let result = self
            .run_to_the_end(json!({ "vm": vm, "command": command }))
            .unwrap_or_else(|e| panic!("{command}: {}", e.text));
        let facts = &result["_meta"]["dev.nexus/result"];
        Ran {
            exit_code: facts["exit_code"].as_i64(),
            stdout: stream(&result, "stdout"),
            stderr: stream(&result, "stderr"),
        }
    }

    /// Sends one message unchanged.
    pub fn send(&mut self, message: &Value) -> io::Result<()> {
        let stream = self.lines.get_mut();
        stream.write_all(format!("{message}\n").as_bytes())
    }
}

/// The text of one stream in a guest tool's result: `stdout`, `stderr`, `content`.
pub fn stream(result: &Value, name: &str) -> String {
    let blocks = result["content"].as_array().into_iter().flatten();
    blocks
        .filter(|block| block["_meta"]["dev.nexus/stream"] == name)
        .filter_map(|block| block["text"].as_str())
        .collect()
}
