//! A host with one guest: the real `nexus-guest`, run as an ordinary process, behind real endpoints.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test takes what it needs"
)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use nexus_core::internals::{GuestEvent, HelloServer};
use nexus_core::link::Link;
use nexus_core::{Busy, CallRecord, Caller, GuestHandle, Nexus};
use nexus_core::{Config, DriverSetting};
use nexus_host::endpoint::{BODY_TIME, Endpoints, SocketUsers, serve_unix};
use nexus_host::host::{Guests, Host};
use nexus_host::tools::Toolset;
use nexus_schema::error::ErrorCode;
use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::link::Configure;
use nexus_schema::{Reference, ToolError};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub const LIMIT: Duration = Duration::from_secs(60);

/// `nexus-guest --unix`, said hello to and configured.
pub struct Guest {
    pub directory: tempfile::TempDir,
    _process: tokio::process::Child,
    _hello: HelloServer,
}

impl Guest {
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let configure = Configure {
            protocol: 1,
            token: "0123456789abcdef".repeat(4),
            vm: vm_id(),
            name: "web-1".parse().unwrap(),
            boot_id: BootId::from_i64(2).unwrap(),
            hostname: "web-1".into(),
            time_unix_ns: 0,
            interfaces: Vec::new(),
            dns: Vec::new(),
            search: Vec::new(),
            env: BTreeMap::new(),
            working_dir: None,
            image_user: None,
            wait_for_init_s: 0,
            mounts: Vec::new(),
            files: Vec::new(),
            proxy: None,
            resume: None,
            template: false,
        };
        let (sender, mut events) = mpsc::channel(16);
        let hello = HelloServer::bind(directory.path(), configure, true, sender).unwrap();
        let process = tokio::process::Command::new(guest_binary())
            .args(["--unix", "."])
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        timeout(LIMIT, async {
            while !matches!(events.recv().await.expect("the guest says hello"), GuestEvent::Ready { .. }) {}
        })
        .await
        .unwrap();
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        Self { directory, _process: process, _hello: hello }
    }
}

/// The guest as a program: written once, before anything is started.
pub fn guest_binary() -> &'static Path {
    static BINARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = BINARY.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nexus-guest");
        fs_err::write(&path, nexus_host::daemon::AGENT).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (directory, path)
    });
    path
}

pub fn vm_id() -> VmId {
    VmId::from_i64(1).unwrap()
}

/// One VM, `web-1`, and the log of its calls.
#[derive(Clone)]
pub struct OneGuest {
    pub link: Link,
    pub calls: Arc<Mutex<Vec<CallRecord>>>,
}

impl Guests for OneGuest {
    fn resolve(&self, _: &Caller, vm: &Reference<VmKind>) -> Result<VmId, ToolError> {
        match vm.to_string() {
            name if name == "web-1" || name == vm_id().to_string() => Ok(vm_id()),
            name => Err(ToolError::new(ErrorCode::VmNotFound, format!("no VM {name}"))),
        }
    }

    fn guest(&self, caller: &Caller, vm: &Reference<VmKind>) -> Result<GuestHandle, ToolError> {
        let vm = self.resolve(caller, vm)?;
        assert!(caller.scope.is_none_or(|scope| scope == vm));
        let (name, boot_id) = ("web-1".parse().unwrap(), BootId::from_i64(2).unwrap());
        Ok(GuestHandle {
            vm,
            name,
            boot_id,
            link: self.link.clone(),
            expires_at: None,
            busy: Busy::default(),
        })
    }

    fn record(&self, call: CallRecord) {
        self.calls.lock().unwrap().push(call);
    }
}

/// Endpoints over one real guest.
pub struct Rig {
    pub guest: Guest,
    pub guests: OneGuest,
    pub endpoints: Endpoints,
    pub state: tempfile::TempDir,
    stop: CancellationToken,
}

pub const SOCKET: &str = "nexus.sock";

pub fn config(state_dir: &Path) -> Config {
    Config {
        home: None,
        state_dir: state_dir.to_owned(),
        agent: b"",
        foreign_agent: None,
        shim_binary: PathBuf::from("/nonexistent"),
        driver: DriverSetting::Auto,
        apt_root: "/".into(),
        docker_config: None,
        docker_environment: Default::default(),
        vmms: Default::default(),
        assets: Default::default(),
        boot_timeout_s: 60,
        boot_timeout_tcg_s: 180,
        stop_timeout_s: 20,
        copy_roots: Vec::new(),
        audit_file: None,
        jail: true,
        nexus_net: "/nowhere/nexus-net".into(),
        force_kvm: false,
    }
}

impl Rig {
    pub async fn start() -> Self {
        Self::start_with_body_time(BODY_TIME).await
    }

    pub async fn start_with_body_time(body_time: Duration) -> Self {
        let guest = Guest::start().await;
        let link = Link::start(guest.directory.path(), 200);
        assert!(link.is_up_within(LIMIT).await, "{:?}", link.state().borrow());
        let guests = OneGuest { link, calls: Arc::default() };
        let state = tempfile::tempdir().unwrap();
        let nexus = Nexus::open(config(state.path())).await.unwrap();
        let stop = CancellationToken::new();
        let host = Host::with_guests(nexus, Box::new(guests.clone()));
        let endpoints = Endpoints::with_body_time(host, Toolset::ALL, stop.clone(), body_time);
        serve_unix(&endpoints, state.path(), SOCKET, SocketUsers::default()).unwrap();
        Self { guest, guests, endpoints, state, stop }
    }

    pub async fn stream(&self, path: &str) -> Stream {
        Stream::open(&self.state.path().join(SOCKET), path).await
    }

    pub async fn session(&self, path: &str) -> Stream {
        let mut stream = self.stream(path).await;
        stream.initialize().await;
        stream
    }

    pub async fn http(&self) -> Http<UnixStream> {
        Http::new(UnixStream::connect(self.state.path().join(SOCKET)).await.unwrap()).await
    }

    /// Waits until the log has a call with this outcome.
    pub async fn logged(&self, outcome: &str) -> CallRecord {
        timeout(LIMIT, async {
            loop {
                let found = self.guests.calls.lock().unwrap().iter().find(|c| c.outcome == outcome).cloned();
                match found {
                    Some(call) => return call,
                    None => tokio::task::yield_now().await,
                }
            }
        })
        .await
        .unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A client on JSON lines.
pub struct Stream {
    pub read: BufReader<OwnedReadHalf>,
    pub write: OwnedWriteHalf,
    next_id: u64,
}

impl Stream {
    pub async fn open(socket: &Path, path: &str) -> Self {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: mcp-stream\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        Self::over(stream)
    }

    pub fn over(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { read: BufReader::new(read), write, next_id: 100 }
    }

    pub async fn raw(&mut self, text: &str) {
        self.write.write_all(text.as_bytes()).await.unwrap();
    }

    pub async fn say(&mut self, message: &Value) {
        self.raw(&format!("{message}\n")).await;
    }

    pub async fn hear(&mut self) -> Value {
        let mut line = String::new();
        timeout(LIMIT, self.read.read_line(&mut line)).await.expect("an answer in time").unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    pub async fn initialize(&mut self) -> Value {
        let params = json!({"protocolVersion": "2025-11-25", "capabilities": {},
            "clientInfo": {"name": "test", "version": "0"}});
        let answer = self.request("initialize", params).await;
        self.say(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        answer["result"].clone()
    }

    pub async fn send(&mut self, method: &str, params: Value) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.say(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await;
        id
    }

    pub async fn request(&mut self, method: &str, params: Value) -> Value {
        let id = self.send(method, params).await;
        let answer = self.hear().await;
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }

    pub async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let answer = self.request("tools/call", json!({"name": tool, "arguments": arguments})).await;
        assert!(answer.get("error").is_none(), "{answer}");
        answer["result"].clone()
    }
}

/// A client of HTTP on one connection.
pub struct Http<S> {
    sender: hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    stream: std::marker::PhantomData<S>,
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static> Http<S> {
    pub async fn new(stream: S) -> Self {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { sender, stream: std::marker::PhantomData }
    }

    pub async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Response<String> {
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "localhost");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        self.sender.ready().await.unwrap();
        let response = timeout(LIMIT, self.sender.send_request(request.body(Full::new(body)).unwrap()));
        let (head, body) = response.await.unwrap().unwrap().into_parts();
        let body = timeout(LIMIT, body.collect()).await.unwrap().unwrap().to_bytes();
        Response::from_parts(head, String::from_utf8(body.to_vec()).unwrap())
    }

    pub async fn post(&mut self, path: &str, more: &[(&str, &str)], body: &Value) -> Response<String> {
        let mut headers =
            vec![("content-type", "application/json"), ("accept", "application/json, text/event-stream")];
        headers.extend(more);
        self.send("POST", path, &headers, body).await
    }

    /// Opens a session; gives back its id.
    pub async fn initialize(&mut self, path: &str, more: &[(&str, &str)]) -> String {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}});
        let response = self.post(path, more, &body).await;
        assert_eq!(response.status(), 200, "{response:?}");
        let session = response.headers()["mcp-session-id"].to_str().unwrap().to_owned();
        let mut with_session = more.to_vec();
        with_session.push(("mcp-session-id", &session));
        let note = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
        assert_eq!(self.post(path, &with_session, &note).await.status(), 202);
        session
    }
}

/// The JSON-RPC messages in an answer, whether it is one object or a stream of events.
pub fn messages(response: &Response<String>) -> Vec<Value> {
    if response.headers()["content-type"] == "application/json" {
        return vec![serde_json::from_str(response.body()).unwrap()];
    }
    let data = response.body().lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim);
    data.filter(|data| !data.is_empty()).map(|data| serde_json::from_str(data).unwrap()).collect()
}

pub fn text(result: &Value) -> String {
    let blocks = result["content"].as_array().unwrap_or_else(|| panic!("no content: {result}"));
    blocks.iter().map(|block| block["text"].as_str().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Whether a process with this word among its arguments runs.
pub fn runs(word: &str) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    processes.flatten().any(|process| {
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        words.split(|b| *b == 0).any(|w| w == word.as_bytes())
    })
}

/// Waits for a condition.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = timeout(LIMIT, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}
