//! Every tool as it is published: a reviewed snapshot file each, and the rules that all of them follow.
#![allow(missing_docs)]

use std::collections::BTreeSet;

use nexus_schema::tool::{Effect, GUEST_PREFIX, ResultShape, ToolInfo, VM_ARGUMENT};
use nexus_schema::tools;
use serde_json::{Value, json};

fn effect(info: &ToolInfo) -> Value {
    match info.effect {
        Effect::ReadOnly => json!("read only"),
        Effect::Additive { idempotent } => json!({"additive": {"idempotent": idempotent}}),
        Effect::Destructive { idempotent } => json!({"destructive": {"idempotent": idempotent}}),
    }
}

fn shown(info: &ToolInfo) -> Value {
    json!({
        "name": info.name,
        "title": info.title,
        "description": info.description,
        "effect": effect(info),
        "open_world": info.open_world,
        "text_first": info.shape == ResultShape::Text,
        "input": info.input_schema,
        "output": info.output_schema,
    })
}

/// A snapshot a tool, so that a review sees what a client will see.
#[test]
fn published_tools_are_reviewed() {
    for info in tools::host().iter().chain(&tools::guest_on_host()) {
        insta::assert_json_snapshot!(info.name.clone(), shown(info));
    }
    for info in &tools::guest() {
        insta::assert_json_snapshot!(format!("scoped.{}", info.name), shown(info));
    }
}

fn all() -> Vec<ToolInfo> {
    [tools::host(), tools::guest_on_host(), tools::guest()].concat()
}

#[test]
fn names_are_portable_unique_and_sorted() {
    for list in [tools::host(), tools::guest(), tools::guest_on_host()] {
        let names: Vec<_> = list.iter().map(|info| info.name.as_str()).collect();
        assert!(names.is_sorted(), "{names:?}");
    }
    let mut seen = BTreeSet::new();
    for info in tools::host().into_iter().chain(tools::guest_on_host()) {
        assert!(seen.insert(info.name.clone()), "{} is there twice", info.name);
    }
    assert!(seen.len() <= 100, "{} tools are too many", seen.len());
    for info in all() {
        let mut letters = info.name.bytes();
        let good = letters.next().is_some_and(|b| b.is_ascii_lowercase())
            && letters.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
            && (3..=39).contains(&info.name.len());
        assert!(good, "{} is not a portable name", info.name);
    }
}

#[test]
fn descriptions_say_what_and_when_in_few_words() {
    for info in all() {
        let length = info.description.chars().count();
        assert!((40..2048).contains(&length), "{}: {length} characters", info.name);
        let first = info.description.split_inclusive([';', '.']).take(2).collect::<String>();
        let says_when = ["use it", "use this"].iter().any(|words| first.contains(words));
        assert!(says_when, "{}: the first sentence does not say when: {first}", info.name);
        assert!(!info.description.contains("  "), "{}: two blanks in a row", info.name);
        assert!(!info.title.is_empty());
    }
}

#[test]
fn guest_tools_say_that_they_work_in_the_vm() {
    for info in tools::guest().iter().chain(&tools::guest_on_host()) {
        assert!(info.title.contains("VM"), "{}: {}", info.name, info.title);
        assert!(info.description.contains("VM"), "{}", info.name);
    }
    for (own, published) in tools::guest().iter().zip(tools::guest_on_host()) {
        assert_eq!(published.name, format!("{GUEST_PREFIX}{}", own.name));
        assert_eq!(published.input_schema["required"][0], VM_ARGUMENT);
        assert!(
            own.input_schema["properties"].get(VM_ARGUMENT).is_none(),
            "{} has a vm of its own",
            own.name
        );
    }
}

/// Schemas that every client understands: objects, inline, no combinator at the top, nothing unknown accepted.
#[test]
fn schemas_are_portable() {
    fn walk(name: &str, value: &Value) {
        match value {
            Value::Object(object) => {
                for word in ["$ref", "$defs", "definitions", "$schema"] {
                    assert!(!object.contains_key(word), "{name}: {word}");
                }
                assert!(!object.get("type").is_some_and(Value::is_array), "{name}: a list of types");
                object.values().for_each(|value| walk(name, value));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(name, value)),
            _ => {}
        }
    }
    for info in all() {
        let schemas = std::iter::once(&info.input_schema).chain(&info.output_schema);
        for schema in schemas {
            assert_eq!(schema["type"], "object", "{}", info.name);
            for word in ["allOf", "anyOf", "oneOf", "not", "enum"] {
                assert!(!schema.contains_key(word), "{}: {word} at the top", info.name);
            }
            walk(&info.name, &Value::Object(schema.clone()));
        }
        assert_eq!(info.input_schema["additionalProperties"], false, "{}", info.name);
        let properties = info.input_schema["properties"].as_object().unwrap();
        for (name, property) in properties {
            assert!(property.get("description").is_some(), "{}: {name} is not described", info.name);
        }
        for required in info.input_schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            assert!(properties.contains_key(required.as_str().unwrap()), "{}: {required}", info.name);
        }
        assert_eq!(info.output_schema.is_some(), info.shape == ResultShape::Structured, "{}", info.name);
    }
}

#[test]
fn what_changes_a_vm_can_be_meant_for_one_boot() {
    // They read or write files of it, open a stream into it, or make other VMs.
    const OTHERS: [&str; 4] = ["guest_copy_in", "guest_copy_out", "guest_stream_open", "vm_fork"];
    for info in tools::host() {
        let properties = info.input_schema["properties"].as_object().unwrap();
        let changes = info.effect != Effect::ReadOnly && properties.contains_key(VM_ARGUMENT);
        if changes && !OTHERS.contains(&info.name.as_str()) {
            assert!(properties.contains_key("if_boot_id"), "{} changes whatever boot there is", info.name);
        }
    }
}

#[test]
fn annotations_are_honest() {
    for info in all() {
        let verb = info.name.rsplit('_').next().unwrap();
        let reads = [
            "list", "inspect", "log", "logs", "history", "read", "stat", "info", "get", "verify", "output",
            "search", "wait", "diff",
        ]
        .contains(&verb);
        assert_eq!(info.effect == Effect::ReadOnly, reads, "{}", info.name);
        if [
            "delete", "stop", "write", "command", "cancel", "remove", "move", "copy", "edit", "patch",
            "request", "restart", "rename",
        ]
        .contains(&verb)
        {
            assert!(matches!(info.effect, Effect::Destructive { .. }), "{}", info.name);
        }
    }
}

#[test]
fn creation_can_be_repeated_safely_and_waiting_is_bounded() {
    for info in all() {
        let properties = info.input_schema["properties"].as_object().unwrap();
        if let Some(wait) = properties.get("wait_s") {
            assert_eq!(wait["maximum"], 45, "{}: clients cut calls off at a minute", info.name);
        }
        if info.name.ends_with("_list") && !info.name.contains("file") && !info.name.contains("mcp") {
            assert_eq!(properties["limit"]["maximum"], 500, "{}", info.name);
            assert!(properties.contains_key("cursor"), "{}", info.name);
        }
    }
    for name in ["vm_create", "image_create", "drive_create"] {
        let create = tools::host().into_iter().find(|info| info.name == name).unwrap();
        assert_eq!(create.input_schema["properties"]["idempotency_key"]["maxLength"], 128, "{name}");
    }
    let create = tools::host().into_iter().find(|info| info.name == "vm_create").unwrap();
    assert!(create.input_schema.get("required").is_none(), "vm_create has defaults for everything");
}
