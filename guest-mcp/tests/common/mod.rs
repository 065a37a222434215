//! A real `nexus-guest --unix` with a host that answers its hello, and a client that speaks JSON lines to it.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its own part, and a test may panic")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nexus_schema::link::{Ack, Configure, GuestMessage, Hello, HostMessage, PROTOCOL};
use serde_json::{Value, json};

/// How long anything may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The token that every guest gets.
pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Waits until `is_so`, or fails.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain waited until {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// What a guest said to its host.
pub(crate) struct Said {
    pub(crate) hello: Hello,
    pub(crate) ack: Ack,
}

/// A configuration as hosts send it.
pub(crate) fn configure() -> Configure {
    Configure {
        protocol: PROTOCOL,
        token: TOKEN.into(),
        vm: "aaaaaaaaaaaac".parse().unwrap(),
        name: "web-1".parse().unwrap(),
        boot_id: "aaaaaaaaaaaae".parse().unwrap(),
        hostname: "web-1".into(),
        time_unix_ns: 0,
        interfaces: vec![],
        dns: vec![],
        search: vec![],
        env: [("FROM_HOST".to_owned(), "yes".to_owned())].into(),
        working_dir: None,
        image_user: None,
        wait_for_init_s: 0,
        mounts: Vec::new(),
        files: vec![],
        proxy: None,
        resume: None,
        template: false,
    }
}

/// The host's end of the hello port.
pub(crate) struct Host {
    listener: UnixListener,
}

impl Host {
    pub(crate) fn bind(directory: &Path) -> Self {
        // Short, because a socket's path holds 107 bytes only.
        let short = PathBuf::from(format!("/proc/self/cwd/{}", directory.display()));
        let path = if directory.is_absolute() { directory.to_owned() } else { short };
        let handle = std::fs::File::open(path).unwrap();
        let name = format!("/proc/self/fd/{}/v.sock_1024", std::os::fd::AsRawFd::as_raw_fd(&handle));
        Self { listener: UnixListener::bind(name).unwrap() }
    }

    pub(crate) fn accept(&self) -> BufReader<UnixStream> {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    }

    pub(crate) fn hear(stream: &mut BufReader<UnixStream>) -> GuestMessage {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    pub(crate) fn say(stream: &mut BufReader<UnixStream>, message: &HostMessage) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        stream.get_mut().write_all(&line).unwrap();
    }

    /// One hello exchange as it should be.
    pub(crate) fn welcome(&self, configure: Configure) -> Said {
        let mut stream = self.accept();
        let GuestMessage::Hello(hello) = Self::hear(&mut stream) else { panic!("expected a hello") };
        Self::say(&mut stream, &HostMessage::Configure(configure));
        let GuestMessage::Ack(ack) = Self::hear(&mut stream) else { panic!("expected an ack") };
        Self::say(&mut stream, &HostMessage::Welcome {});
        Said { hello, ack }
    }
}

/// A guest that runs.
pub(crate) struct Guest {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) process: Child,
    pub(crate) host: Host,
    pub(crate) said: Said,
}

impl Guest {
    pub(crate) fn start() -> Self {
        Self::start_configured(|_, _| {})
    }

    /// A guest with a changed configuration; the first argument is the directory that it runs in.
    pub(crate) fn start_configured(change: impl FnOnce(&Path, &mut Configure)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = Host::bind(directory.path());
        let process = spawn(directory.path(), &[]);
        let mut configure = configure();
        change(directory.path(), &mut configure);
        let said = host.welcome(configure);
        Self { directory, process, host, said }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.directory.path())
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.process)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a guest that serves on sockets in `directory`.
pub(crate) fn spawn(directory: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nexus-guest"));
    command.arg("--unix").arg(directory).args(arguments).spawn().unwrap()
}

pub(crate) fn wait(process: &mut Child) -> ExitStatus {
    let mut status = None;
    until("the guest ended", || {
        status = process.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Dials a port of a guest; gives the stream after the handshake's answer, or `None` if it was hung up on.
pub(crate) fn dial(directory: &Path, handshake: &[u8]) -> Option<BufReader<UnixStream>> {
    let handle = std::fs::File::open(directory).unwrap();
    let name = format!("/proc/self/fd/{}/v.sock", std::os::fd::AsRawFd::as_raw_fd(&handle));
    let mut stream = UnixStream::connect(name).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A guest that hangs up at once may do so before all is written.
    let _ = stream.write_all(handshake);
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(0) => None,
        Ok(_) => {
            assert!(line.starts_with("OK "), "{line}");
            Some(stream)
        }
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        Err(error) => panic!("{error}"),
    }
}

/// An MCP client of the older era, one request at a time or many.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    next: i64,
}

impl Client {
    pub(crate) fn connect(directory: &Path) -> Self {
        let stream = dial(directory, b"CONNECT 200\n").expect("the MCP port answers");
        let mut client = Self { stream, next: 0 };
        let hello = json!({
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": { "name": "test", "version": "1" },
        });
        let answer = client.request("initialize", hello);
        assert_eq!(answer["result"]["serverInfo"]["name"], "nexus-guest", "{answer}");
        client.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        client
    }

    pub(crate) fn send(&mut self, message: &Value) {
        self.send_line(&serde_json::to_vec(message).unwrap());
    }

    pub(crate) fn send_line(&mut self, line: &[u8]) {
        let mut line = line.to_vec();
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).unwrap();
    }

    /// The next message, except that a command has ended in the background: that may come at any time.
    pub(crate) fn read(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.stream.read_line(&mut line).unwrap(), 0, "the guest hung up");
            let message: Value = serde_json::from_str(&line).unwrap();
            if message["method"] != "nexus/command-ended" {
                return message;
            }
        }
    }

    pub(crate) fn is_hung_up(&mut self) -> bool {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).is_ok()
    }

    /// Sends a request and gives its id.
    pub(crate) fn begin(&mut self, method: &str, params: Value) -> i64 {
        self.next += 1;
        self.send(&json!({ "jsonrpc": "2.0", "id": self.next, "method": method, "params": params }));
        self.next
    }

    pub(crate) fn request(&mut self, method: &str, params: Value) -> Value {
        let id = self.begin(method, params);
        let answer = self.read();
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }

    pub(crate) fn begin_call(&mut self, tool: &str, arguments: Value) -> i64 {
        self.begin("tools/call", json!({ "name": tool, "arguments": arguments }))
    }

    /// Calls a tool; gives the result object.
    pub(crate) fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer = self.request("tools/call", json!({ "name": tool, "arguments": arguments }));
        assert!(answer["error"].is_null(), "{answer}");
        answer["result"].clone()
    }

    /// Calls a tool that must succeed.
    pub(crate) fn good(&mut self, tool: &str, arguments: Value) -> Value {
        let result = self.call(tool, arguments);
        assert_eq!(result["isError"], false, "{result}");
        result
    }

    /// Calls a tool that must fail; gives the code, after checking that the failure has the agreed form.
    pub(crate) fn bad(&mut self, tool: &str, arguments: Value) -> String {
        let result = self.call(tool, arguments);
        assert_eq!(result["isError"], true, "{result}");
        assert!(result["structuredContent"].is_null(), "{result}");
        let error = &result["_meta"]["dev.nexus/error"];
        let (code, message) = (error["code"].as_str().unwrap(), error["message"].as_str().unwrap());
        assert!(
            result["content"][0]["text"].as_str().unwrap().starts_with(&format!("{code}: {message}")),
            "{result}"
        );
        code.to_owned()
    }
}

/// The facts of a text-first result.
pub(crate) fn facts(result: &Value) -> &Value {
    &result["_meta"]["dev.nexus/result"]
}

/// The text of a stream of a result; empty where there is none.
pub(crate) fn stream<'a>(result: &'a Value, name: &str) -> &'a str {
    let blocks = result["content"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["_meta"]["dev.nexus/stream"] == name);
    block.map_or("", |block| block["text"].as_str().unwrap())
}

/// The first line of a result.
pub(crate) fn header(result: &Value) -> &str {
    result["content"][0]["text"].as_str().unwrap().lines().next().unwrap()
}

/// Runs `work` with a deadline.
pub(crate) fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(limit).expect("in time")
}

/// How many living processes have `needle` in their command line.
pub(crate) fn processes_with(needle: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    pids.filter(|entry| {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(needle)
    })
    .count()
}

/// The process that holds the commands of a guest.
pub(crate) fn holder(guest: &Guest) -> u32 {
    let mark = format!("hold-for-process\0{}", guest.directory.path().display());
    let mut found = None;
    until("the holder runs", || {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        found = pids.find(|pid| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(&mark)
        });
        found.is_some()
    });
    found.unwrap()
}

/// What a line of a process's status says of its memory, in bytes.
pub(crate) fn memory(pid: u32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
