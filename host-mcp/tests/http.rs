//! Clients over HTTP: sessions, the stateless era, scopes, tokens and web pages.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Http, Rig, messages, runs, text, until};
use nexus_host::endpoint::{Door, serve_tcp};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

fn call(id: u64, tool: &str, arguments: Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": tool, "arguments": arguments}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_calls_host_and_guest() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let session = http.initialize("/mcp", &[]).await;
    let with = [("mcp-session-id", session.as_str()), ("mcp-protocol-version", "2025-11-25")];

    let list = http.post("/mcp", &with, &json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list"})).await;
    assert!(messages(&list)[0]["result"]["tools"].as_array().unwrap().len() > 20);

    let run = call(3, "guest_run_command", json!({"vm": "web-1", "command": "echo over http"}));
    let answer = http.post("/mcp", &with, &run).await;
    assert_eq!(answer.headers()["content-type"], "application/json");
    let message = &messages(&answer)[0];
    assert_eq!(message["id"], 3);
    assert!(text(&message["result"]).contains("over http\n"));
    assert_eq!(message["result"]["_meta"]["dev.nexus/vm"]["name"], "web-1");

    // With progress wanted it goes the long way, and says the same.
    let mut run = call(4, "guest_run_command", json!({"vm": "web-1", "command": "echo over sse"}));
    run["params"]["_meta"] = json!({"progressToken": 1});
    let answer = http.post("/mcp", &with, &run).await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let last = messages(&answer).pop().unwrap();
    assert!(text(&last["result"]).contains("over sse\n"), "{last}");
    assert_eq!(last["result"]["_meta"]["dev.nexus/vm"]["name"], "web-1");
    assert_eq!(last["result"].get("resultType"), None);

    let wrong = http.post("/mcp", &with, &call(5, "guest_os_info", json!({"vm": "other"}))).await;
    assert_eq!(messages(&wrong)[0]["result"]["_meta"]["dev.nexus/error"]["code"], "vm_not_found");

    assert_eq!(http.send("DELETE", "/mcp", &with, &Value::Null).await.status(), 202);
    for body in [run, call(6, "guest_os_info", json!({"vm": "web-1"}))] {
        assert_eq!(http.post("/mcp", &with, &body).await.status(), 404);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_worth_nothing_elsewhere() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let whole = http.initialize("/mcp", &[]).await;
    let scoped = http.initialize("/mcp/vm/web-1", &[]).await;
    let run = call(2, "run_command", json!({"command": "echo scoped"}));
    let answer = http.post("/mcp/vm/web-1", &[("mcp-session-id", &scoped)], &run).await;
    assert!(text(&messages(&answer)[0]["result"]).contains("scoped\n"));
    let whole_call = call(2, "guest_os_info", json!({"vm": "web-1"}));
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &scoped)], &whole_call).await.status(), 404);
    assert_eq!(http.post("/mcp/vm/web-1", &[("mcp-session-id", &whole)], &run).await.status(), 404);
    assert_eq!(
        http.send(
            "GET",
            "/mcp/vm/web-1",
            &[("mcp-session-id", &whole), ("accept", "text/event-stream")],
            &Value::Null
        )
        .await
        .status(),
        404
    );
    // Nor may it be closed from there.
    http.send("DELETE", "/mcp/vm/web-1", &[("mcp-session-id", &whole)], &Value::Null).await;
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &whole)], &whole_call).await.status(), 200);
    assert_eq!(http.post("/mcp", &[("mcp-session-id", "made-up")], &whole_call).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stateless_era_is_judged_by_its_headers() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let mut run = call(1, "guest_os_info", json!({"vm": "web-1"}));
    run["params"]["_meta"] = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {}});
    let good =
        [("mcp-protocol-version", "2026-07-28"), ("mcp-method", "tools/call"), ("mcp-name", "guest_os_info")];
    let answer = http.post("/mcp", &good, &run).await;
    assert_eq!(messages(&answer)[0]["result"]["resultType"], "complete", "{answer:?}");
    assert!(!answer.headers().contains_key("mcp-session-id"));
    let mut bad = good;
    bad[2].1 = "guest_run_command";
    assert_eq!(http.post("/mcp", &bad, &run).await.status(), 400);
    assert_eq!(http.post("/mcp", &good[..2], &run).await.status(), 400);
    let list = json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {"_meta": run["params"]["_meta"]}});
    let headers = [("mcp-protocol-version", "2026-07-28"), ("mcp-method", "tools/list")];
    let answer = http.post("/mcp", &headers, &list).await;
    assert!(messages(&answer)[0]["result"]["tools"].as_array().unwrap().len() > 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_cancelled_by_notice_and_by_hanging_up() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let session = http.initialize("/mcp", &[]).await;
    let mut other = rig.http().await;
    let of_session = session.clone();
    let waiting = tokio::spawn(async move {
        let run = call(9, "guest_run_command", json!({"vm": "web-1", "argv": ["sleep", "31903"]}));
        other.post("/mcp", &[("mcp-session-id", &of_session)], &run).await
    });
    until("the command runs", || runs("31903")).await;
    let note = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 9}});
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &session)], &note).await.status(), 202);
    until("the command is gone", || !runs("31903")).await;
    assert_eq!(waiting.await.unwrap().status(), 202);

    let mut other = rig.http().await;
    let of_session = session.clone();
    let waiting = tokio::spawn(async move {
        let run = call(10, "guest_run_command", json!({"vm": "web-1", "argv": ["sleep", "31904"]}));
        other.post("/mcp", &[("mcp-session-id", &of_session)], &run).await
    });
    until("the command runs", || runs("31904")).await;
    waiting.abort();
    until("the command is gone", || !runs("31904")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_needs_the_token_and_serves_no_web_page() {
    let rig = Rig::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = "s".repeat(64);
    let door =
        Door::Tcp { token: token.as_str().into(), origins: vec!["http://localhost:6274".to_owned()].into() };
    serve_tcp(&rig.endpoints, listener, door);
    let mut http = Http::new(TcpStream::connect(address).await.unwrap()).await;
    let bearer = format!("Bearer {token}");
    let auth = ("authorization", bearer.as_str());

    assert_eq!(
        http.send("GET", "/healthz", &[], &Value::Null).await.body(),
        &format!(r#"{{"ok":true,"version":"{}"}}"#, env!("CARGO_PKG_VERSION"))
    );
    for path in ["/metrics", "/mcp", "/mcp/vm/web-1", "/mcp/vm/other", "/anything"] {
        assert_eq!(http.send("GET", path, &[], &Value::Null).await.status(), 401, "{path}");
    }
    assert!(http.send("GET", "/metrics", &[auth], &Value::Null).await.body().contains("nexus_streams 0"));
    assert_eq!(http.send("GET", "/healthz", &[("host", "evil.example")], &Value::Null).await.status(), 403);
    assert_eq!(
        http.send("GET", "/metrics", &[auth, ("origin", "http://evil.example")], &Value::Null).await.status(),
        403
    );
    let upgrade = [auth, ("connection", "upgrade"), ("upgrade", "mcp-stream")];
    assert_eq!(http.send("GET", "/mcp", &upgrade, &Value::Null).await.status(), 400);

    let session = http.initialize("/mcp", &[auth, ("origin", "http://localhost:6274")]).await;
    let run = call(3, "guest_os_info", json!({"vm": "web-1"}));
    let answer = http.post("/mcp", &[auth, ("mcp-session-id", &session)], &run).await;
    assert_eq!(messages(&answer)[0]["id"], 3);
    assert_eq!(&*rig.logged("ok").await.owner, "token:http");
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &session)], &run).await.status(), 401);
    // The Unix socket's callers are others: the session is not theirs.
    assert_eq!(rig.http().await.post("/mcp", &[("mcp-session-id", &session)], &run).await.status(), 404);

    let big =
        call(4, "guest_file_write", json!({"vm": "web-1", "path": "/x", "content": "x".repeat(5 << 20)}));
    assert_eq!(http.post("/mcp", &[auth, ("mcp-session-id", &session)], &big).await.status(), 413);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_never_more_than_256_sessions() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let first = http.initialize("/mcp", &[]).await;
    let second = http.initialize("/mcp", &[]).await;
    let ping = json!({"jsonrpc": "2.0", "id": 2, "method": "ping"});
    for _ in 2..256 {
        http.initialize("/mcp/vm/web-1", &[]).await;
    }
    // Using one keeps it; the other is the oldest then.
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &first)], &ping).await.status(), 200);
    http.initialize("/mcp", &[]).await;
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &first)], &ping).await.status(), 200);
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &second)], &ping).await.status(), 404);
    let metrics = http.send("GET", "/metrics", &[], &Value::Null).await;
    assert!(metrics.body().contains("nexus_http_sessions 256"));
}
