//! A daemon whose VMs are ordinary processes, in a directory of its own.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nexus_core::internals::ShimClient;
use nexus_core::internals::process::ProcessHandle;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::common::{self, Stream, until};

/// A daemon of its own, and a root filesystem to start from.
pub struct Place {
    pub directory: tempfile::TempDir,
    pub state: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let root = directory.path().join("root");
        for inner in ["bin", "etc", "data"] {
            std::fs::create_dir_all(root.join(inner)).unwrap();
        }
        std::fs::write(root.join("bin/sh"), b"\x7fELF").unwrap();
        std::fs::write(root.join("etc/os-release"), b"ID=trial\nVERSION_ID=1\n").unwrap();
        Self { directory, state }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub fn source(&self) -> String {
        format!("file:{}", self.root().display())
    }

    /// Makes building take a while.
    pub fn fill(&self, mebibytes: u32) {
        for number in 0..mebibytes {
            let content: Vec<u8> = (0..1_u32 << 18)
                .flat_map(|n| (n ^ number).wrapping_mul(2_654_435_761).to_le_bytes())
                .collect();
            std::fs::write(self.root().join(format!("data/{number}")), content).unwrap();
        }
    }

    pub async fn daemon(&self) -> Child {
        self.daemon_with(&[]).await
    }

    /// The same with settings of its own.
    pub async fn daemon_with(&self, settings: &[(&str, &str)]) -> Child {
        let run = self.directory.path().join("run");
        let log = self.directory.path().join("nexusd.log");
        let mut child = Command::new(env!("CARGO_BIN_EXE_nexusd"))
            .env_clear()
            .env("HOME", self.directory.path())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("NEXUS_TOOLS", "all")
            .envs(settings.iter().copied())
            .arg("--state-dir")
            .arg(&self.state)
            .arg("--runtime-dir")
            .arg(&run)
            .args(["--driver", "process", "--guest"])
            .arg(common::guest_binary())
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let socket = run.join("nexus.sock");
        until("the daemon serves", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the daemon ended, {status}: {}", std::fs::read_to_string(&log).unwrap());
            }
            answers(&socket)
        })
        .await;
        child
    }

    pub async fn client(&self) -> Client {
        let mut stream = Stream::open(&self.directory.path().join("run/nexus.sock"), "/mcp").await;
        stream.initialize().await;
        Client(stream)
    }

    /// What is in a directory of the state.
    pub fn names(&self, directory: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.state.join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Place {
    /// VMs outlive their daemon, and would outlive the test too.
    fn drop(&mut self) {
        for vm in std::fs::read_dir(self.state.join("vms")).into_iter().flatten().flatten() {
            // Its VMM dies with a shim.
            if let Ok(Some(shim)) = ShimClient::discover(&vm.path())
                && let Ok(Some(process)) = ProcessHandle::open_identified(shim.pid, shim.start_time)
            {
                process.kill().unwrap();
            }
        }
    }
}

/// Whether a daemon answers, not only listens.
fn answers(socket: &Path) -> bool {
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(socket) else { return false };
    let asked = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = [0; 12];
    asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer == *b"HTTP/1.1 200"
}

pub struct Client(pub Stream);

impl Client {
    pub async fn must(&mut self, tool: &str, arguments: Value) -> Value {
        let mut result = self.0.call(tool, arguments).await;
        assert_ne!(result["isError"], true, "{tool}: {}", common::text(&result));
        result["structuredContent"].take()
    }

    /// The code and text of a failure.
    pub async fn fails(&mut self, tool: &str, arguments: Value) -> (String, String) {
        let result = self.0.call(tool, arguments).await;
        assert_eq!(result["isError"], true, "{tool}: {result}");
        let code = result["_meta"]["dev.nexus/error"]["code"].as_str().unwrap().to_owned();
        (code, common::text(&result))
    }

    /// Waits for the end of an operation; its outcome.
    pub async fn outcome(&mut self, mut outcome: Value) -> Value {
        while outcome["done"] != true {
            outcome = self.must("op_get", json!({ "op_id": outcome["op_id"], "wait_s": 20 })).await;
        }
        outcome
    }

    /// The result of an operation that has to succeed.
    pub async fn finished(&mut self, tool: &str, mut arguments: Value) -> Value {
        let mut result = self.0.call(tool, arguments.clone()).await;
        let confirm = &result["_meta"]["dev.nexus/error"]["confirm"]["token"];
        if confirm.is_string() {
            arguments["confirm"] = confirm.clone();
            result = self.0.call(tool, arguments).await;
        }
        assert_ne!(result["isError"], true, "{tool}: {}", common::text(&result));
        let begun = result["structuredContent"].take();
        let mut outcome = self.outcome(begun).await;
        assert_eq!(outcome["state"], "succeeded", "{tool}: {outcome}");
        outcome["result"].take()
    }

    /// Begins a build and waits until its log has a line with these words.
    pub async fn build_until(&mut self, place: &Place, words: &str) -> Value {
        let begun = self.must("build_start", json!({ "template": "web", "wait_s": 0 })).await;
        let log = place.state.join("builds").join(begun["subject_id"].as_str().unwrap());
        until(words, || std::fs::read_to_string(&log).is_ok_and(|log| log.contains(words))).await;
        begun
    }
}
