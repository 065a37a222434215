//! What `/metrics` counts, for whom, and what `nexusctl stats` shows of each VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nexus_tests::client::Client;
use nexus_tests::daemon::program;
use serde_json::{Value, json};

use crate::world::{World, refused, soon};

/// Asks for the metrics on the Unix socket; returns the whole answer.
fn metrics(world: &World, token: Option<&str>) -> String {
    let mut stream = UnixStream::connect(world.daemon.socket()).expect("connect");
    let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let request = format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\n{token}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("a request is sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

/// The value of a sample, by its name with its labels; 0 if there is none.
fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().expect("a number"))
}

#[test]
fn calls_boots_and_vms_are_counted_and_only_an_admin_sees_it() {
    let world = World::hostile(&[]);
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects");
    world.create(&mut owner, "good-1");
    world.create(&mut owner, "floods-1");
    refused(&mut owner, "vm_inspect", json!({ "vm": "nowhere" }));
    let text = soon("the flood is over", || {
        Some(metrics(&world, None)).filter(|text| value(text, "nexus_events_dropped_total") > 90_000.0)
    });
    for (sample, least) in [
        (r#"nexus_tool_calls_total{tool="vm_create",outcome="ok"}"#, 2.0),
        (r#"nexus_tool_calls_total{tool="vm_inspect",outcome="vm_not_found"}"#, 1.0),
        (r#"nexus_tool_call_duration_seconds_count{tool="vm_create"}"#, 2.0),
        (r#"nexus_tool_call_duration_seconds_bucket{tool="vm_inspect",le="+Inf"}"#, 1.0),
        (r#"nexus_vms{state="ready"}"#, 2.0),
        ("nexus_boots_total", 2.0),
        (r#"nexus_call_bytes_total{direction="in"}"#, 100.0),
    ] {
        assert!(value(&text, sample) >= least, "{sample} in\n{text}");
    }
    assert!(!text.contains("good-1") && text.contains("text/plain; version=0.0.4"), "{text}");

    // A guest that dies takes its link along, and is no link that was lost; one that only lets go of it is.
    let losses = value(&text, "nexus_link_losses_total");
    assert!(losses < 1.0, "{text}");
    for (scopes, status) in [(json!(["admin"]), "200"), (json!(["exec"]), "403")] {
        let made = owner.must("token_create", json!({ "scopes": scopes }));
        let answer = metrics(&world, made["token"].as_str());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    assert!(metrics(&world, Some("wrong")).starts_with("HTTP/1.1 401 "));
}

#[test]
fn stats_show_what_each_vm_uses() {
    let world = World::new();
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects");
    world.create(&mut owner, "web");
    let usage = &owner.inspect("web")["usage"];
    assert!(usage["memory_bytes"].as_u64() > Some(100 << 10) && usage["cpu_ms"].is_u64(), "{usage}");
    assert!(usage["disk_bytes"].as_u64() > Some(0), "{usage}");
    let stats = |arguments: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        let output =
            command.args(arguments).envs(world.daemon.environment()).output().expect("nexusctl runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let whole: Value =
        serde_json::from_str(&stats(&["stats", "web", "--no-stream", "--json"])).expect("JSON");
    let web = &whole["vms"][0];
    assert_eq!(web["vm"]["name"], "web");
    assert!(web["host"]["cpu_percent"].as_f64() >= Some(0.0), "{web}");
    assert!(web["host"]["memory_bytes"].is_u64() && web["os"]["memory_total_bytes"].is_u64(), "{web}");
    let table = stats(&["stats"]);
    assert!(table.contains("HOST MEM") && table.contains("web"), "{table}");
    owner.must("vm_stop", json!({ "vm": "web", "force": true, "wait_s": 45 }));
    let stopped = &owner.inspect("web")["usage"];
    assert!(stopped.get("cpu_ms").is_none() && stopped["disk_bytes"].is_u64(), "{stopped}");
}
