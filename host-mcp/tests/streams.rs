//! Clients on plain streams: the host's tools through rmcp, the guest's raw.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Rig, runs, text, until};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn error_code(result: &Value) -> &str {
    assert_eq!(result["isError"], true, "{result}");
    assert_eq!(result.get("structuredContent"), None);
    let code = result["_meta"]["dev.nexus/error"]["code"].as_str().unwrap();
    assert!(text(result).starts_with(&format!("{code}: ")), "{result}");
    code
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_works_in_a_guest() {
    let rig = Rig::start().await;
    let mut client = rig.stream("/mcp").await;
    let info = client.initialize().await;
    assert_eq!(info["serverInfo"]["name"], "nexus");
    assert!(info["instructions"].as_str().unwrap().contains("vm_create"));
    let offered = &info["capabilities"];
    assert!(
        offered["tools"].is_object() && offered["resources"].is_object() && offered["prompts"].is_object(),
        "{info}"
    );

    let list = client.request("tools/list", json!({})).await;
    let names: Vec<_> =
        list["result"]["tools"].as_array().unwrap().iter().map(|t| t["name"].clone()).collect();
    assert!(names.contains(&json!("vm_create")) && names.contains(&json!("guest_run_command")));

    let result = client.call("guest_run_command", json!({"vm": "web-1", "command": "echo hé; exit 3"})).await;
    assert!(text(&result).starts_with("web-1 · exit 3 · "), "{result}");
    assert!(text(&result).contains("hé\n"));
    assert_eq!(result["_meta"]["dev.nexus/result"]["exit_code"], 3);
    assert_eq!(result["_meta"]["dev.nexus/vm"]["name"], "web-1");
    assert_eq!(result["_meta"]["dev.nexus/vm"]["boot_id"], "aaaaaaaaaaaae");
    assert!(result.get("resultType").is_none());
    let logged = rig.logged("ok").await;
    assert_eq!((&*logged.tool, logged.vm), ("run_command", Some(common::vm_id())));
    assert_eq!(*logged.owner, format!("uid:{}", rustix::process::getuid().as_raw()));

    let wrong = client.call("guest_run_command", json!({"command": "true"})).await;
    assert_eq!(error_code(&wrong), "invalid_argument");
    let wrong = client.call("guest_run_command", json!({"vm": "other", "command": "true"})).await;
    assert_eq!(error_code(&wrong), "vm_not_found");
    let wrong = client.call("guest_file_read", json!({"vm": "web-1", "path": "/nonexistent"})).await;
    assert_eq!(error_code(&wrong), "file_not_found");
    assert_eq!(wrong["_meta"]["dev.nexus/vm"]["name"], "web-1");
    let error = &wrong["_meta"]["dev.nexus/error"];
    assert_eq!((&error["errno"], &error["class"]), (&json!("ENOENT"), &json!("not_found")));
    let wrong = client.call("guest_file_read", json!({"vm": "web-1", "pth": "/"})).await;
    assert_eq!(error_code(&wrong), "invalid_argument");
    let wrong = client.call("vm_inspect", json!({"vm": 3})).await;
    assert_eq!(error_code(&wrong), "invalid_argument");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_is_a_protocol_error() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    for (method, params, code) in [
        ("tools/call", json!({"name": "no_such_tool", "arguments": {}}), -32602),
        ("tools/call", json!({"name": "guest_no_such_tool", "arguments": {"vm": "web-1"}}), -32602),
        ("tools/call", json!({"name": "run_command", "arguments": {"command": "true"}}), -32602),
        ("tools/call", json!({"name": "guest_os_info", "arguments": [1]}), -32602),
        ("tools/call", json!({}), -32602),
        ("logging/setLevel", json!({"level": "info"}), -32601),
        ("resources/subscribe", json!({"uri": "nexus://vm/web-1/console"}), -32002),
        ("nexus/shutdown", json!({"reason": "poweroff"}), -32601),
    ] {
        let answer = client.request(method, params.clone()).await;
        assert_eq!(answer["error"]["code"], code, "{method} {params}: {answer}");
    }
    client.raw("this is not json\n").await;
    assert_eq!(client.hear().await["error"]["code"], -32700);
    client.raw("\n[]\n").await;
    assert_eq!(client.hear().await["error"]["code"], -32600);
    for id_first in [true, false] {
        let filler = "x".repeat(17 << 20);
        let line = if id_first {
            format!("{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"tools/call\",\"params\":\"{filler}\"}}\n")
        } else {
            format!("{{\"method\":\"tools/call\",\"params\":\"{filler}\",\"jsonrpc\":\"2.0\",\"id\":7}}\n")
        };
        client.raw(&line).await;
        let answer = client.hear().await;
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(7), &json!(-32600)));
    }
    assert_ne!(client.call("guest_os_info", json!({"vm": "web-1"})).await["isError"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_the_stateless_era_need_no_session() {
    let rig = Rig::start().await;
    let mut client = rig.stream("/mcp").await;
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {}, "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"}});
    let early =
        client.request("tools/call", json!({"name": "guest_os_info", "arguments": {"vm": "web-1"}})).await;
    assert_eq!(early["error"]["code"], -32602, "neither a session nor metadata: {early}");
    let call = json!({"name": "guest_os_info", "arguments": {"vm": "web-1"}, "_meta": meta});
    let answer = client.request("tools/call", call).await;
    assert_eq!(answer["result"]["resultType"], "complete", "{answer}");
    assert_eq!(answer["result"]["_meta"]["dev.nexus/vm"]["name"], "web-1");
    let list = client.request("tools/list", json!({"_meta": meta})).await;
    assert_eq!(list["result"]["resultType"], "complete");
    let discover = client.request("server/discover", json!({"_meta": meta})).await;
    assert!(discover["result"]["instructions"].as_str().unwrap().contains("vm_create"), "{discover}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trace_of_a_call_reaches_its_command_and_the_audit_log() {
    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let run = |meta: Value| {
        json!({"name": "guest_run_command", "_meta": meta,
            "arguments": {"vm": "web-1", "command": "echo \"<$TRACEPARENT|$TRACESTATE>\""}})
    };
    for (meta, said, logged) in [
        (json!({"traceparent": TRACE, "tracestate": "a=b"}), format!("<{TRACE}|a=b>"), Some(TRACE)),
        (json!({"traceparent": TRACE, "tracestate": "A"}), format!("<{TRACE}|>"), Some(TRACE)),
        (json!({"traceparent": TRACE, "progressToken": 7}), format!("<{TRACE}|>"), Some(TRACE)),
        (json!({"traceparent": "00-x", "tracestate": "a=b"}), "<|>".to_owned(), None),
        (json!({"traceparent": 5}), "<|>".to_owned(), None),
    ] {
        rig.guests.calls.lock().unwrap().clear();
        let id = client.send("tools/call", run(meta.clone())).await;
        // Progress may come before the answer.
        let answer = loop {
            let message = client.hear().await;
            if message["id"] == id {
                break message;
            }
        };
        assert!(text(&answer["result"]).contains(&said), "{meta}: {answer}");
        let call = rig.logged("ok").await;
        assert_eq!(call.trace.as_ref().map(|trace| trace.parent.as_str()), logged, "{meta}");
    }
    rig.guests.calls.lock().unwrap().clear();
    let list = json!({"name": "vm_list", "arguments": {}, "_meta": {"traceparent": TRACE}});
    client.request("tools/call", list).await;
    assert_eq!(rig.logged("ok").await.trace.unwrap().parent, TRACE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_call_is_killed_in_the_guest_and_not_answered() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let arguments = json!({"vm": "web-1", "argv": ["sleep", "31901"]});
    let id = client.send("tools/call", json!({"name": "guest_run_command", "arguments": arguments})).await;
    until("the command runs", || runs("31901")).await;
    client
        .say(&json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}}))
        .await;
    until("the command is gone", || !runs("31901")).await;
    // The next answer is that of the next call.
    client.call("guest_os_info", json!({"vm": "web-1"})).await;
    rig.logged("cancelled").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_that_goes_away_started_goes_on() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let arguments = json!({"vm": "web-1", "argv": ["sleep", "31902"]});
    client.send("tools/call", json!({"name": "guest_run_command", "arguments": arguments})).await;
    until("the command runs", || runs("31902")).await;
    drop(client);
    until("the stream is gone", || rig.endpoints.host().counters().streams.get() == 0).await;
    rig.logged("cancelled").await;
    let mut client = rig.session("/mcp").await;
    let list = client.call("guest_command_list", json!({"vm": "web-1"})).await;
    let found = &list["_meta"]["dev.nexus/result"]["commands"][0];
    assert_eq!((&found["command"], &found["state"]), (&json!("sleep 31902"), &json!("running")), "{list}");
    let who = found["client"].as_str().unwrap();
    assert!(who.starts_with("test (uid:"), "{who}");
    assert!(runs("31902"));
    let end = json!({"vm": "web-1", "id": found["command_id"], "signal": "KILL"});
    client.call("guest_command_signal", end).await;
    until("the command is gone", || !runs("31902")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_lines_reach_a_client_that_waits() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let directory = tempfile::tempdir().unwrap();
    let heard = directory.path().join("heard");
    let command =
        format!("echo one; printf 'tw\\033[1mo\\n'; until [ -e {} ]; do sleep 0.05; done", heard.display());
    let arguments = json!({"vm": "web-1", "command": command});
    let params = json!({"name": "guest_run_command", "arguments": arguments, "_meta": {"progressToken": 7}});
    let id = client.send("tools/call", params).await;
    // The first note may come between the two lines; the next one has both.
    let mut said = String::new();
    while said != "one ⏎ two" {
        assert!(["", "one"].contains(&&*said), "{said}");
        let note = client.hear().await;
        assert_eq!(note["params"]["progressToken"], 7, "{note}");
        said = note["params"]["message"].as_str().unwrap().to_owned();
    }
    std::fs::write(&heard, "").unwrap();
    while client.hear().await["id"] != id {}
}

/// The call's deadline is that of its waiting, not of the command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_yields_and_its_command_goes_on() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let arguments = json!({"vm": "web-1", "argv": ["sleep", "31905"], "yield_after_s": 0.1, "timeout_s": 0});
    let result = client.call("guest_run_command", arguments).await;
    let facts = &result["_meta"]["dev.nexus/result"];
    assert_eq!(facts["state"], "running", "{result}");
    assert!(text(&result).contains("it continues: call guest_command_output with id "), "{result}");
    let end = json!({"vm": "web-1", "id": facts["command_id"]});
    client.call("guest_command_signal", end.clone()).await;
    let mut wait = end;
    wait["wait_ms"] = json!(45_000);
    let result = client.call("guest_command_output", wait).await;
    assert_eq!(result["_meta"]["dev.nexus/result"]["status"], 143, "{result}");
}

/// A client is told to call a tool by the name that it has at the client's endpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_name_tools_as_the_endpoint_does() {
    let rig = Rig::start().await;
    let (mut whole, mut scoped) = (rig.session("/mcp").await, rig.session("/mcp/vm/web-1").await);
    // Output stays as it was written.
    let arguments = json!({"command": "echo command_output; exec sleep 31906", "yield_after_s": 0.5});
    let yielded = scoped.call("run_command", arguments).await;
    assert!(text(&yielded).contains("it continues: call command_output with id "), "{yielded}");
    let id = yielded["_meta"]["dev.nexus/result"]["command_id"].clone();
    let read = whole.call("guest_command_output", json!({"vm": "web-1", "id": id, "wait_ms": 20_000})).await;
    let said = text(&read);
    assert!(said.contains("it continues: call guest_command_output with id "), "{read}");
    assert!(said.ends_with("\ncommand_output\n"), "{read}");
    whole.call("guest_command_signal", json!({"vm": "web-1", "id": id, "signal": "KILL"})).await;

    let unknown = json!({"id": "aaaaaaaaaaaac"});
    let wrong = scoped.call("command_output", unknown.clone()).await;
    assert!(
        text(&wrong).ends_with("the guest suggests: command_list shows the existing commands"),
        "{wrong}"
    );
    let mut unknown = unknown;
    unknown["vm"] = json!("web-1");
    let wrong = whole.call("guest_command_output", unknown).await;
    assert!(
        text(&wrong).ends_with("the guest suggests: guest_command_list shows the existing commands"),
        "{wrong}"
    );
    let directory = json!({"path": "/etc/passwd"});
    let wrong = scoped.call("file_list", directory).await;
    assert!(text(&wrong).ends_with("the guest suggests: call file_read or file_stat"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_only_stops_writing_gets_its_answers() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let arguments = json!({"vm": "web-1", "command": "sleep 0.3; echo done"});
    client.send("tools/call", json!({"name": "guest_run_command", "arguments": arguments})).await;
    let common::Stream { mut read, write, .. } = client;
    drop(write);
    let mut rest = String::new();
    read.read_to_string(&mut rest).await.unwrap();
    let answer: Value = serde_json::from_str(&rest).unwrap();
    assert!(text(&answer["result"]).contains("done"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_at_once_all_end() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let mut waiting = std::collections::BTreeSet::new();
    for i in 0..200 {
        let arguments = json!({"vm": "web-1", "path": "/"});
        waiting.insert(
            client.send("tools/call", json!({"name": "guest_file_stat", "arguments": arguments})).await,
        );
        // Every other one is answered by the host itself.
        if i % 2 == 0 {
            waiting.insert(client.send("tools/list", json!({})).await);
        }
        // Who never reads is not read either, once the socket is full of answers.
        while waiting.len() > 64 {
            answered(&mut client, &mut waiting).await;
        }
    }
    while !waiting.is_empty() {
        answered(&mut client, &mut waiting).await;
    }
}

async fn answered(client: &mut common::Stream, waiting: &mut std::collections::BTreeSet<u64>) {
    let answer = client.hear().await;
    assert!(answer.get("error").is_none(), "{answer}");
    assert!(waiting.remove(&answer["id"].as_u64().unwrap()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scoped_stream_shows_one_vm_from_inside() {
    let rig = Rig::start().await;
    for path in ["/mcp/vm/web-1", &format!("/mcp/vm/{}", common::vm_id())] {
        let mut client = rig.stream(path).await;
        let info = client.initialize().await;
        assert!(!info["instructions"].as_str().unwrap().contains("vm_create"));
        let list = client.request("tools/list", json!({})).await;
        let names: Vec<_> =
            list["result"]["tools"].as_array().unwrap().iter().map(|t| t["name"].clone()).collect();
        assert!(names.contains(&json!("run_command")) && !names.contains(&json!("vm_create")), "{names:?}");
        let result = client.call("run_command", json!({"command": "echo in"})).await;
        assert!(text(&result).contains("in\n"));
        for outside in ["vm_list", "guest_run_command"] {
            let answer =
                client.request("tools/call", json!({"name": outside, "arguments": {"vm": "web-1"}})).await;
            assert_eq!(answer["error"]["code"], -32602, "{answer}");
        }
    }
    let response = rig.http().await.send("GET", "/mcp/vm/other", &[], &Value::Null).await;
    assert_eq!(response.status(), 404);
    assert!(response.body().contains("vm_not_found"));
    assert!(response.body().contains("ask whoever gave you this endpoint"), "{}", response.body());
    assert!(!response.body().contains("vm_list"), "{}", response.body());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_call_reports_that_it_runs() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    // It runs until something was heard of it.
    let directory = tempfile::tempdir().unwrap();
    let heard = directory.path().join("heard");
    let command = format!("until [ -e {} ]; do sleep 0.1; done", heard.display());
    let arguments = json!({"vm": "web-1", "command": command});
    let params =
        json!({"name": "guest_run_command", "arguments": arguments, "_meta": {"progressToken": "t-1"}});
    let id = client.send("tools/call", params).await;
    let (mut notes, mut last) = (0, 0.0);
    loop {
        let message = client.hear().await;
        if message["id"] == id {
            break;
        }
        assert_eq!(message["params"]["progressToken"], "t-1");
        let value = message["params"]["progress"].as_f64().unwrap();
        assert!(value > last);
        last = value;
        notes += 1;
        if notes == 2 {
            std::fs::write(&heard, "").unwrap();
        }
    }
    assert!(notes >= 2, "{notes}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arguments_are_taken_in_each_form_and_refused_under_the_callers_name() {
    let rig = Rig::start().await;
    let mut whole = rig.session("/mcp").await;
    let odd = json!({"vm": "web-1", "argv": "[\"sh\", \"-c\", \"cat; echo $N\"]", "env": {"N": 5}, "cwd": "", "command": null,
        "stdin": "aGVs\r\nbG8K\n", "stdin_encoding": "BASE64", "timeout_s": "20.0", "max_output_bytes": 4096.0});
    let result = whole.call("guest_run_command", odd).await;
    assert!(text(&result).contains("hello\n5\n"), "{result}");
    let listed =
        whole.call("vm_list", json!({"limit": "10", "tags": null, "cursor": "", "state": null})).await;
    assert_eq!(listed["structuredContent"]["vms"], json!([]), "{listed}");

    let takes = "run_command takes: argv, checkpoint, command, cwd, encoding, env, keep_bytes, kill_descendants, kill_grace_s, log, lossless, max_output_bytes, merge, stdin, stdin_encoding, stdin_open, stdin_path, timeout_s, user, yield_after_s";
    let on_host = takes.replace("run_command takes: ", "guest_run_command takes: vm, ");
    let mut scoped = rig.session("/mcp/vm/web-1").await;
    for (arguments, said) in [
        (
            json!({"command": ["ls"]}),
            "command: must be a string, got [\"ls\"]; give a program with its arguments as `argv`",
        ),
        (
            json!({"command": "ls", "timeout_s": "soon"}),
            "timeout_s: must be a number, 0 or more, got \"soon\"",
        ),
        (json!({"cmd": "ls"}), "unknown argument `cmd`; use `command`"),
    ] {
        let wrong = scoped.call("run_command", arguments.clone()).await;
        assert_eq!(error_code(&wrong), "invalid_argument");
        let expected = format!("invalid_argument: inside web-1: {said}\nthe guest suggests: {takes}");
        assert_eq!(text(&wrong), expected);
        let mut arguments = arguments;
        arguments["vm"] = json!("web-1");
        let wrong = whole.call("guest_run_command", arguments).await;
        let expected = format!("invalid_argument: inside web-1: {said}\nthe guest suggests: {on_host}");
        assert_eq!(text(&wrong), expected);
        assert_eq!(wrong["_meta"]["dev.nexus/error"]["hint"], format!("the guest suggests: {on_host}"));
    }
    let wrong = whole.call("guest_os_info", json!({"vm": "web-1", "verbose": true})).await;
    assert!(text(&wrong).ends_with("the guest suggests: guest_os_info takes: vm"), "{wrong}");
    let wrong = whole.call("guest_run_command", json!({"command": "ls", "vm": null})).await;
    assert!(text(&wrong).starts_with("invalid_argument: missing argument `vm`"), "{wrong}");
    assert!(text(&wrong).ends_with(&on_host), "{wrong}");
    let wrong = whole.call("vm_create", json!({"image": "debian"})).await;
    assert!(
        text(&wrong).starts_with("invalid_argument: unknown argument `image`; use `from`\nvm_create takes: "),
        "{wrong}"
    );
    let wrong = scoped.call("run_command", json!({"vm": "web-1", "command": "ls"})).await;
    assert!(text(&wrong).contains("unknown argument `vm`: this endpoint is the inside of one VM"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_that_is_none_is_the_callers_fault() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    client
        .raw("{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"tools/call\",\"params\":{\"name\":\"guest_file_write\",\"arguments\":{\"vm\":\"web-1\",\"path\":\"/x\",\"content\":\"\\ud800\"}}}\n")
        .await;
    let answer = client.hear().await;
    assert_eq!(error_code(&answer["result"]), "invalid_argument");
    assert_eq!(answer["result"]["_meta"]["dev.nexus/error"]["retryable"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_messages_of_a_batch_are_answered_each() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let call = |id: u64, tool: &str, arguments: Value| json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": tool, "arguments": arguments}});
    client
        .say(&json!([
            call(1, "guest_run_command", json!({"vm": "web-1", "command": "echo one"})),
            {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 99}},
            call(2, "vm_list", json!({})),
            {"jsonrpc": "2.0", "id": 3, "method": "ping"},
            5,
        ]))
        .await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(client.hear().await);
    }
    let of = |id: Value| answers.iter().find(|answer| answer["id"] == id).unwrap();
    assert!(text(&of(json!(1))["result"]).contains("one\n"));
    assert_eq!(of(json!(2))["result"]["structuredContent"]["vms"], json!([]));
    assert_eq!(of(json!(3))["result"], json!({}));
    assert_eq!(of(Value::Null)["error"]["code"], -32600);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_last_line_without_newline_is_read() {
    let rig = Rig::start().await;
    for line in [
        r#"{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"guest_os_info","arguments":{"vm":"web-1"}}}"#,
        r#"[{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"guest_os_info","arguments":{"vm":"web-1"}}}]"#,
    ] {
        let mut client = rig.session("/mcp").await;
        client.raw(line).await;
        let common::Stream { mut read, write, .. } = client;
        drop(write);
        let mut rest = String::new();
        read.read_to_string(&mut rest).await.unwrap();
        let answer: Value = serde_json::from_str(&rest).unwrap();
        assert_eq!(answer["id"], 5, "{answer}");
        assert!(answer["result"]["structuredContent"]["kernel"].is_string(), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn initialize_is_answered_with_a_version_that_has_it() {
    let rig = Rig::start().await;
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {}, "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"}});
    let info = json!({"name": "t", "version": "0"});
    for params in [
        json!({"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": info}),
        json!({"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": info, "_meta": meta}),
        json!({"protocolVersion": "2026-07-28", "_meta": meta}),
        json!({"_meta": meta}),
        json!({"protocolVersion": "2099-01-01", "capabilities": {}, "clientInfo": info}),
        json!({}),
    ] {
        // Before anything else, and after requests of the other era.
        for is_first in [true, false] {
            let mut client = rig.stream("/mcp").await;
            if !is_first {
                let list = client.request("tools/list", json!({"_meta": meta})).await;
                assert_eq!(list["result"]["resultType"], "complete");
            }
            let answer = client.request("initialize", params.clone()).await;
            assert_eq!(answer["result"]["protocolVersion"], "2025-11-25", "{params}: {answer}");
            client.say(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
            let result = client.call("guest_os_info", json!({"vm": "web-1"})).await;
            assert_eq!(result["_meta"]["dev.nexus/vm"]["name"], "web-1", "{result}");
        }
    }
    for version in ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"] {
        let mut client = rig.stream("/mcp").await;
        let params = json!({"protocolVersion": version, "capabilities": {}, "clientInfo": info});
        assert_eq!(client.request("initialize", params).await["result"]["protocolVersion"], version);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_is_hung_up_on() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let path = rig.guest.directory.path().join("big");
    std::fs::write(&path, vec![0_u8; 600_000]).unwrap();
    let arguments = json!({"vm": "web-1", "path": path, "limit": 524_288, "encoding": "base64"});
    // All of them come at once: what is over the limit is of calls that were let in before anything waited.
    let calls = (0..75).map(|id| json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": "guest_file_read", "arguments": arguments}}));
    client.say(&calls.collect()).await;
    until("the stream is closed", || rig.endpoints.host().counters().streams.get() == 0).await;
    let mut rest = Vec::new();
    // What was written before comes; then it is at its end.
    client.read.read_to_end(&mut rest).await.unwrap_or_default();
    assert!(rest.len() < 40 << 20, "{} bytes were kept for it", rest.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bridge_into_a_vm_that_is_not_there_says_so() {
    let rig = Rig::start().await;
    let mut bridge = tokio::process::Command::new(env!("CARGO_BIN_EXE_nexusctl"));
    bridge.args(["mcp", "--no-start", "--vm", "nope"]);
    bridge.env("NEXUS_SOCKET", rig.state.path().join(common::SOCKET)).kill_on_drop(true);
    bridge.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = bridge.spawn().unwrap();
    let initialize = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25",
        "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}});
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(format!("{initialize}\n").as_bytes()).await.unwrap();
    drop(stdin);
    let said = child.wait_with_output().await.unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("vm_not_found") && said.contains("nope"), "{said}");
    assert!(!said.contains("internal"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bridge_whose_client_died_ends_at_once() {
    let rig = Rig::start().await;
    let socket = rig.state.path().join(common::SOCKET);
    let home = tempfile::tempdir().unwrap();
    let mut daemon = tokio::process::Command::new(env!("CARGO_BIN_EXE_nexusd"));
    daemon.arg("--stdio").arg("--state-dir").arg(home.path()).arg("--runtime-dir").arg(rig.state.path());
    let mut ctl = tokio::process::Command::new(env!("CARGO_BIN_EXE_nexusctl"));
    ctl.args(["mcp", "--no-start"]).env("NEXUS_SOCKET", &socket);
    // Of this run alone: what an earlier one left may still be there.
    let own = 30_000 + std::process::id();
    for (mut command, seconds) in [(daemon, format!("{own}.5")), (ctl, format!("{own}.25"))] {
        let seconds = seconds.as_str();
        command.env("HOME", home.path()).kill_on_drop(true);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let arguments = json!({"vm": "web-1", "argv": ["sleep", seconds]});
        for message in [
            json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25",
                "capabilities": {}, "clientInfo": {"name": "t", "version": "0"}}}),
            json!({"jsonrpc": "2.0", "method": "notifications/initialized"}),
            json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call",
                "params": {"name": "guest_run_command", "arguments": arguments}}),
        ] {
            stdin.write_all(format!("{message}\n").as_bytes()).await.unwrap();
        }
        until("the command runs", || runs(seconds)).await;
        drop((stdin, stdout));
        // A client that only closes its side has a minute for its answers.
        let ended = tokio::time::timeout(std::time::Duration::from_secs(20), child.wait()).await;
        assert!(ended.expect("it ends at once").unwrap().success());
        // What was not cancelled goes on, and is found.
        assert!(runs(seconds));
        let mut later = rig.session("/mcp").await;
        let listed = later.call("guest_command_list", json!({"vm": "web-1"})).await;
        assert!(listed.to_string().contains(seconds), "{listed}");
        let commands = listed["_meta"]["dev.nexus/result"]["commands"].as_array().unwrap();
        let id =
            &commands.iter().find(|command| command.to_string().contains(seconds)).unwrap()["command_id"];
        later.call("guest_command_signal", json!({"vm": "web-1", "id": id, "signal": "KILL"})).await;
        until("the command is gone", || !runs(seconds)).await;
    }
}
