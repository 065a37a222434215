//! The page of tools: what docs/tools.md says of each tool is what the code says, and each example is a call that the tool takes.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod page;

use std::fmt::Write as _;

use nexus_schema::access::scope_of;
use nexus_schema::tool::{Effect, GUEST_PREFIX, ToolInfo, VM_ARGUMENT};
use nexus_schema::toolset::Toolset;
use nexus_schema::{Tool, for_each_guest_tool, for_each_host_tool, tools};
use serde_json::{Map, Value, json};

const HEAD: &str = "\
# Tools

Every tool with what it needs, an example of a call, its arguments and the members of its result. [The MCP surface](mcp.md) explains what they
have in common: [sets](mcp.md#sets-of-tools), scopes of [tokens](mcp.md#tokens), operations and errors. `nexusctl call TOOL JSON` calls any
of them. A list of members ends with those that may be missing.

In names of members, `.` leads into an object and `[]` into each element of a list; `*` stands for a name of your choice. Arguments are listed to the
last member, results to the second level. `progress` and `error` are the same everywhere: [tools](mcp.md#tools) describes them.
";

const FOOT: &str = "
<!-- Generated from tools-schema/src/tools. After a change:
     INSTA_UPDATE=always cargo test --workspace --test reference -->
";

/// An id, for examples.
const ID: &str = "mbzfhlpco5ta2";

/// Examples of calls that say more than the required arguments, with the host's names.
const EXAMPLES: &[(&str, &str)] = &[
    ("asset_download", r#"{"kind":"kernel","from":"anvil","version":"6.12"}"#),
    ("asset_list", r#"{"kind":"kernel"}"#),
    ("audit_list", r#"{"vm":"web-1","outcome":"denied"}"#),
    ("checkpoint_diff", r#"{"from":"before-upgrade","path":"/etc"}"#),
    ("drive_attach", r#"{"drive":"data","vm":"web-1","mount":"/srv/data"}"#),
    ("drive_create", r#"{"name":"data","size":"10GiB"}"#),
    ("events_wait", r#"{"kinds":["vm","command"],"wait_s":30}"#),
    ("guest_command_input", r#"{"vm":"web-1","id":"mbzfhlpco5ta2","input":"yes\n"}"#),
    ("guest_command_signal", r#"{"vm":"web-1","id":"mbzfhlpco5ta2","signal":"TERM"}"#),
    ("guest_command_start", r#"{"vm":"web-1","command":"python3 -m http.server 8000","cwd":"/srv"}"#),
    ("guest_copy_in", r#"{"vm":"web-1","from":"/home/me/src/app","to":"/srv/app","gitignore":true}"#),
    ("guest_copy_out", r#"{"vm":"web-1","from":"/srv/app/dist","to":"/home/me/src/app/dist"}"#),
    ("guest_export", r#"{"vm":"web-1","path":"/srv/app"}"#),
    (
        "guest_file_edit",
        r#"{"vm":"web-1","edits":[{"path":"/srv/app/main.py","old":"debug = True","new":"debug = False"}]}"#,
    ),
    ("guest_file_list", r#"{"vm":"web-1","path":"/srv/app","glob":"*.py","recursive":true}"#),
    (
        "guest_file_patch",
        r#"{"vm":"web-1","path":"/srv/app","patch":"--- a/main.py\n+++ b/main.py\n@@ -1 +1 @@\n-a = 1\n+a = 2\n"}"#,
    ),
    ("guest_file_search", r#"{"vm":"web-1","path":"/srv/app","pattern":"fn \\w+_test","context":2}"#),
    ("guest_http_request", r#"{"vm":"web-1","url":"http://127.0.0.1:8000/health"}"#),
    ("guest_mcp_call", r#"{"vm":"web-1","server":"db","tool":"query","arguments":{"sql":"select 1"}}"#),
    ("guest_run_command", r#"{"vm":"web-1","command":"make test","cwd":"/srv/app","timeout_s":600}"#),
    ("guest_stream_open", r#"{"vm":"web-1","open":{"tcp":{"port":80}}}"#),
    ("image_create", r#"{"from":"oci:python:3.12-slim","name":"python"}"#),
    ("image_push", r#"{"image":"prepared","to":"registry.example.com/team/prepared:1.0"}"#),
    ("image_save", r#"{"image":"prepared","to":"/home/me/images/prepared.tar"}"#),
    ("kernel_build", r#"{"version":"6.12","check":true}"#),
    (
        "kernel_publish",
        r#"{"directory":"/srv/mirror","key":"/home/me/kernels.asc","kernels":["linux-6-12-48-microvm"]}"#,
    ),
    ("provider_set", r#"{"provider":"alpine","mirrors":["https://mirror.example/alpine"]}"#),
    ("prune", r#"{"images":true,"assets":true,"dry_run":true}"#),
    ("settings_set", r#"{"values":{"default.memory":"2GiB"}}"#),
    ("template_create", r#"{"name":"web","source":"debian","packages":["nginx"]}"#),
    ("template_update", r#"{"template":"web","packages":["nginx","redis-server"]}"#),
    ("token_create", r#"{"name":"helper","scopes":["exec"],"vms":["web-1"],"expires_in_s":3600}"#),
    ("vm_create", r#"{"name":"web-1","from":"debian","memory":"2GiB","ttl":"8h"}"#),
    ("vm_delete", r#"{"vm":"web-1","force":true}"#),
    ("vm_list", r#"{"state":"ready"}"#),
    ("vm_publish", r#"{"vm":"web-1","guest_port":80,"host_port":8080}"#),
    ("vm_update", r#"{"vm":"web-1","network":{"allow":["api.example.org:443"]}}"#),
    ("vm_wait", r#"{"vm":"web-1","port":8000,"wait_s":45}"#),
];

/// Values of required arguments by name.
const VALUES: &[(&str, &str)] = &[
    ("asset", "anvil-6-12-48"),
    ("build", "web"),
    ("checkpoint", "before-upgrade"),
    ("content", "print(6 * 7)\n"),
    ("drive", "data"),
    ("from", "/srv/app/main.py"),
    ("image", "debian"),
    ("name", "web-2"),
    ("path", "/srv/app/main.py"),
    ("provider", "alpine"),
    ("size", "20GiB"),
    ("template", "web"),
    ("to", "/srv/app/copy.py"),
    ("token", "helper"),
    ("vm", "web-1"),
];

/// The arguments of an example call.
fn example(info: &ToolInfo) -> Value {
    if let Some((_, text)) = EXAMPLES.iter().find(|(name, _)| *name == info.name) {
        return serde_json::from_str(text).unwrap_or_else(|e| panic!("{}: {e}", info.name));
    }
    let properties = info.input_schema["properties"].as_object().unwrap();
    // That each VM tool names its VM is clearer, also where labels would do.
    let is_shown = |name: &str| name == VM_ARGUMENT || required(&info.input_schema).contains(&name);
    let shown = properties.iter().filter(|(name, _)| is_shown(name));
    shown.map(|(name, schema)| (name.clone(), value(name, schema))).collect::<Map<_, _>>().into()
}

fn value(name: &str, schema: &Value) -> Value {
    if let Some((_, value)) = VALUES.iter().find(|(known, _)| *known == name) {
        return json!(value);
    }
    let first = schema["enum"].as_array().and_then(|words| words.first());
    match (first, schema["type"].as_str()) {
        (Some(word), _) => word.clone(),
        (None, Some("integer" | "number")) => json!(schema["minimum"].as_u64().unwrap_or(1).max(1)),
        (None, Some("boolean")) => json!(true),
        (None, Some("array")) => json!([value("", &schema["items"])]),
        (None, Some("object")) => json!({}),
        (None, _) if schema["pattern"].as_str().is_some_and(|pattern| pattern.contains("{12}")) => json!(ID),
        (None, _) => json!("text"),
    }
}

fn required(schema: &Map<String, Value>) -> Vec<&str> {
    schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// The type of a value, in a word or two.
fn kind(schema: &Value) -> String {
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<String> =
            words.iter().filter_map(Value::as_str).map(|word| format!("`{word}`")).collect();
        return words.join(", ");
    }
    match schema["type"].as_str() {
        Some("array") => match kind(&schema["items"]) {
            of if of.is_empty() => "list".into(),
            of => format!("list of {of}"),
        },
        Some(word) => word.to_owned(),
        None => String::new(),
    }
}

/// A text in a cell of a table: one line, and nothing that the table or HTML would take for its own.
fn cell(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    let parts = line.split('`').enumerate().map(|(at, part)| match at % 2 {
        0 => part.replace('<', "&lt;"),
        _ => part.to_owned(),
    });
    parts.collect::<Vec<_>>().join("`")
}

/// Members that results have alike, which are described once.
const ALIKE: &[&str] = &["error", "progress"];

/// The objects in a value, each with how its members are reached: `network`, in a list `edits[]`, under names of a caller's choice `files.*`.
fn objects<'a>(path: &str, schema: &'a Value) -> Vec<(String, &'a Map<String, Value>)> {
    let own = schema.as_object().filter(|object| object.contains_key("properties"));
    let mut found: Vec<_> = own.map(|object| (path.to_owned(), object)).into_iter().collect();
    for (more, inner) in [("[]", &schema["items"]), (".*", &schema["additionalProperties"])] {
        if inner.is_object() {
            found.extend(objects(&format!("{path}{more}"), inner));
        }
    }
    let forms = schema["anyOf"].as_array().into_iter().flatten();
    found.extend(forms.flat_map(|form| objects(path, form)));
    found
}

/// The rows of an object's members, and below each those of the objects in it. `path` is empty, or leads to the object and ends with a dot.
fn rows(page: &mut String, path: &str, schema: &Map<String, Value>, are_arguments: bool) {
    let required = required(schema);
    let is_required = |name: &str| required.contains(&name);
    let properties = schema.get("properties").and_then(Value::as_object);
    let mut all: Vec<_> = properties.into_iter().flatten().collect();
    all.sort_by_key(|(name, _)| !is_required(name));
    for (name, schema) in all {
        let what = cell(schema["description"].as_str().unwrap_or_default());
        let needed = if is_required(name) && are_arguments { "; required" } else { "" };
        writeln!(page, "| `{path}{name}` | {}{needed} | {what} |", kind(schema)).unwrap();
        let is_opened = are_arguments || (path.is_empty() && !ALIKE.contains(&name.as_str()));
        for (path, object) in
            is_opened.then(|| objects(&format!("{path}{name}"), schema)).into_iter().flatten()
        {
            rows(page, &format!("{path}."), object, are_arguments);
        }
    }
}

fn members(page: &mut String, heading: &str, schema: &Map<String, Value>) {
    let has_members = schema.get("properties").and_then(Value::as_object).is_some_and(|all| !all.is_empty());
    if has_members {
        writeln!(page, "\n| {heading} | | |\n|---|---|---|").unwrap();
        rows(page, "", schema, heading == "argument");
    }
}

fn effect(info: &ToolInfo) -> &'static str {
    match info.effect {
        Effect::ReadOnly => "changes nothing",
        Effect::Additive { idempotent: true } => "only adds, and a repeated call adds nothing more",
        Effect::Additive { idempotent: false } => "only adds",
        Effect::Destructive { idempotent: true } => {
            "may overwrite or end something; a repeated call does nothing more"
        }
        Effect::Destructive { idempotent: false } => "may overwrite or end something",
    }
}

fn page() -> String {
    let mut page = HEAD.to_owned();
    for (heading, list) in
        [("Tools of the host", tools::host()), ("Tools inside a VM", tools::guest_on_host())]
    {
        writeln!(page, "\n## {heading}").unwrap();
        for info in &list {
            let (scope, set) = (scope_of(&info.name), Toolset::with(info));
            writeln!(page, "\n### `{}`\n\n{}\n", info.name, cell(&info.description)).unwrap();
            writeln!(page, "Scope `{scope}`, set `{set}`; {}.\n", effect(info)).unwrap();
            let (name, arguments) = (&info.name, example(info));
            writeln!(page, "```json\n{{\"name\":\"{name}\",\"arguments\":{arguments}}}\n```").unwrap();
            members(&mut page, "argument", &info.input_schema);
            if let Some(output) = &info.output_schema {
                members(&mut page, "result", output);
            }
        }
    }
    page.push_str(FOOT);
    page
}

#[test]
fn the_page_of_tools_is_what_the_code_says() {
    page::check("tools.md", "--test reference", &page());
}

#[test]
fn members_of_members_are_listed() {
    let rows = |heading: &str, schema: Value| {
        let mut page = String::new();
        members(&mut page, heading, schema.as_object().unwrap());
        let names = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
        names.map(|(name, rest)| (name.to_owned(), rest.contains("required"))).collect::<Vec<_>>()
    };
    let inner = json!({ "type": "object", "properties": { "b": { "type": "string" } }, "required": ["b"] });
    let outer = json!({ "type": "object", "properties": { "a": inner } });
    let list = json!({ "properties": { "error": inner, "l": { "type": "array", "items": outer } } });
    let shown = |names: [(&str, bool); 5]| names.map(|(name, needed)| (name.to_owned(), needed)).to_vec();
    let to_the_end = [("error", false), ("error.b", true), ("l", false), ("l[].a", false), ("l[].a.b", true)];
    assert_eq!(rows("argument", list.clone()), shown(to_the_end));
    let names: Vec<String> = rows("result", list).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["error", "l", "l[].a"]);
    let form = json!({ "anyOf": [{ "type": "string" }, inner] });
    let map = json!({ "properties": { "m": { "type": "object", "additionalProperties": form } } });
    let names: Vec<String> = rows("argument", map).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["m", "m.*.b"]);
}

#[test]
fn every_example_is_a_call_that_its_tool_takes() {
    fn check<T: Tool>(name: &str, mut arguments: Value, is_of_guest: bool) {
        if let Some(object) = arguments.as_object_mut().filter(|_| is_of_guest) {
            assert!(object.remove(VM_ARGUMENT).is_some(), "{name}");
        }
        let decoded = serde_json::from_value::<T::Params>(arguments.clone());
        assert!(decoded.is_ok(), "{name} {arguments}: {}", decoded.err().unwrap());
    }
    let host = tools::host();
    let guest = tools::guest_on_host();
    let find = |list: &[ToolInfo], name: &str| example(list.iter().find(|info| info.name == name).unwrap());
    macro_rules! check_host {
        ($($tool:path => $method:ident,)*) => {
            $({
                let name = <$tool as Tool>::NAME;
                check::<$tool>(name, find(&host, name), false);
            })*
        };
    }
    macro_rules! check_guest {
        ($($tool:path => $method:ident,)*) => {
            $({
                let name = format!("{GUEST_PREFIX}{}", <$tool as Tool>::NAME);
                check::<$tool>(&name, find(&guest, &name), true);
            })*
        };
    }
    for_each_host_tool!(check_host);
    for_each_guest_tool!(check_guest);
    for (name, _) in EXAMPLES {
        assert!(host.iter().chain(&guest).any(|info| info.name == *name), "there is no tool {name}");
    }
}
