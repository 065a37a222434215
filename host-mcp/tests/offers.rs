//! Resources, prompts, completions and skills of the whole endpoint.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Rig, Stream};
use serde_json::{Value, json};

const META: &str = r#"{"io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {}, "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "0"}}"#;

fn uris(list: &Value) -> Vec<&str> {
    list["result"]["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|resource| resource["uri"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resources_are_what_the_tools_say() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let list = client.request("resources/list", json!({})).await;
    assert_eq!(uris(&list)[0], "nexus://vms", "{list}");
    assert!(uris(&list).contains(&"skill://build-and-test/SKILL.md"), "{list}");
    let templates = client.request("resources/templates/list", json!({})).await;
    assert_eq!(templates["result"]["resourceTemplates"].as_array().unwrap().len(), 6);

    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("a text"), "h\u{e9}llo\n").unwrap();
    std::fs::write(files.path().join("bytes"), [0xff, 0, 1]).unwrap();
    std::fs::write(files.path().join("empty"), "").unwrap();
    let file = |name: &str| format!("nexus://vm/web-1/file{}/{name}", files.path().display());
    let read =
        async |client: &mut Stream, uri: &str| client.request("resources/read", json!({ "uri": uri })).await;
    for (name, key, content) in
        [("a%20text", "text", "h\u{e9}llo\n"), ("bytes", "blob", "/wAB"), ("empty", "text", "")]
    {
        let answer = read(&mut client, &file(name)).await;
        let contents = &answer["result"]["contents"][0];
        assert_eq!((&contents["uri"], &contents[key]), (&json!(file(name)), &json!(content)), "{answer}");
    }
    let all = read(&mut client, "nexus://vms").await;
    let text = all["result"]["contents"][0]["text"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(text).unwrap()["vms"].is_array(), "{all}");

    let ran = client.call("guest_run_command", json!({"vm": "web-1", "command": "echo said"})).await;
    let id = ran["_meta"]["dev.nexus/result"]["command_id"].as_str().unwrap().to_owned();
    let command = read(&mut client, &format!("nexus://vm/web-1/command/{id}")).await;
    assert!(command["result"]["contents"][0]["text"].as_str().unwrap().contains("said"), "{command}");
    let skill = read(&mut client, "skill://serve-and-look/SKILL.md").await;
    assert_eq!(skill["result"]["contents"][0]["mimeType"], "text/markdown");

    // What is missing is one error, whatever the kind.
    for uri in [
        "nexus://vm/nobody",
        "nexus://vm/nobody/file/etc/x",
        &file("missing"),
        "nexus://other",
        "skill://no/SKILL.md",
    ] {
        let answer = read(&mut client, uri).await;
        assert_eq!(
            (&answer["error"]["code"], &answer["error"]["data"]["uri"]),
            (&json!(-32002), &json!(uri)),
            "{answer}"
        );
    }
    // A tool's set does not hide a resource.
    let mut small = rig.session("/mcp?tools=drives").await;
    assert!(read(&mut small, &file("empty")).await["result"].is_object());
}

/// In the session era, where a client says once what it can; the other one is tried with the app itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_app_is_told_of_to_clients_that_show_apps() {
    let rig = Rig::start().await;
    let mut plain = rig.session("/mcp?tools=work").await;
    let mut capable = rig.stream("/mcp?tools=work").await;
    let can =
        json!({"extensions": {"io.modelcontextprotocol/ui": {"mimeTypes": ["text/html;profile=mcp-app"]}}});
    let params = json!({"protocolVersion": "2025-11-25", "capabilities": can, "clientInfo": {"name": "t", "version": "0"}});
    capable.request("initialize", params).await;
    let listed = plain.request("tools/list", json!({})).await;
    let told = capable.request("tools/list", json!({})).await;
    assert!(told["result"]["tools"].to_string().len() <= 60_000, "more than a list may be");
    let (listed, mut told) = (listed["result"]["tools"].clone(), told["result"]["tools"].clone());
    let list = told.as_array_mut().unwrap().iter_mut().find(|tool| tool["name"] == "vm_list").unwrap();
    let meta = list.as_object_mut().unwrap().remove("_meta");
    assert_eq!(meta, Some(json!({"ui": {"resourceUri": "ui://nexus/dashboard"}})));
    // What the app polls beside the set is the app's alone.
    let (mut polled, mut told) = (Vec::new(), told.as_array().unwrap().clone());
    told.retain(|tool| {
        let is_polled = tool["_meta"]["ui"]["visibility"] == json!(["app"]);
        polled.extend(is_polled.then(|| tool["name"].clone()));
        !is_polled
    });
    assert_eq!(json!(told), listed, "nothing else differs");
    polled.sort_by_key(Value::to_string);
    assert_eq!(polled, ["network_log", "vm_history"]);
    for tool in ["vm_history", "network_log"] {
        let call = json!({"name": tool, "arguments": {"vm": "nobody"}});
        let answer = capable.request("tools/call", call.clone()).await;
        assert_eq!(answer["result"]["_meta"]["dev.nexus/error"]["code"], "vm_not_found", "{answer}");
        let refused = plain.request("tools/call", call).await;
        assert_eq!(refused["error"]["code"], -32602, "{refused}");
    }
    let other = capable.request("tools/call", json!({"name": "prune", "arguments": {}})).await;
    assert_eq!(other["error"]["code"], -32602, "{other}");

    let read = json!({"uri": "ui://nexus/dashboard"});
    let app = capable.request("resources/read", read.clone()).await["result"]["contents"][0].clone();
    assert_eq!(app["mimeType"], "text/html;profile=mcp-app");
    assert_eq!(app["_meta"]["ui"]["csp"], json!({}));
    assert!(app["text"].as_str().unwrap().starts_with("<!doctype html>"));
    let mut scoped = rig.session("/mcp/vm/web-1").await;
    assert_eq!(scoped.request("resources/read", read).await["error"]["code"], -32601);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_are_filled_in_and_arguments_completed() {
    let rig = Rig::start().await;
    let mut client = rig.session("/mcp").await;
    let prompts = client.request("prompts/list", json!({})).await;
    let names: Vec<_> =
        prompts["result"]["prompts"].as_array().unwrap().iter().map(|p| p["name"].clone()).collect();
    assert_eq!(names, ["new-dev-vm", "debug-vm", "review-changes"]);
    let get = json!({"name": "debug-vm", "arguments": {"vm": "web-1"}});
    let prompt = client.request("prompts/get", get).await;
    assert!(
        prompt["result"]["messages"][0]["content"]["text"].as_str().unwrap().contains("`web-1`"),
        "{prompt}"
    );
    let wrong = client.request("prompts/get", json!({"name": "debug-vm"})).await;
    assert_eq!(wrong["error"]["code"], -32602, "{wrong}");
    assert!(wrong["error"]["message"].as_str().unwrap().contains("needs the argument vm"), "{wrong}");

    let complete = json!({"ref": {"type": "ref/prompt", "name": "new-dev-vm"}, "argument": {"name": "image", "value": "deb"}});
    let answer = client.request("completion/complete", complete).await;
    assert_eq!(answer["result"]["completion"]["values"], json!(["debian", "debian-minimal"]), "{answer}");
    let nothing = json!({"ref": {"type": "ref/prompt", "name": "x"}, "argument": {"name": "y", "value": ""}});
    let answer = client.request("completion/complete", nothing).await;
    assert_eq!(answer["result"]["completion"]["values"], json!([]), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_eras_and_the_skills_extension_are_served_and_one_vm_has_none_of_it() {
    let rig = Rig::start().await;
    let meta: Value = serde_json::from_str(META).unwrap();
    let mut stateless = rig.stream("/mcp").await;
    let list = stateless.request("resources/list", json!({ "_meta": meta })).await;
    assert_eq!(
        (&list["result"]["resultType"], uris(&list)[0]),
        (&json!("complete"), "nexus://vms"),
        "{list}"
    );
    let discover = stateless.request("server/discover", json!({ "_meta": meta })).await;
    let extensions = &discover["result"]["capabilities"]["extensions"];
    assert!(extensions["io.modelcontextprotocol/skills"].is_object(), "{discover}");
    let skills = stateless.request("skills/list", json!({ "_meta": meta })).await;
    let first = skills["result"]["skills"][0].clone();
    let uri = first["uri"].as_str().unwrap();
    assert!(first["resources"][0]["digest"].as_str().unwrap().starts_with("sha256:"), "{skills}");
    let one = stateless.request("skills/get", json!({ "uri": uri, "_meta": meta })).await;
    assert_eq!(one["result"]["skill"], first, "{one}");

    let mut scoped = rig.session("/mcp/vm/web-1").await;
    for method in ["resources/list", "resources/templates/list", "prompts/list", "skills/list"] {
        let answer = scoped.request(method, json!({})).await;
        assert_eq!(answer["error"]["code"], -32601, "{method}: {answer}");
    }
    let read = scoped.request("resources/read", json!({ "uri": "nexus://vms" })).await;
    assert_eq!(read["error"]["code"], -32601, "{read}");
}
