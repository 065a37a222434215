//! Checks every request against a description of those that are sent (`tests/fixtures/firecracker/requests.json`), and that description against
//! Firecracker's own. The latter is not in this repository: it is read where it is beside it, or where `NEXUS_FIRECRACKER_OPENAPI` says.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::tests::all;

const OURS: &str = include_str!("../../../../../tests/fixtures/firecracker/requests.json");

fn ours() -> Value {
    serde_json::from_str(OURS).unwrap()
}

/// Firecracker's description, if it is there. One that is named must be.
fn theirs() -> Option<Value> {
    let path = match std::env::var_os("NEXUS_FIRECRACKER_OPENAPI") {
        Some(named) => PathBuf::from(named),
        None => {
            let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/firecracker.yaml");
            Some(beside).filter(|path| path.exists())?
        }
    };
    Some(serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
}

fn fits(template: &str, path: &str) -> bool {
    let (template, path): (Vec<&str>, Vec<&str>) = (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len() && template.iter().zip(&path).all(|(t, p)| t == p || t.starts_with('{'))
}

/// Returns our schema of a request's body, if the description has the request.
fn our_schema<'a>(ours: &'a Value, method: &str, path: &str) -> Option<&'a Value> {
    let mut requests = ours["requests"].as_array().unwrap().iter();
    let is_it =
        |request: &&Value| request["method"] == method && fits(request["path"].as_str().unwrap(), path);
    requests.find(is_it).map(|request| &request["body"])
}

/// Adds to `wrong` what a value has that its schema does not allow.
fn check(schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
    let is_right = match schema["type"].as_str() {
        Some("object") => value.is_object(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        other => panic!("{at}: a schema of type {other:?} is not understood"),
    };
    if !is_right {
        wrong.push(format!("{at}: {value} is not of type {}", schema["type"]));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array().filter(|allowed| !allowed.contains(value)) {
        wrong.push(format!("{at}: {value} is none of {allowed:?}"));
    }
    if let Some(number) = value.as_i64()
        && (schema["minimum"].as_i64().is_some_and(|min| number < min)
            || schema["maximum"].as_i64().is_some_and(|max| number > max))
    {
        wrong.push(format!("{at}: {number} is out of range"));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        check(&schema["items"], item, &format!("{at}[{index}]"), wrong);
    }
    let Some(fields) = value.as_object() else { return };
    for required in schema["required"].as_array().into_iter().flatten() {
        if !fields.contains_key(required.as_str().unwrap()) {
            wrong.push(format!("{at}: {required} is missing"));
        }
    }
    for (name, value) in fields {
        match schema["properties"].get(name) {
            Some(property) => check(property, value, &format!("{at}.{name}"), wrong),
            None => wrong.push(format!("{at}: there is no {name}")),
        }
    }
}

/// Follows the references of a schema of Firecracker's.
fn resolved<'a>(theirs: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let name = reference.strip_prefix("#/definitions/").unwrap();
            resolved(theirs, &theirs["definitions"][name])
        }
        None => schema,
    }
}

/// Adds to `wrong` where a schema of ours says something else than Firecracker's. Ours may leave out fields that are not required.
fn compare(theirs: &Value, schema: &Value, ours: &Value, at: &str, wrong: &mut Vec<String>) {
    let schema = resolved(theirs, schema);
    let words = |schema: &Value, key: &str| {
        let mut words: Vec<String> =
            schema[key].as_array().into_iter().flatten().map(Value::to_string).collect();
        words.sort();
        words
    };
    for key in ["required", "enum"] {
        if words(schema, key) != words(ours, key) {
            wrong.push(format!("{at}: another {key}"));
        }
    }
    for key in ["type", "minimum", "maximum"] {
        if schema[key] != ours[key] {
            wrong.push(format!("{at}: another {key}"));
        }
    }
    if ours["type"] == "array" {
        compare(theirs, &schema["items"], &ours["items"], &format!("{at}[]"), wrong);
    }
    for (name, property) in ours["properties"].as_object().into_iter().flatten() {
        match schema["properties"].get(name) {
            Some(known) => compare(theirs, known, property, &format!("{at}.{name}"), wrong),
            None => wrong.push(format!("{at}: there is no {name}")),
        }
    }
}

#[test]
fn every_request_is_described() {
    let ours = ours();
    let mut wrong = Vec::new();
    let mut sent = std::collections::BTreeSet::new();
    for request in all() {
        let at = format!("{} {}", request.method, request.path);
        match our_schema(&ours, request.method, &request.path) {
            Some(schema) => check(schema, &request.body, &at, &mut wrong),
            None => wrong.push(format!("{at}: there is no such request")),
        }
        sent.insert(at);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(ours["get"], json!([super::VERSION]));
    // Nothing else is described: each of them is sent.
    for described in ours["requests"].as_array().unwrap() {
        let (method, path) = (described["method"].as_str().unwrap(), described["path"].as_str().unwrap());
        let is_sent = |at: &String| at.split_once(' ').is_some_and(|(m, p)| m == method && fits(path, p));
        assert!(sent.iter().any(is_sent), "{method} {path} is not sent");
    }
}

#[test]
fn what_is_wrong_is_found() {
    let ours = ours();
    for (method, path, body, finding) in [
        ("PUT", "/machine-config", json!({ "vcpu_count": 1 }), "\"mem_size_mib\" is missing"),
        ("PUT", "/actions", json!({ "action_type": "Reboot" }), "is none of"),
        ("PUT", "/vsock", json!({ "guest_cid": 2, "uds_path": "v" }), "out of range"),
        ("PUT", "/entropy", json!({ "no_such_field": 1 }), "there is no no_such_field"),
        ("PUT", "/drives/x", json!({ "drive_id": 1, "is_root_device": true }), "not of type"),
        ("PATCH", "/vm", json!({ "state": "Stopped" }), "is none of"),
        (
            "PUT",
            "/snapshot/load",
            json!({ "snapshot_path": "s", "network_overrides": [{ "iface_id": "net0" }] }),
            "\"host_dev_name\" is missing",
        ),
    ] {
        let mut wrong = Vec::new();
        check(our_schema(&ours, method, path).unwrap(), &body, "", &mut wrong);
        assert!(wrong.iter().any(|w| w.contains(finding)), "{finding}: {wrong:?}");
    }
    assert!(our_schema(&ours, "PUT", "/no/such").is_none());
}

#[test]
fn our_description_says_what_firecrackers_own_says() {
    let Some(theirs) = theirs() else { return };
    let ours = ours();
    let compare_all = |ours: &Value| {
        let mut wrong = Vec::new();
        for request in ours["requests"].as_array().unwrap() {
            let (method, path) = (request["method"].as_str().unwrap(), request["path"].as_str().unwrap());
            let at = format!("{method} {path}");
            let parameters = theirs["paths"][path][method.to_lowercase()]["parameters"].as_array();
            match parameters.into_iter().flatten().find(|parameter| parameter["in"] == "body") {
                Some(body) => compare(&theirs, &body["schema"], &request["body"], &at, &mut wrong),
                None => wrong.push(format!("{at}: there is no such request")),
            }
        }
        wrong
    };
    assert_eq!(compare_all(&ours), [""; 0]);
    assert_eq!(theirs["info"]["version"], ours["version"]);
    for path in ours["get"].as_array().unwrap() {
        assert!(theirs["paths"][path.as_str().unwrap()]["get"].is_object(), "{path}");
    }
    // A field that Firecracker does not know is found.
    let mut other = ours;
    other["requests"][0]["body"]["properties"]["cores"] = json!({ "type": "integer" });
    assert_eq!(compare_all(&other), ["PUT /machine-config: there is no cores"]);
}
