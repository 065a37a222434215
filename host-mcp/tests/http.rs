//! Clients over HTTP: sessions, the stateless era, scopes, tokens and web pages.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Http, LIMIT, Rig, messages, runs, text, until};
use nexus_host::endpoint::{Door, serve_tcp};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

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

    assert_eq!(http.send("DELETE", "/mcp", &with, &Value::Null).await.status(), 200);
    for body in [run, call(6, "guest_os_info", json!({"vm": "web-1"}))] {
        assert_eq!(http.post("/mcp", &with, &body).await.status(), 404);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_chooses_its_tools_by_the_address() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let list = json!({"jsonrpc": "2.0", "id": 2, "method": "tools/list"});
    let stat = call(3, "guest_file_stat", json!({"vm": "web-1", "path": "/"}));
    let mut seen = Vec::new();
    for path in ["/mcp?tools=work", "/mcp?x=1&tools=work%2Cdrives", "/mcp/?tools=all", "/mcp"] {
        let session = http.initialize(path, &[]).await;
        let with = [("mcp-session-id", session.as_str())];
        let listed = messages(&http.post(path, &with, &list).await).remove(0);
        let tools = listed["result"]["tools"].as_array().unwrap().clone();
        assert_eq!(tools[0]["name"], "vm_create", "{path}");
        let called = messages(&http.post(path, &with, &stat).await).remove(0);
        seen.push((tools.len(), tools[0].get("outputSchema").is_some(), called["error"]["code"].as_i64()));
        if let Some(text) = called["error"]["message"].as_str() {
            assert!(text.contains("connect to /mcp?tools=all"), "{text}");
        }
        assert_eq!(http.post("/mcp?tools=images", &with, &list).await.status(), 404, "of another set");
    }
    let [work, more, all, configured] = seen[..] else { panic!("{seen:?}") };
    assert!(work.0 <= 35 && work.0 < more.0 && more.0 < all.0, "{seen:?}");
    assert_eq!((work.1, work.2), (false, Some(-32602)));
    assert_eq!((more.1, more.2), (false, Some(-32602)));
    assert_eq!((all.1, all.2), (true, None));
    assert_eq!(configured, all, "what the daemon was told");

    let unknown = http.post("/mcp?tools=everything", &[], &list).await;
    assert_eq!(unknown.status(), 400);
    assert!(unknown.into_body().contains("unknown set of tools `everything`"));

    assert_eq!(http.post("/mcp/vm/web-1?tools=read-only", &[], &list).await.status(), 400);

    // A stream chooses in the same way, and what a set lacks is not called by the short way either.
    let mut stream = rig.stream("/mcp?tools=read-only").await;
    stream.initialize().await;
    let run = json!({"name": "guest_run_command", "arguments": {"vm": "web-1", "command": "true"}});
    let refused = stream.request("tools/call", run).await;
    assert_eq!(refused["error"]["code"], -32602, "{refused}");
    let read = stream.call("guest_file_stat", json!({"vm": "web-1", "path": "/"})).await;
    assert!(text(&read).contains("directory"), "{read}");
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
async fn calls_are_cancelled_by_notice_and_left_by_hanging_up() {
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
    rig.logged("cancelled").await;
    let list = call(11, "guest_command_list", json!({"vm": "web-1"}));
    let list = http.post("/mcp", &[("mcp-session-id", &session)], &list).await;
    assert!(list.body().contains(r#""command":"sleep 31904""#) && runs("31904"), "{}", list.body());

    // The same where progress is wanted, which goes through rmcp.
    let mut other = rig.http().await;
    let of_session = session.clone();
    let waiting = tokio::spawn(async move {
        let mut run =
            call(12, "guest_run_command", json!({"vm": "web-1", "command": "echo told; sleep 31906"}));
        run["params"]["_meta"] = json!({"progressToken": "p"});
        other.post("/mcp", &[("mcp-session-id", &of_session)], &run).await.into_body()
    });
    until("the command runs", || runs("31906")).await;
    let note = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 12}});
    assert_eq!(http.post("/mcp", &[("mcp-session-id", &session)], &note).await.status(), 202);
    until("the command is gone", || !runs("31906")).await;
    let _ = waiting.await;
    let mut run = call(14, "guest_run_command", json!({"vm": "web-1", "command": "echo told; sleep 1"}));
    run["params"]["_meta"] = json!({"progressToken": "p"});
    let answer = http.post("/mcp", &[("mcp-session-id", &session)], &run).await;
    let notes = messages(&answer);
    let told = |note: &Value| note["params"]["progressToken"] == "p" && note["params"]["message"] == "told";
    assert!(notes.iter().any(told), "{notes:?}");
    let end = "pkill -f '[s]leep 31904'";
    let end = call(13, "guest_run_command", json!({"vm": "web-1", "command": end}));
    http.post("/mcp", &[("mcp-session-id", &session)], &end).await;
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

/// An endpoint on loopback TCP: its address, and the headers that every request needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_gets_the_page_without_a_token_and_nothing_else() {
    let rig = Rig::start().await;
    let (address, _) = on_loopback(&rig).await;
    let mut http = Http::new(TcpStream::connect(address).await.unwrap()).await;
    let host = address.to_string();
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/xterm.js", "text/javascript; charset=utf-8"),
        ("/xterm.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let answer = http.send("GET", path, &[("host", &host)], &Value::Null).await;
        let headers = answer.headers();
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(headers["content-type"], kind, "{path}");
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
        for part in
            ["frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'", "require-trusted-types-for"]
        {
            assert!(policy.contains(part), "{policy}");
        }
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        // Another name for this machine is a page that rebinds its own.
        let foreign = http.send("GET", path, &[("host", "evil.example")], &Value::Null).await;
        assert_eq!(foreign.status(), 403, "{path}");
        assert_eq!(http.post(path, &[("host", &host)], &json!({})).await.status(), 401, "{path}");
    }
    for path in ["/page", "/page.css", "/page.js/", "/web/page.js", "/app.js", "/index.html", "//"] {
        assert_eq!(http.send("GET", path, &[("host", &host)], &Value::Null).await.status(), 401, "{path}");
    }
    assert_eq!(rig.http().await.send("GET", "/", &[], &Value::Null).await.status(), 404, "no browser there");
}

/// What an open page holds is worth nothing to whoever takes the port after the daemon has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_logs_in_for_a_secret_of_this_daemon_alone() {
    fn given<'a>(host: &'a str, secret: &'a str) -> Vec<(&'a str, &'a str)> {
        vec![("host", host), ("authorization", secret)]
    }
    let (rig, none) = (Rig::start().await, Value::Null);
    let (address, _) = on_loopback(&rig).await;
    let mut http = Http::new(TcpStream::connect(address).await.unwrap()).await;
    let (host, token) = (address.to_string(), format!("Bearer {}", "t".repeat(64)));
    let wrong = http.send("POST", "/login", &given(&host, "Bearer wrong"), &none).await;
    assert_eq!(wrong.status(), 401);
    let answer = http.send("POST", "/login", &given(&host, &token), &none).await;
    assert_eq!(answer.status(), 200);
    let said: Value = serde_json::from_str(answer.body()).unwrap();
    let secret = format!("Bearer {}", said["session"].as_str().unwrap());
    assert!(!secret.contains("tttt"), "the token is in it");
    // It has the rights of the token, and makes no other login.
    let metrics = http.send("GET", "/metrics", &given(&host, &secret), &none).await;
    assert_eq!(metrics.status(), 200);
    http.initialize("/mcp", &given(&host, &secret)).await;
    for (method, given) in [("POST", given(&host, &secret)), ("DELETE", given(&host, &token))] {
        assert_eq!(http.send(method, "/login", &given, &none).await.status(), 405, "{method}");
    }
    // Another daemon with the same token does not know it, nor does the Unix socket.
    let other = Rig::start().await;
    let (elsewhere, _) = on_loopback(&other).await;
    let mut there = Http::new(TcpStream::connect(elsewhere).await.unwrap()).await;
    let elsewhere = elsewhere.to_string();
    let known = there.send("GET", "/metrics", &given(&elsewhere, &token), &none).await;
    let unknown = there.send("GET", "/metrics", &given(&elsewhere, &secret), &none).await;
    assert_eq!((known.status().as_u16(), unknown.status().as_u16()), (200, 401));
    let mut socket = rig.http().await;
    assert_eq!(socket.send("GET", "/metrics", &given("localhost", &secret), &none).await.status(), 401);
    assert_eq!(socket.send("POST", "/login", &[], &none).await.status(), 404);
    assert_eq!(http.send("DELETE", "/login", &given(&host, &secret), &none).await.status(), 200);
    assert_eq!(http.send("GET", "/metrics", &given(&host, &secret), &none).await.status(), 401);
}

async fn on_loopback(rig: &Rig) -> (std::net::SocketAddr, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = "t".repeat(64);
    let door = Door::Tcp { token: token.as_str().into(), origins: Vec::new().into() };
    serve_tcp(&rig.endpoints, listener, door);
    let head = format!(
        "Host: {address}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\n"
    );
    (address, head)
}

/// Sends bytes, and reads until the server hangs up.
async fn raw(address: std::net::SocketAddr, sent: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(sent).await.unwrap();
    let mut answer = String::new();
    timeout(LIMIT, stream.read_to_string(&mut answer)).await.expect("an answer and an end").unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_request_is_told() {
    let rig = Rig::start().await;
    let (address, head) = on_loopback(&rig).await;
    let post = |more: &str, body: &str| {
        let length = body.len();
        format!(
            "POST /mcp HTTP/1.1\r\n{head}{more}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    for (body, code) in
        [("{\"jsonrpc\":", -32700), ("", -32700), ("7", -32600), ("[]", -32600), ("{}", -32600)]
    {
        let answer = raw(address, post("", body).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
        let message: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!((&message["error"]["code"], &message["id"]), (&json!(code), &Value::Null), "{body}");
    }
    let ping = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
    let answer = raw(address, post(&format!("Host: {address}\r\n"), ping).as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("more than one Host header"), "{answer}");
    // The endpoint's own pages may use it, others may not.
    let own = raw(address, post(&format!("Origin: http://{address}\r\n"), ping).as_bytes()).await;
    assert!(!own.starts_with("HTTP/1.1 403 "), "{own}");
    let other = raw(address, post("Origin: http://127.0.0.1:1\r\n", ping).as_bytes()).await;
    assert!(other.starts_with("HTTP/1.1 403 "), "{other}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_large_is_refused_so_that_the_client_reads_it() {
    let rig = Rig::start().await;
    let (address, head) = on_loopback(&rig).await;
    let length = 20 << 20;
    // The client sends all of it before it reads a byte.
    let mut request = format!("POST /mcp HTTP/1.1\r\n{head}Content-Length: {length}\r\n\r\n").into_bytes();
    request.resize(request.len() + length, b' ');
    let answer = raw(address, &request).await;
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("larger than 4 MiB"), "{answer}");
    // In pieces of which nobody says how many there are.
    let mut request = format!("POST /mcp HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..8 {
        request.extend_from_slice(b"100000\r\n");
        request.resize(request.len() + (1 << 20), b' ');
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    assert!(raw(address, &request).await.starts_with("HTTP/1.1 413 "));
    // Who asks first sends nothing.
    let asked =
        format!("POST /mcp HTTP/1.1\r\n{head}Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n");
    assert!(raw(address, asked.as_bytes()).await.starts_with("HTTP/1.1 413 "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_is_waited_for_no_longer_than_its_time() {
    assert_eq!(nexus_host::endpoint::BODY_TIME, std::time::Duration::from_secs(30));
    let longest = std::time::Duration::from_secs(2);
    let rig = Rig::start_with_body_time(longest).await;
    let (address, head) = on_loopback(&rig).await;
    let request = format!("POST /mcp HTTP/1.1\r\n{head}Content-Length: 1000\r\n\r\n{{\"jsonrpc\":");
    let started = std::time::Instant::now();
    let answer = raw(address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("within 2 s"), "{answer}");
    assert!(started.elapsed() >= longest, "{:?}", started.elapsed());
    assert!(started.elapsed() < std::time::Duration::from_secs(12), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn initialize_opens_a_session_except_in_the_era_without_sessions() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {}, "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"}});
    let info = json!({"name": "t", "version": "0"});
    let era = [("mcp-protocol-version", "2026-07-28"), ("mcp-method", "initialize")];
    for (headers, params) in [
        (&era[..0], json!({"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": info})),
        (&era[..1], json!({"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": info})),
        (&era[..0], json!({"protocolVersion": "2099-01-01", "capabilities": {}, "clientInfo": info})),
        (&era[..0], json!({})),
    ] {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params});
        let answer = http.post("/mcp", headers, &body).await;
        assert_eq!(answer.status(), 200, "{params}: {answer:?}");
        assert_eq!(messages(&answer)[0]["result"]["protocolVersion"], "2025-11-25", "{answer:?}");
        let session = answer.headers()["mcp-session-id"].to_str().unwrap();
        let run = call(2, "guest_os_info", json!({"vm": "web-1"}));
        assert_eq!(http.post("/mcp", &[("mcp-session-id", session)], &run).await.status(), 200);
    }
    for params in [
        json!({"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": info, "_meta": meta}),
        json!({"_meta": meta}),
    ] {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params});
        let answer = http.post("/mcp", &era, &body).await;
        assert_eq!(answer.status(), 404, "{params}: {answer:?}");
        assert_eq!(messages(&answer)[0]["error"]["code"], -32601, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_answered_as_one() {
    let rig = Rig::start().await;
    let mut http = rig.http().await;
    let session = http.initialize("/mcp", &[]).await;
    let with = [("mcp-session-id", session.as_str())];
    let note = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 99}});
    let ping = json!({"jsonrpc": "2.0", "id": 3, "method": "ping"});
    let batch = json!([
        call(1, "guest_run_command", json!({"vm": "web-1", "command": "echo one"})),
        note,
        call(2, "vm_list", json!({})),
        ping,
        {"jsonrpc": "2.0", "id": 4, "method": 5},
    ]);
    let answer = http.post("/mcp", &with, &batch).await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    let answers: Vec<Value> = serde_json::from_str(answer.body()).unwrap();
    let ids: Vec<_> = answers.iter().map(|answer| answer["id"].clone()).collect();
    assert_eq!(ids, [json!(1), json!(2), json!(3), Value::Null], "{answers:?}");
    assert!(text(&answers[0]["result"]).contains("one\n"));
    assert_eq!(answers[1]["result"]["structuredContent"]["vms"], json!([]));
    assert_eq!(http.post("/mcp", &with, &json!([note])).await.status(), 202);
    assert_eq!(http.post("/mcp", &[("mcp-session-id", "made-up")], &json!([ping])).await.status(), 404);
    for wrong in [
        json!([]),
        json!(vec![ping.clone(); 65]),
        json!([{"jsonrpc": "2.0", "id": 1, "method": "initialize"}]),
    ] {
        let answer = http.post("/mcp", &with, &wrong).await;
        assert_eq!((answer.status().as_u16(), &messages(&answer)[0]["error"]["code"]), (400, &json!(-32600)));
    }
}
