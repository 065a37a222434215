//! The TypeScript SDK, FastMCP and rmcp as clients of the production endpoint, over stdio and over HTTP: their own checks hold, and calls,
//! progress, cancellation, errors, resources and prompts work.

use std::path::Path;
use std::time::Duration;

use nexus_schema::Tool;
use nexus_schema::tools::vm::VmList;
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::wait::until;
use rmcp::model::{CallToolRequestParams, ProtocolVersion};
use rmcp::service::{ClientLifecycleMode, ClientServiceExt, RoleClient, RunningService};
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::transport::{StreamableHttpClientTransport, TokioChildProcess};
use serde_json::{Value, json};

use crate::kit::Kit;

/// A daemon with one VM, `web-1`.
fn daemon_with_a_vm(place: &Path) -> Daemon {
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let image = place.join("image");
    std::fs::create_dir_all(image.join("etc")).expect("a directory to make an image from");
    let from = format!("file:{}", image.display());
    daemon.client().create(json!({ "name": "web-1", "from": from, "disk": "128MiB" }));
    daemon
}

/// How many tools of the set `all` there are.
fn tools_of_all() -> usize {
    nexus_schema::tools::host().len() + nexus_schema::tools::guest_on_host().len()
}

#[test]
fn the_typescript_sdk_works_over_stdio_and_http() {
    let kit = Kit::find();
    let daemon = daemon_with_a_vm(kit.home());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/sdk.mjs");
    let (url, token) = daemon.http();
    let mut over_stdio = kit.typescript(&script);
    over_stdio.arg("--").arg(program("nexusctl")).args(["mcp", "--tools", "all"]).envs(daemon.environment());
    let mut over_http = kit.typescript(&script);
    over_http.arg(format!("{url}?tools=all")).env("NEXUS_HTTP_TOKEN", token);
    for mut client in [over_stdio, over_http] {
        let output = client.output().expect("node runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{said}\n{}", output.status, daemon.log());
        let saw: Value = serde_json::from_slice(&output.stdout).expect("stdout is JSON");
        assert_eq!(saw["tools"].as_array().map(Vec::len), Some(tools_of_all()), "{saw}");
        assert_eq!((&saw["same"], &saw["vms"]), (&json!(true), &json!(["web-1"])), "{saw}");
        assert!(saw["text"].as_str().is_some_and(|text| text.contains("line 1\nline 2\nline 3")), "{saw}");
        assert!(saw["notes"].as_u64() > Some(0) && saw["growing"] == true, "{saw}");
        assert_eq!(saw["failed"], json!({ "isError": true, "code": "vm_not_found" }), "{saw}");
        assert_eq!(saw["unknown"], json!({ "code": -32602 }), "{saw}");
        assert_eq!((&saw["read"], &saw["prompts"]), (&json!("nexus://vm/web-1"), &json!(3)), "{saw}");
        assert!(saw["aborted"].as_str().is_some_and(|error| error.contains("abort")), "{saw}");
        // What was aborted does not run any more.
        let mut own = daemon.client();
        let ended = until(Duration::from_secs(60), || {
            let running = own.must("guest_command_list", json!({ "vm": "web-1" })).to_string();
            (!running.contains("running")).then_some(())
        });
        assert!(ended.is_some(), "the aborted command still runs");
    }
}

#[test]
fn fastmcp_works_over_stdio_and_http_in_both_eras() {
    let kit = Kit::find();
    let daemon = daemon_with_a_vm(kit.home());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/fastmcp_client.py");
    let (url, token) = daemon.http();
    let mut over_stdio = kit.python(&script);
    over_stdio.arg("--").arg(program("nexusctl")).args(["mcp", "--tools", "all"]).envs(daemon.environment());
    let mut over_http = kit.python(&script);
    over_http.arg(format!("{url}?tools=all")).env("NEXUS_HTTP_TOKEN", token);
    for mut client in [over_stdio, over_http] {
        let output = client.output().expect("Python runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{said}\n{}", output.status, daemon.log());
        assert!(!said.contains("failed"), "{said}");
        let eras: Vec<Value> = serde_json::from_slice(&output.stdout).expect("stdout is JSON");
        assert_eq!(eras.len(), 2);
        for saw in eras {
            assert_eq!(saw["tools"].as_array().map(Vec::len), Some(tools_of_all()), "{saw}");
            assert_eq!((&saw["same"], &saw["vms"]), (&json!(true), &json!(["web-1"])), "{saw}");
            let text = saw["text"].as_str().unwrap_or_default();
            assert!(text.contains("line 1\nline 2\nline 3"), "{saw}");
            assert!(saw["notes"].as_u64() > Some(0) && saw["growing"] == true, "{saw}");
            assert!(saw["failed"].as_str().is_some_and(|error| error.starts_with("vm_not_found: ")), "{saw}");
            assert_eq!((&saw["read"], &saw["prompts"]), (&json!("nexus://vm/web-1"), &json!(3)), "{saw}");
        }
    }
}

/// What a client of rmcp sees.
async fn visit(client: RunningService<RoleClient, ()>) -> Vec<String> {
    let tools = client.list_all_tools().await.expect("a list");
    let again = client.list_all_tools().await.expect("a list");
    assert_eq!(json!(tools), json!(again));
    let listed = client.call_tool(CallToolRequestParams::new(VmList::NAME)).await.expect("a result");
    let facts = listed.structured_content.expect("facts");
    assert_eq!(facts["vms"][0]["name"], "web-1", "{facts}");
    let mut run = CallToolRequestParams::new("guest_run_command");
    run.arguments = json!({ "vm": "web-1", "command": "echo $((6 * 7))" }).as_object().cloned();
    let ran = client.call_tool(run).await.expect("a result");
    assert!(json!(ran.content).to_string().contains("42"), "{ran:?}");
    let mut missing = CallToolRequestParams::new("vm_inspect");
    missing.arguments = json!({ "vm": "nobody" }).as_object().cloned();
    assert_eq!(client.call_tool(missing).await.expect("a result").is_error, Some(true));
    assert!(client.call_tool(CallToolRequestParams::new("no_such_tool")).await.is_err());
    client.cancel().await.expect("it ends");
    tools.into_iter().map(|tool| tool.name.into_owned()).collect()
}

#[test]
fn rmcp_works_over_stdio_and_http_in_both_eras() {
    let place = tempfile::tempdir().expect("a directory");
    let daemon = daemon_with_a_vm(place.path());
    let (url, token) = daemon.http();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let eras = [
        ClientLifecycleMode::Initialize,
        ClientLifecycleMode::Discover { preferred_versions: vec![ProtocolVersion::V_2026_07_28] },
    ];
    // The client of HTTP brings none; another test of this process may have installed it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut lists = Vec::new();
    for era in eras {
        let over_stdio = async {
            let mut bridge = tokio::process::Command::new(program("nexusctl"));
            bridge.env_remove("NEXUS_SOCKET").envs(daemon.environment()).arg("mcp");
            let transport = TokioChildProcess::new(bridge).expect("nexusctl runs");
            visit(().serve_with_lifecycle(transport, era.clone()).await.expect("a session over stdio")).await
        };
        lists.push(runtime.block_on(over_stdio));
        let over_http = async {
            let config =
                StreamableHttpClientTransportConfig::with_uri(url.clone()).auth_header(token.clone());
            let transport = StreamableHttpClientTransport::from_config(config);
            visit(().serve_with_lifecycle(transport, era.clone()).await.expect("a session over HTTP")).await
        };
        lists.push(runtime.block_on(over_http));
    }
    assert!(lists.windows(2).all(|pair| pair[0] == pair[1]), "every way leads to the same tools");
}
