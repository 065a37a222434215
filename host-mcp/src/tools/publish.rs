//! How tools are published: names, schemas, annotations, instructions.

use std::sync::Arc;

use nexus_schema::{Effect, ToolInfo, schema};
use rmcp::model::{JsonObject, Tool, ToolAnnotations};
use serde_json::Value;

use super::compact::{OF_THE_HOST, is_vm};

/// The instructions that a client gets on first contact.
pub const INSTRUCTIONS: &str = "\
Nexus gives you Linux microVMs of your own: real machines with their own kernel and disk, apart from the host. Use one whenever \
you want to run commands, build or test something, or try what must not touch the host. VMs reach the internet by a \
proxy in their environment: apt, pip, git, npm and curl work. A result says what was refused by policy (the host, private networks) \
and what to ask for; `network` of `vm_create` and `vm_update` sets it. Other systems: any OCI image, `vm_create` {\"from\":\"oci:node:22\"}. \
For images, templates with more packages (`template_create`), drives and settings there are more tools at `/mcp?tools=all`.

Start: `vm_create {}` makes a Debian VM with Python, git and curl, starts it and waits until it is ready (`{\"from\":\"busybox\"}` boots fastest; \
`name` is yours to choose). If the reply says `done: false`, call `op_get` with its `op_id` until it is done.
Work: every `guest_` tool runs inside the VM that you name in `vm` (name or id): `guest_run_command` {\"vm\":\"web-1\",\
\"command\":\"uname -a\"}, `guest_file_write`, `guest_file_read`, `guest_file_edit`, `guest_file_search`, `guest_file_list` and others, \
`guest_http_request`, `guest_os_info`. Commands run as root in a fresh process each time: set `cwd`, `env` and `user` per call. What runs longer than \
30 s goes on: follow it with `guest_command_output`; start servers and what is typed to with `guest_command_start`. A non-zero exit \
code is a normal result.
End: `vm_stop` keeps the disk, `vm_start` brings it back, `vm_delete` removes both. Clean up what you no longer need.

Look: `vm_list` shows what exists, `vm_inspect` everything about one VM, `vm_logs` its console, \
`system_info` whether this host can run VMs and what is missing.
Failures are results with `isError` and a text `code: message`, then a line that says what to do next. Codes that can be tried \
again say `retryable` in `_meta[\"dev.nexus/error\"]`. A VM that was replaced or rebooted has a new `boot_id`: its processes are \
gone, its disk is not.";

/// The instructions for clients of the scoped endpoint.
pub(crate) const SCOPED_INSTRUCTIONS: &str = "\
This endpoint is the inside of one Linux microVM. Every tool runs in that VM and never on the host: `run_command` \
{\"command\":\"uname -a\"}, `file_write`, `file_read`, `file_edit`, `file_search`, `file_list` and others, `http_request`, `os_info`. Commands run as root in a \
fresh process each time: set `cwd`, `env` and `user` per call. What runs longer than 30 s goes on: follow it with `command_output`; start servers \
and what is typed to with `command_start`. A non-zero exit code is a normal result. Failures are results with `isError` and a text `code: message`, then a line that says what \
to do next.";

/// Tools in the form of MCP, sorted by name.
pub(super) fn published(mut infos: Vec<ToolInfo>) -> Vec<Tool> {
    infos.sort_by(|a, b| a.name.cmp(&b.name));
    infos.into_iter().map(tool).map(listed).collect()
}

/// A tool as lists show it: its result without what concerns the host alone, and what it has more than once is written once.
pub(super) fn listed(mut tool: Tool) -> Tool {
    let shown = |output: Arc<JsonObject>| {
        let mut output = Arc::unwrap_or_clone(output);
        hide_host(&mut output);
        Arc::new(schema::shared(output))
    };
    tool.output_schema = tool.output_schema.map(shown);
    tool
}

/// Removes what concerns the host alone from the VMs in a schema. Results of the set `all` have it all the same.
fn hide_host(schema: &mut JsonObject) {
    if schema.get("properties").and_then(Value::as_object).is_some_and(is_vm) {
        remove(schema, &OF_THE_HOST);
        let drive =
            schema.get_mut("properties").and_then(|members| members.get_mut("drives")?.get_mut("items"));
        if let Some(Value::Object(drive)) = drive {
            remove(drive, &["path"]);
        }
    }
    schema.values_mut().for_each(hide_within);
}

fn hide_within(value: &mut Value) {
    match value {
        Value::Object(schema) => hide_host(schema),
        Value::Array(schemas) => schemas.iter_mut().for_each(hide_within),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Removes members from the schema of an object.
fn remove(schema: &mut JsonObject, names: &[&str]) {
    if let Some(Value::Object(members)) = schema.get_mut("properties") {
        members.retain(|name, _| !names.contains(&&**name));
    }
    if let Some(Value::Array(required)) = schema.get_mut("required") {
        required.retain(|name| name.as_str().is_none_or(|name| !names.contains(&name)));
    }
}

/// A tool in the form of MCP.
pub(super) fn tool(info: ToolInfo) -> Tool {
    let annotations = annotations(&info);
    let mut tool = Tool::new(info.name, info.description, Arc::new(info.input_schema));
    tool.title = Some(info.title);
    tool.output_schema = info.output_schema.map(|schema| Arc::new(terse(schema)));
    tool.annotations = Some(annotations);
    tool
}

/// The schema of a result without words on the members of its parts: seven tools return a VM, and `vm_inspect` explains it.
fn terse(mut schema: JsonObject) -> JsonObject {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(members) => {
                // A member of that name has a schema, the word has a text.
                if members.get("description").is_some_and(Value::is_string) {
                    members.remove("description");
                }
                members.values_mut().for_each(strip);
            }
            Value::Array(items) => items.iter_mut().for_each(strip),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    if let Some(Value::Object(members)) = schema.get_mut("properties") {
        for member in members.values_mut().filter_map(Value::as_object_mut) {
            for part in ["properties", "items", "additionalProperties", "anyOf", "oneOf"] {
                if let Some(part) = member.get_mut(part) {
                    strip(part);
                }
            }
        }
    }
    schema
}

fn annotations(info: &ToolInfo) -> ToolAnnotations {
    let (read_only, destructive, idempotent) = match info.effect {
        Effect::ReadOnly => (true, false, true),
        Effect::Additive { idempotent } => (false, false, idempotent),
        Effect::Destructive { idempotent } => (false, true, idempotent),
    };
    ToolAnnotations::with_title(info.title.clone())
        .read_only(read_only)
        .destructive(destructive)
        .idempotent(idempotent)
        .open_world(info.open_world)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_results_have_no_words_and_results_have() {
        let infos = nexus_schema::tools::host();
        let published = |name: &str| {
            let info = infos.iter().find(|info| info.name == name).unwrap().clone();
            Value::Object(tool(info).output_schema.unwrap().as_ref().clone())
        };
        let inspected = published("vm_inspect");
        assert!(inspected["properties"]["state"]["description"].is_string());
        assert_eq!(inspected["properties"]["timings"]["properties"]["total_ms"].get("description"), None);
        let started = published("vm_start");
        assert!(started["properties"]["done"]["description"].is_string());
        assert_eq!(started["properties"]["result"]["properties"]["state"].get("description"), None);
        // A setting's member of that name is no word.
        let settings = published("settings_get");
        let setting = &settings["properties"]["settings"]["items"]["properties"];
        assert_eq!(setting["description"]["type"], "string");
    }

    #[test]
    fn lists_say_nothing_of_what_concerns_the_host_alone() {
        let text = |tool: &Tool| serde_json::to_string(&tool.output_schema).unwrap();
        let mut hidden = 0;
        for info in nexus_schema::tools::host().into_iter().filter(|info| info.name.starts_with("vm_")) {
            let whole = tool(info);
            let shown = text(&listed(whole.clone()));
            for word in ["shim_pid", "console_log", "vsock_socket", "\"cid\"", "\"generation\""] {
                hidden += usize::from(text(&whole).contains(word));
                assert!(!shown.contains(word), "{}: {word}", whole.name);
            }
            assert_eq!(text(&whole).contains("\"vcpus\""), shown.contains("\"vcpus\""), "{}", whole.name);
        }
        assert!(hidden > 20, "{hidden}");
    }

    #[test]
    fn instructions_fit() {
        assert!(INSTRUCTIONS.chars().count() < 2048, "{}", INSTRUCTIONS.chars().count());
        assert!(SCOPED_INSTRUCTIONS.chars().count() < 2048);
        // They say what is there and how to get more.
        for needed in ["vm_create {}", "template_create", "apt, pip", "oci:", "network", "op_get"] {
            assert!(INSTRUCTIONS.contains(needed), "{needed}");
        }
    }
}
