//! MCP servers that an image brings: listed, started on demand, called, and as hostile as they like.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Client, Guest, facts, until};
use serde_json::{Value, json};

/// A server of a few tools.
const SERVER: &str = r#"
import json, os, sys, time
def say(message): print(json.dumps(dict(message, jsonrpc="2.0")), flush=True)
tools = [{"name": "add", "description": "Adds.\nSecond line", "inputSchema": {"type": "object", "properties": {"a": {}}}},
         {"name": "big", "inputSchema": {"x": "y" * 20000}}, {"name": "die"}, {"name": "sleep"}, {"name": "env"}]
print("starting", file=sys.stderr)
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message or "method" not in message: continue
    id, params = message["id"], message.get("params", {})
    def ok(result): say({"id": id, "result": result})
    if message["method"] == "initialize":
        say({"method": "notifications/message", "params": {}})
        ok({"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "adder", "version": "\x1b[1m7"}})
    elif message["method"] == "tools/list":
        page = params.get("cursor")
        ok({"tools": tools[2:]} if page else {"tools": tools[:2], "nextCursor": "more"})
    elif params["name"] == "add":
        say({"id": 99, "method": "ping"})
        total = params["arguments"]["a"] + params["arguments"]["b"]
        ok({"content": [{"type": "text", "text": str(total)}, {"type": "image", "mimeType": "image/png", "data": "AAAA"}],
            "structuredContent": {"sum": total}})
    elif params["name"] == "big": ok({"content": [{"type": "text", "text": "\u00e4" * 100000}], "isError": True})
    elif params["name"] == "env": ok({"content": [{"type": "text", "text": os.environ["WHO"] + str(os.getpid())}]})
    elif params["name"] == "sleep":
        time.sleep(params["arguments"]["s"])
        ok({"content": [{"type": "text", "text": "slept"}]})
    elif params["name"] == "die":
        print("dying now", file=sys.stderr, flush=True)
        os._exit(1)
    else: say({"id": id, "error": {"code": -32602, "message": "no such tool: " + params["name"]}})
"#;

/// A server whose answers are as large as a line may be, and become far larger if they are parsed as they are.
const HOARDER: &str = r#"
import json, sys
wide = {"x": [1] * 1000000}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    if message["method"] == "initialize": result = {"serverInfo": 7}
    elif message["method"] == "tools/list": result = {"tools": [{"name": "t", "inputSchema": wide}], "nextCursor": "x"}
    elif message["params"]["name"] == "wide": result = {"content": [], "structuredContent": wide}
    else: result = {"content": [{}, 7, {"type": 7, "text": {}}] * 100000}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"#;

fn guest() -> Guest {
    let guest = Guest::start();
    let place = guest.directory.path().join("mcp.d");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("server.py"), SERVER).unwrap();
    let script = place.join("server.py");
    for (name, config) in [
        (
            "adder",
            json!({ "type": "stdio", "command": "python3", "args": ["-u", script], "env": { "WHO": "me" } }),
        ),
        ("web", json!({ "type": "http", "command": "" })),
        ("none", json!({ "command": "/no/such/program" })),
        ("babbles", json!({ "command": "sh", "args": ["-c", "echo hello; cat"] })),
        (
            "endless",
            json!({ "command": "sh", "args": ["-c", "while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"] }),
        ),
    ] {
        std::fs::write(place.join(format!("{name}.json")), config.to_string()).unwrap();
    }
    guest
}

fn text(result: &Value) -> &str {
    result["content"][1]["text"].as_str().unwrap_or_default()
}

fn call(client: &mut Client, tool: &str, arguments: Value) -> Value {
    client.good("mcp_call", json!({ "server": "adder", "tool": tool, "arguments": arguments }))
}

#[test]
fn servers_of_the_image_are_started_when_they_are_asked_for() {
    let guest = guest();
    let mut client = guest.client();
    let listed = client.good("mcp_list", json!({}));
    let servers = facts(&listed)["servers"].as_array().unwrap().clone();
    let names: Vec<_> = servers.iter().map(|server| server["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["adder", "babbles", "endless", "none", "web"]);
    assert!(servers.iter().all(|server| server["running"] == false), "{listed}");
    assert!(servers[4]["problem"].as_str().unwrap().contains("only stdio"), "{listed}");

    let listed = client.good("mcp_list", json!({ "server": "adder" }));
    let server = &facts(&listed)["servers"][0];
    assert_eq!((&server["running"], &server["title"]), (&json!(true), &json!("adder  [1m7")), "{listed}");
    let tools = server["tools"].as_array().unwrap();
    let names: Vec<_> = tools.iter().map(|tool| tool["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["add", "big", "die", "sleep", "env"]);
    assert_eq!(tools[0]["input_schema"]["type"], "object");
    assert!(tools[1].get("input_schema").is_none(), "it is too large");
    assert!(text(&listed).contains("add · Adds.\n"), "{listed}");

    let sum = call(&mut client, "add", json!({ "a": 2, "b": 40 }));
    assert_eq!(text(&sum), "42\n");
    assert_eq!(
        facts(&sum),
        &json!({ "is_error": false, "structured": { "sum": 42 }, "omitted": ["image/png 3"] })
    );
    let big = call(&mut client, "big", json!({}));
    assert_eq!(facts(&big)["is_error"], true);
    assert_eq!(facts(&big)["omitted_bytes"], 200_000 - 48_000);
    assert!(text(&big).len() <= 48_001);
    // It is the same process all the time, with the environment that it was given.
    let first = text(&call(&mut client, "env", json!({}))).to_owned();
    assert!(first.starts_with("me"));
    assert_eq!(text(&call(&mut client, "env", json!({}))), first);
}

#[test]
fn servers_that_fail_are_told_of_and_started_again() {
    let guest = guest();
    let mut client = guest.client();
    let die = json!({ "server": "adder", "tool": "die" });
    let said = client.call("mcp_call", die.clone()).to_string();
    assert!(
        said.contains("the MCP server adder cannot be used: it ended") && said.contains("dying now"),
        "{said}"
    );
    assert_eq!(text(&call(&mut client, "add", json!({ "a": 1, "b": 2 }))), "3\n");
    assert_eq!(client.bad("mcp_call", die), "command_failed");

    // A call that takes too long ends; what it answers later is passed over.
    let slow = json!({ "server": "adder", "tool": "sleep", "arguments": { "s": 0.5 }, "timeout_s": 0.1 });
    client.good("mcp_call", json!({ "server": "adder", "tool": "sleep", "arguments": { "s": 0 } }));
    assert_eq!(client.bad("mcp_call", slow), "timeout");
    assert_eq!(text(&call(&mut client, "add", json!({ "a": 1, "b": 2 }))), "3\n");

    let said = client.call("mcp_call", json!({ "server": "adder", "tool": "nope" })).to_string();
    assert!(said.contains("the MCP server adder refused: no such tool: nope"), "{said}");
    assert_eq!(client.bad("mcp_list", json!({ "server": "none" })), "program_not_found");
    assert_eq!(client.bad("mcp_list", json!({ "server": "web" })), "command_failed");
    for (server, words) in [("babbles", "is not valid MCP"), ("endless", "a line of more than 4 MiB")] {
        let said = client.call("mcp_list", json!({ "server": server })).to_string();
        assert!(said.contains(words), "{said}");
    }
    let said = client.call("mcp_call", json!({ "server": "nobody", "tool": "x" })).to_string();
    assert!(said.contains("invalid_argument") && said.contains("adder, babbles"), "{said}");
    // None of those that failed is left.
    until("they are gone", || {
        common::processes_with("while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx") == 0
    });
}

/// What a server says is never held as values before it is known to be small.
#[test]
fn the_holder_stays_small_whatever_a_server_says() {
    let guest = Guest::start();
    let mut client = guest.client();
    let place = guest.directory.path().join("mcp.d");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("server.py"), HOARDER).unwrap();
    let config = json!({ "command": "python3", "args": ["-u", place.join("server.py")] });
    std::fs::write(place.join("hoarder.json"), config.to_string()).unwrap();

    let listed = client.good("mcp_list", json!({ "server": "hoarder" }));
    let server = &facts(&listed)["servers"][0];
    // One tool on each of twenty pages, and more would come.
    assert_eq!(server["tools"], json!(vec![json!({ "name": "t" }); 20]), "{listed}");
    assert_eq!((&server["omitted_tools"], &server["title"]), (&json!(1), &json!("")));
    let ask = |client: &mut Client, tool: &str| {
        let result = client.good("mcp_call", json!({ "server": "hoarder", "tool": tool }));
        facts(&result).clone()
    };
    assert_eq!(ask(&mut client, "wide"), json!({ "is_error": false }));
    let many = ask(&mut client, "many");
    assert_eq!(many["omitted"], json!(vec!["unknown 0"; 200]), "{many}");

    let peak = common::memory(common::holder(&guest), "VmHWM:");
    assert!(peak < 96 << 20, "the holder had {peak} bytes");
}
