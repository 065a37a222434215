//! The MCP Inspector: every schema portable by its strict rules, both eras alike, over HTTP and stdio.

use nexus_tests::daemon::{Daemon, program};
use serde_json::{Value, json};

use crate::kit::{Era, Kit, environment};

const LIST: [&str; 3] = ["--method", "tools/list", "--strict"];

/// The tools in both eras, which have to be the same.
fn tools(kit: &Kit, target: &[&str]) -> Value {
    let [legacy, modern] = Era::BOTH.map(|era| kit.inspect(target, era, &LIST)["tools"].take());
    assert_eq!(legacy, modern, "{target:?}: the eras differ");
    legacy
}

fn names(tools: &Value) -> Vec<&str> {
    tools.as_array().into_iter().flatten().filter_map(|tool| tool["name"].as_str()).collect()
}

/// One call in both eras; its results.
fn call(kit: &Kit, target: &[&str], tool: &str, arguments: &Value) -> [Value; 2] {
    let arguments = arguments.to_string();
    let request = ["--method", "tools/call", "--tool-name", tool, "--tool-args-json", &arguments];
    Era::BOTH.map(|era| kit.inspect(target, era, &request))
}

#[test]
fn the_inspector_has_nothing_to_complain_about_over_http() {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let mut client = daemon.client();
    let image = kit.home().join("image");
    std::fs::create_dir_all(image.join("etc")).expect("a directory to make an image from");
    client.create(json!({ "name": "web-1", "from": format!("file:{}", image.display()) }));

    let (url, token) = daemon.http();
    let bearer = format!("Authorization: Bearer {token}");
    let whole = [url.as_str(), "--transport", "http", "--header", &bearer];
    let tools = tools(&kit, &whole);
    let expected: Vec<_> =
        nexus_schema::tools::host().into_iter().chain(nexus_schema::tools::guest_on_host()).collect();
    assert_eq!(names(&tools).len(), expected.len());

    for result in call(&kit, &whole, "vm_list", &json!({})) {
        assert_eq!(result["structuredContent"]["vms"][0]["name"], "web-1", "{result}");
    }
    for result in
        call(&kit, &whole, "guest_run_command", &json!({ "vm": "web-1", "command": "echo $((6 * 7))" }))
    {
        assert!(result["content"].to_string().contains("42"), "{result}");
    }

    for era in Era::BOTH {
        let list = kit.inspect(&whole, era, &["--method", "resources/list"]);
        assert!(list["resources"].to_string().contains("nexus://vm/web-1"), "{list}");
        let read = kit.inspect(&whole, era, &["--method", "resources/read", "--uri", "nexus://vm/web-1"]);
        assert!(read["contents"][0]["text"].as_str().is_some_and(|text| text.contains("ready")), "{read}");
        let prompts = kit.inspect(&whole, era, &["--method", "prompts/list"]);
        assert_eq!(prompts["prompts"].as_array().map(Vec::len), Some(3), "{prompts}");
    }

    // What clients get that choose nothing.
    let default_url = format!("{url}?tools=work");
    let default = [default_url.as_str(), "--transport", "http", "--header", &bearer];
    let of_default = self::tools(&kit, &default);
    assert!(names(&of_default).len() <= 35 && names(&of_default)[0] == "vm_create", "{of_default}");

    // One VM alone, as a sub-agent has it.
    let scoped_url = format!("{url}/vm/web-1");
    let scoped = [scoped_url.as_str(), "--transport", "http", "--header", &bearer];
    let of_guest = self::tools(&kit, &scoped);
    assert!(
        names(&of_guest).contains(&"run_command") && !names(&of_guest).contains(&"vm_list"),
        "{of_guest}"
    );
    for result in call(&kit, &scoped, "os_info", &json!({})) {
        assert_ne!(result["isError"], json!(true), "{result}");
    }

    // Failures are results with a code and a hint, whatever the output schema says.
    let missing =
        ["--method", "tools/call", "--tool-name", "vm_inspect", "--tool-args-json", r#"{"vm":"nobody"}"#];
    for era in Era::BOTH {
        let output = kit.inspector(&whole, era, &missing);
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("vm_not_found"), "{}: {said}", output.status);
    }
}

#[test]
fn the_inspector_has_nothing_to_complain_about_over_stdio() {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&[]);
    let beside = environment(&daemon);
    let alone = json!({
        "NEXUS_STATE_DIR": kit.home().join("state"), "NEXUS_RUNTIME_DIR": kit.home().join("run"), "NEXUS_LOG": "warn", "NEXUS_TOOLS": "all",
    });
    let servers = [
        ("the-bridge", json!({ "command": program("nexusctl"), "args": ["mcp"], "env": beside })),
        ("beside-a-daemon", json!({ "command": program("nexusd"), "args": ["--stdio"], "env": beside })),
        ("both-in-one", json!({ "command": program("nexusd"), "args": ["--stdio"], "env": alone })),
    ];
    let mut lists = Vec::new();
    for (name, entry) in servers {
        let file = kit.server_file(name, &entry);
        let target = ["--config", file.to_str().expect("a path of text"), "--server", name];
        lists.push(tools(&kit, &target));
        for result in call(&kit, &target, "system_info", &json!({})) {
            assert!(result["structuredContent"]["version"].is_string(), "{result}");
        }
    }
    assert!(lists.windows(2).all(|pair| pair[0] == pair[1]), "every way leads to the same tools");
}
