//! Operations and commands as tasks of MCP: for requests and sessions that declare them and for no others, with what the tools would say, by the rules of the tools.

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::tokens::{http, session};
use crate::world::{World, soon};

const EXTENSION: &str = "io.modelcontextprotocol/tasks";

fn meta(declares: bool) -> Value {
    let capabilities = if declares { json!({ "extensions": { EXTENSION: {} } }) } else { json!({}) };
    json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": capabilities,
        "io.modelcontextprotocol/clientInfo": { "name": "test", "version": "0" } })
}

fn work(world: &World) -> Client {
    Client::connect_at(&world.daemon.socket(), "/mcp?tools=work").expect("the owner connects")
}

/// Calls a tool of a client that can deal with tasks; the whole result.
#[track_caller]
fn call(client: &mut Client, tool: &str, arguments: &Value) -> Value {
    let params = json!({ "name": tool, "arguments": arguments, "_meta": meta(true) });
    client.request("tools/call", &params).expect("an answer")
}

fn ask(client: &mut Client, method: &str, id: &Value) -> std::io::Result<Value> {
    let mut params = json!({ "taskId": id, "_meta": meta(true) });
    if method == "tasks/update" {
        params["inputResponses"] = json!({});
    }
    client.request(method, &params)
}

/// The code of the error of a request.
#[track_caller]
fn refused(client: &mut Client, method: &str, id: &Value) -> String {
    let error = ask(client, method, id).expect_err("it is refused").to_string();
    error.replace(id.as_str().expect("an id"), "X")
}

/// Asks about a task until it has ended.
#[track_caller]
fn ended(client: &mut Client, id: &Value) -> Value {
    soon("the task has ended", || {
        let task = ask(client, "tasks/get", id).expect("a task");
        assert_eq!((&task["taskId"], &task["resultType"]), (id, &json!("complete")), "{task}");
        (task["status"] != "working").then_some(task)
    })
}

fn run_of(world: &World, name: &str, line: &str) -> Value {
    json!({ "name": name, "from": world.from, "disk": "128MiB", "run": line })
}

#[test]
fn long_work_is_a_task_for_clients_that_declare_it_and_for_no_others() {
    let world = World::new();
    let mut client = work(&world);
    // An operation: the task is the operation.
    let made = call(&mut client, "vm_create", &run_of(&world, "once", "sleep 4; echo done; exit 3"));
    assert_eq!((&made["resultType"], &made["status"]), (&json!("task"), &json!("working")), "{made}");
    assert_eq!((&made["ttlMs"], made.get("content")), (&Value::Null, None), "{made}");
    assert!(made["statusMessage"].as_str().is_some_and(|text| text.starts_with("once: ")), "{made}");
    let id = made["taskId"].clone();
    let listed = client.must("op_list", json!({ "state": "running" }));
    assert_eq!(listed["ops"][0]["op_id"], id, "{listed}");
    let task = ended(&mut client, &id);
    assert_eq!((&task["status"], &task["createdAt"]), (&json!("completed"), &made["createdAt"]), "{task}");
    let (result, same) = (&task["result"], client.must("op_get", json!({ "op_id": id })));
    assert_eq!(result["structuredContent"], same, "{task}");
    assert_eq!(result["structuredContent"]["result"]["run"]["status"], 3, "{task}");
    ask(&mut client, "tasks/update", &id).expect("nothing was asked");

    // What ends soon is answered at once, and who does not want to wait is not made to.
    let vm = call(&mut client, "vm_create", &json!({ "name": "web", "from": world.from, "disk": "128MiB" }));
    if vm["resultType"] == "task" {
        ended(&mut client, &vm["taskId"]);
    }
    let quick = call(&mut client, "guest_run_command", &json!({ "vm": "web", "command": "echo quick" }));
    assert_eq!(quick["resultType"], "complete", "{quick}");
    assert!(quick["content"].to_string().contains("quick"), "{quick}");
    let mut detached = run_of(&world, "later", "sleep 2");
    detached["wait_s"] = 0.into();
    let detached = call(&mut client, "vm_create", &detached);
    assert_eq!(detached["structuredContent"]["done"], false, "{detached}");
    // Its id is that of a task all the same.
    assert_eq!(ended(&mut client, &detached["structuredContent"]["op_id"])["status"], "completed");

    // A command: the task names it.
    let long = json!({ "vm": "web", "command": "sleep 4; echo out; echo err >&2; exit 3" });
    let made = call(&mut client, "guest_run_command", &long);
    assert_eq!(made["resultType"], "task", "{made}");
    let task = ended(&mut client, &made["taskId"]);
    let (command, _) = made["taskId"].as_str().and_then(|id| id.split_once('.')).expect("two parts");
    assert_eq!((&task["status"], &task["createdAt"]), (&json!("completed"), &made["createdAt"]), "{task}");
    assert_eq!(task["result"]["_meta"]["dev.nexus/result"]["command_id"], command, "{task}");
    assert_eq!(task["result"]["_meta"]["dev.nexus/result"]["exit_code"], 3, "{task}");
    let said = task["result"]["content"].to_string();
    assert!(said.contains("out") && said.contains("err"), "{task}");
    for (key, value) in [("yield_after_s", json!(0)), ("stdin_open", json!(true))] {
        let mut own = json!({ "vm": "web", "command": "sleep 3", "yield_after_s": 1 });
        own[key] = value;
        let result = call(&mut client, "guest_run_command", &own);
        assert_eq!(result["_meta"]["dev.nexus/result"]["state"], "running", "{key}: {result}");
    }

    // Nobody else gets a task, or is told of one.
    let params = json!({ "name": "guest_run_command", "_meta": meta(false),
        "arguments": { "vm": "web", "command": "sleep 3", "yield_after_s": 1 } });
    let plain = client.request("tools/call", &params).expect("an answer");
    assert_eq!(plain["_meta"]["dev.nexus/result"]["state"], "running", "{plain}");
    let error = client.request("tasks/get", &json!({ "taskId": id, "_meta": meta(false) }));
    let error = error.expect_err("it is not declared").to_string();
    assert!(error.contains("-32021") && error.contains(EXTENSION), "{error}");
    let discovered = client.request("server/discover", &json!({ "_meta": meta(true) })).expect("an answer");
    assert_eq!(discovered["capabilities"]["extensions"][EXTENSION], json!({}), "{discovered}");
}

#[test]
fn a_session_whose_client_declares_tasks_gets_them() {
    let world = World::with(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    world.create(&mut world.client(), "web");
    let capabilities = json!({ "extensions": { EXTENSION: {} } });
    let socket = world.daemon.socket();
    let mut client =
        Client::connect_as(&socket, "/mcp?tools=work", "", capabilities.clone()).expect("the owner connects");
    let command =
        |line: &str| json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": line } });
    let quick = client.request("tools/call", &command("echo quick")).expect("an answer");
    assert!(quick.get("resultType").is_none() && quick["content"].to_string().contains("quick"), "{quick}");
    let run =
        json!({ "name": "vm_create", "arguments": run_of(&world, "once", "sleep 4; echo $((6 * 7))-here") });
    for call in [run, command("sleep 4; echo $((6 * 7))-here")] {
        let made = client.request("tools/call", &call).expect("an answer");
        assert_eq!((&made["resultType"], &made["status"]), (&json!("task"), &json!("working")), "{made}");
        let task = soon("the task has ended", || {
            let task = client.request("tasks/get", &json!({ "taskId": made["taskId"] })).expect("a task");
            (task["status"] != "working").then_some(task)
        });
        assert_eq!(task["status"], "completed", "{task}");
        assert!(task["result"].to_string().contains("42-here"), "{task}");
    }
    // What a request says counts more than what the session began with.
    let params = json!({ "name": "guest_run_command", "_meta": meta(false),
        "arguments": { "vm": "web", "command": "sleep 3", "yield_after_s": 1 } });
    let plain = client.request("tools/call", &params).expect("an answer");
    assert_eq!(plain["_meta"]["dev.nexus/result"]["state"], "running", "{plain}");

    // The same over HTTP.
    let (_, secret) = world.daemon.http();
    for (capabilities, is_task) in [(capabilities, true), (json!({}), false)] {
        let session = session(&world, &secret, &capabilities);
        let mut call = command("sleep 3; echo out");
        call["arguments"]["yield_after_s"] = 1.into();
        let call = json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call }).to_string();
        let answer = http(&world, "POST /mcp", &secret, &session, &call);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(answer.contains(r#""resultType":"task""#), is_task, "{answer}");
        assert_eq!(answer.contains(r#""content":"#), !is_task, "{answer}");
    }
}

#[test]
fn a_cancelled_task_ends_what_it_stands_for() {
    let world = World::new();
    let mut client = work(&world);
    world.create(&mut world.client(), "web");
    let running = |world: &World| {
        world.client().must("guest_command_list", json!({ "vm": "web" })).to_string().contains("running")
    };
    let arguments = json!({ "vm": "web", "command": "sleep 7654" });
    let command = call(&mut client, "guest_run_command", &arguments)["taskId"].clone();
    assert_eq!(ask(&mut client, "tasks/get", &command).expect("a task")["status"], "working");
    let acknowledged = ask(&mut client, "tasks/cancel", &command).expect("it is cancelled");
    assert_eq!(acknowledged["resultType"], "complete", "{acknowledged}");
    let task = ended(&mut client, &command);
    assert_eq!(task["result"]["_meta"]["dev.nexus/result"]["signal"], "SIGKILL", "{task}");
    assert!(!running(&world));
    // Again: it has ended already.
    ask(&mut client, "tasks/cancel", &command).expect("it is acknowledged");

    let op = call(&mut client, "vm_create", &run_of(&world, "long", "sleep 7654"))["taskId"].clone();
    ask(&mut client, "tasks/cancel", &op).expect("it is cancelled");
    let task = ended(&mut client, &op);
    assert_eq!((&task["status"], task.get("result")), (&json!("cancelled"), None), "{task}");

    // A command ends with its VM, and its task then says so as the tool does.
    let command = call(&mut client, "guest_run_command", &arguments)["taskId"].clone();
    client.must("vm_stop", json!({ "vm": "web", "force": true, "wait_s": 45 }));
    let task = ended(&mut client, &command);
    assert_eq!((&task["status"], &task["result"]["isError"]), (&json!("completed"), &json!(true)), "{task}");
    assert!(task["result"]["content"].to_string().contains("vm_not_running"), "{task}");
}

#[test]
fn the_task_of_a_paused_vm_says_so_and_goes_on_with_it() {
    let world = World::new();
    let mut client = work(&world);
    world.create(&mut world.client(), "web");
    let go = world.path("go");
    let line = format!("until [ -e {} ]; do sleep 0.05; done; echo done", go.display());
    let made = call(&mut client, "guest_run_command", &json!({ "vm": "web", "command": line }));
    let id = made["taskId"].clone();
    world.client().must("vm_pause", json!({ "vm": "web" }));
    let task = ask(&mut client, "tasks/get", &id).expect("a task");
    assert_eq!(task["status"], "working", "{task}");
    let said = task["statusMessage"].as_str().expect("a message");
    assert!(said.contains("web is paused") && said.contains("vm_resume"), "{said}");
    std::fs::write(go, "").expect("the command ends once it goes on");
    world.client().must("vm_resume", json!({ "vm": "web" }));
    let task = ended(&mut client, &id);
    assert_eq!(task["status"], "completed", "{task}");
    assert!(task["result"]["content"].to_string().contains("done"), "{task}");
}

#[test]
fn a_failed_operation_is_a_failed_result() {
    let world = World::hostile(&[]);
    let mut client = work(&world);
    let arguments = json!({ "name": "slow-1", "from": world.from, "disk": "128MiB" });
    let made = call(&mut client, "vm_create", &arguments);
    assert_eq!(made["resultType"], "task", "{made}");
    let held = soon("the guest runs", || {
        std::fs::read_dir(world.daemon.state().join("vms"))
            .ok()?
            .flatten()
            .map(|directory| directory.path().join("held"))
            .find(|held| held.exists())
    });
    std::fs::remove_file(held).expect("the guest is told to go on");
    let task = ended(&mut client, &made["taskId"]);
    assert_eq!((&task["status"], &task["result"]["isError"]), (&json!("completed"), &json!(true)), "{task}");
    let error = &task["result"]["_meta"]["dev.nexus/error"];
    assert!(error["code"].is_string() && task["result"].get("structuredContent").is_none(), "{task}");
}

#[test]
fn tasks_of_others_do_not_exist() {
    let world = World::new();
    let mut owner = work(&world);
    world.create(&mut world.client(), "web");
    let sleep = |vm: &str| json!({ "vm": vm, "command": "sleep 7654" });
    let command = call(&mut owner, "guest_run_command", &sleep("web"))["taskId"].clone();
    let op = call(&mut owner, "vm_create", &run_of(&world, "long", "sleep 7654"))["taskId"].clone();
    let token = world.client().must("token_create", json!({ "scopes": ["exec", "lifecycle"] }));
    let mut agent = Client::connect_with(&world.daemon.socket(), token["token"].as_str().expect("a secret"))
        .expect("it connects");
    let mut parts = command.as_str().expect("an id").splitn(2, '.');
    let (id, rest) = (parts.next().expect("a command"), parts.next().expect("its VM and start"));
    let nobody = [json!("bbbbbbbbbbbbe"), json!(format!("{id}.bbbbbbbbbbbbe.1")), json!("nonsense")];
    let malformed = json!(format!("{id}.{rest}.1"));
    for method in ["tasks/get", "tasks/update", "tasks/cancel"] {
        let mut said: Vec<String> = [&op, &command, &malformed]
            .into_iter()
            .chain(&nobody)
            .map(|id| refused(&mut agent, method, id))
            .collect();
        said.dedup();
        assert_eq!(said.len(), 1, "{method}: {said:?}");
        assert!(said[0].contains("-32602") && said[0].contains("there is no task X"), "{said:?}");
    }
    // The endpoint of one VM has that VM's commands, and nothing else.
    world.create(&mut world.client(), "other");
    let mut inside = Client::connect_at(&world.daemon.socket(), "/mcp/vm/web").expect("it connects");
    assert_eq!(ask(&mut inside, "tasks/get", &command).expect("its own")["status"], "working");
    let foreign = call(&mut owner, "guest_run_command", &sleep("other"))["taskId"].clone();
    for id in [&op, &foreign] {
        let said = refused(&mut inside, "tasks/get", id);
        assert!(said.contains("-32602"), "{said}");
    }
    let own = call(&mut inside, "run_command", &json!({ "command": "sleep 7654" }))["taskId"].clone();
    ask(&mut inside, "tasks/cancel", &own).expect("it is cancelled");
    // A read-only endpoint cancels nothing.
    let mut reader = Client::connect_at(&world.daemon.socket(), "/mcp?tools=read-only").expect("it connects");
    assert_eq!(ask(&mut reader, "tasks/get", &command).expect("a task")["status"], "working");
    let said = refused(&mut reader, "tasks/cancel", &command);
    assert!(said.contains("not offered here"), "{said}");
    for id in [&op, &command, &foreign] {
        ask(&mut owner, "tasks/cancel", id).expect("it is cancelled");
    }
}

#[test]
fn a_task_survives_the_daemon() {
    let mut world = World::new();
    world.create(&mut world.client(), "web");
    let arguments = json!({ "vm": "web", "command": "sleep 5; echo end" });
    let made = call(&mut work(&world), "guest_run_command", &arguments);
    world.daemon.kill();
    world.daemon.restart();
    let task = ended(&mut work(&world), &made["taskId"]);
    assert!(task["result"]["content"].to_string().contains("end"), "{task}");
}
