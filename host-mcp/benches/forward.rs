//! What forwarding costs, measured with the real guest: `cargo bench -p nexus-host`.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Http, Rig, Stream};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const WARM: usize = 300;
const ROUNDS: usize = 3000;

struct Lines(Stream);

impl Lines {
    /// One call at a time; the latencies, sorted.
    async fn one_by_one(&mut self, params: &str) -> Vec<Duration> {
        let mut took = Vec::with_capacity(ROUNDS);
        let mut answer = Vec::new();
        for i in 0..WARM + ROUNDS {
            let line =
                format!("{{\"jsonrpc\":\"2.0\",\"id\":{i},\"method\":\"tools/call\",\"params\":{params}}}\n");
            let start = Instant::now();
            self.0.write.write_all(line.as_bytes()).await.unwrap();
            answer.clear();
            self.0.read.read_until(b'\n', &mut answer).await.unwrap();
            if i >= WARM {
                took.push(start.elapsed());
            }
        }
        took.sort();
        took
    }

    /// `callers` calls under way at all times; calls per second.
    async fn together(&mut self, params: &str, callers: usize) -> f64 {
        let total = ROUNDS * 10;
        let (mut sent, mut done) = (0, 0);
        let mut answer = Vec::new();
        let start = Instant::now();
        while done < total {
            let mut lines = String::new();
            while sent < total && sent - done < callers {
                lines.push_str(&format!(
                    "{{\"jsonrpc\":\"2.0\",\"id\":{sent},\"method\":\"tools/call\",\"params\":{params}}}\n"
                ));
                sent += 1;
            }
            if !lines.is_empty() {
                self.0.write.write_all(lines.as_bytes()).await.unwrap();
            }
            // Takes what is there already, so that the client is not what is measured.
            loop {
                answer.clear();
                self.0.read.read_until(b'\n', &mut answer).await.unwrap();
                assert!(!answer.windows(7).any(|w| w == b"\"error\"") && answer.len() > 20);
                done += 1;
                if done == sent || self.0.read.buffer().is_empty() {
                    break;
                }
            }
        }
        total as f64 / start.elapsed().as_secs_f64()
    }
}

fn show(what: &str, took: &[Duration]) -> f64 {
    let at = |p: f64| took[((took.len() - 1) as f64 * p) as usize].as_secs_f64() * 1e6;
    println!("{what:<44} p50 {:>6.1} µs   p99 {:>6.1} µs", at(0.5), at(0.99));
    at(0.5)
}

async fn http_one_by_one(
    http: &mut Http<UnixStream>,
    headers: &[(&str, &str)],
    body: &Value,
) -> Vec<Duration> {
    let mut took = Vec::new();
    for i in 0..WARM + ROUNDS {
        let start = Instant::now();
        let response = http.post("/mcp", headers, body).await;
        assert_eq!(response.status(), 200);
        if i >= WARM {
            took.push(start.elapsed());
        }
    }
    took.sort();
    took
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let rig = Rig::start().await;
    let own = r#"{"name":"file_stat","arguments":{"path":"/"}}"#;
    let through = r#"{"name":"guest_file_stat","arguments":{"vm":"web-1","path":"/"}}"#;

    // One hop: the same tool, asked directly.
    let stream = UnixStream::connect(rig.guest.directory.path().join("v.sock")).await.unwrap();
    let mut direct = Stream::over(stream);
    direct.raw("CONNECT 200\n").await;
    let mut ok = String::new();
    direct.read.read_line(&mut ok).await.unwrap();
    assert!(ok.starts_with("OK "), "{ok}");
    direct.initialize().await;
    let mut direct = Lines(direct);
    let mut forwarded = Lines(rig.session("/mcp").await);

    for round in 1..=2 {
        println!("round {round}");
        let one = show("one hop, JSON lines", &direct.one_by_one(own).await);
        let two = show("through nexusd, upgraded stream", &forwarded.one_by_one(through).await);
        println!("{:<44} {:+.1} µs", "on top at p50", two - one);
        let one = direct.together(own, 32).await;
        let two = forwarded.together(through, 32).await;
        println!("32 callers: one hop {one:.0}/s, through nexusd {two:.0}/s, ratio {:.2}", two / one);
    }

    let mut http = rig.http().await;
    let session = http.initialize("/mcp", &[]).await;
    let with = [("mcp-session-id", session.as_str())];
    let local = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "op_cancel", "arguments": {}}});
    let guest = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": serde_json::from_str::<Value>(through).unwrap()});
    let one = show("HTTP session, a tool of the host", &http_one_by_one(&mut http, &with, &local).await);
    let two = show("HTTP session, forwarded", &http_one_by_one(&mut http, &with, &guest).await);
    println!("{:<44} {:+.1} µs", "on top at p50", two - one);
}
