//! Checks every request against Firecracker's OpenAPI description. The file is not in this repository: without it, the tests print a
//! message and check nothing.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::tests::all;

fn description() -> Option<Value> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/firecracker.yaml");
    let path = std::env::var_os("NEXUS_FIRECRACKER_OPENAPI").map_or(beside, PathBuf::from);
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(serde_yaml_ng::from_str(&text).unwrap()),
        Err(error) => {
            eprintln!(
                "SKIPPED: requests are not checked against Firecracker's OpenAPI file: cannot read {} ({error}); \
                set NEXUS_FIRECRACKER_OPENAPI to its path",
                path.display()
            );
            None
        }
    }
}

/// Returns the schema of a request's body, if the description has the request.
fn body_schema<'a>(api: &'a Value, method: &str, path: &str) -> Option<&'a Value> {
    let fits = |template: &str| {
        let (template, path): (Vec<&str>, Vec<&str>) =
            (template.split('/').collect(), path.split('/').collect());
        template.len() == path.len() && template.iter().zip(&path).all(|(t, p)| t == p || t.starts_with('{'))
    };
    let (_, operations) = api["paths"].as_object()?.iter().find(|(template, _)| fits(template))?;
    let parameters = operations.get(method.to_lowercase())?["parameters"].as_array()?;
    parameters.iter().find(|parameter| parameter["in"] == "body").map(|parameter| &parameter["schema"])
}

/// Adds to `wrong` what a value has that its schema does not allow. Supports the part of OpenAPI 2.0 that the description uses.
fn check(api: &Value, schema: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.strip_prefix("#/definitions/").unwrap();
        return check(api, &api["definitions"][name], value, at, wrong);
    }
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
    if let (Some(number), minimum, maximum) = (value.as_i64(), &schema["minimum"], &schema["maximum"])
        && (minimum.as_i64().is_some_and(|min| number < min)
            || maximum.as_i64().is_some_and(|max| number > max))
    {
        wrong.push(format!("{at}: {number} is out of range"));
    }
    let Some(fields) = value.as_object() else { return };
    for required in schema["required"].as_array().into_iter().flatten() {
        if !fields.contains_key(required.as_str().unwrap()) {
            wrong.push(format!("{at}: {required} is missing"));
        }
    }
    for (name, value) in fields {
        match schema["properties"].get(name) {
            Some(property) => check(api, property, value, &format!("{at}.{name}"), wrong),
            None => wrong.push(format!("{at}: there is no {name}")),
        }
    }
}

#[test]
fn every_request_is_in_the_description() {
    let Some(api) = description() else { return };
    let mut wrong = Vec::new();
    for request in all() {
        let at = format!("{} {}", request.method, request.path);
        match body_schema(&api, request.method, &request.path) {
            Some(schema) => check(&api, schema, &request.body, &at, &mut wrong),
            None => wrong.push(format!("{at}: there is no such request")),
        }
    }
    // The only GET request.
    if !api["paths"][super::VERSION]["get"].is_object() {
        wrong.push(format!("GET {}: there is no such request", super::VERSION));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_wrong_is_found() {
    let Some(api) = description() else { return };
    for (method, path, body, finding) in [
        ("PUT", "/machine-config", serde_json::json!({ "vcpu_count": 1 }), "\"mem_size_mib\" is missing"),
        ("PUT", "/actions", serde_json::json!({ "action_type": "Reboot" }), "is none of"),
        ("PUT", "/vsock", serde_json::json!({ "guest_cid": 2, "uds_path": "v" }), "out of range"),
        ("PUT", "/entropy", serde_json::json!({ "no_such_field": 1 }), "there is no no_such_field"),
        ("PUT", "/drives/x", serde_json::json!({ "drive_id": 1, "is_root_device": true }), "not of type"),
    ] {
        let mut wrong = Vec::new();
        check(&api, body_schema(&api, method, path).unwrap(), &body, "", &mut wrong);
        assert!(wrong.iter().any(|w| w.contains(finding)), "{finding}: {wrong:?}");
    }
    assert!(body_schema(&api, "PUT", "/no/such").is_none());
}
