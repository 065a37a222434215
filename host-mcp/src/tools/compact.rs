//! Results as a model needs them: what a VM is called, its state and what to do next. Programs that want all of it use the set `all`, whose
//! tools have schemas of their results; `vm_inspect` says more of one VM in each set.

use nexus_schema::tools::vm::{NextStep, VmState};
use serde_json::{Map, Value, json};

/// What an operation says of the VM that it was about.
const OF_A_VM: [&str; 5] = ["id", "name", "state", "boot_id", "run"];
/// The length of a name that is repeated in what is next, in bytes. The id stands in for longer ones, so that the reply stays short.
const NAME_SHORT: usize = 20;
/// What of a VM concerns its host alone.
pub(super) const OF_THE_HOST: [&str; 5] = ["process", "console_log", "cid", "generation", "owner"];
/// What an operation that is over does not repeat.
const OF_THE_WAY: [&str; 4] = ["progress", "subject_id", "subject_name", "owner"];

/// Leaves out what no model needs.
pub(super) fn compact(value: &mut Value) {
    let Value::Object(object) = value else { return };
    if object.contains_key("op_id") && object.contains_key("done") {
        return operation(object);
    }
    if is_vm(object) {
        return details(object);
    }
    for (list, shorten) in [("ops", ended as fn(&mut Map<String, Value>)), ("vms", summary)] {
        for item in object.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Value::Object(item) = item {
                shorten(item);
            }
        }
    }
    if let Some(checks) = object.get_mut("doctor").and_then(|doctor| doctor.get_mut("checks")) {
        let Value::Array(checks) = checks else { return };
        checks.retain(|check| check["status"] != "ok");
    }
}

/// Whether these are the members of a VM, or those of its schema.
pub(super) fn is_vm(object: &Map<String, Value>) -> bool {
    object.contains_key("vcpus") && object.contains_key("drives")
}

fn operation(object: &mut Map<String, Value>) {
    let is_done = object.get("done") == Some(&Value::Bool(true));
    let mut next = None;
    if let Some(Value::Object(vm)) =
        object.get_mut("result").filter(|result| result.as_object().is_some_and(is_vm))
    {
        next = next_of(vm);
        let address = vm.get("network").and_then(|network| network.get("interface")?.get("ipv4").cloned());
        vm.retain(|key, _| OF_A_VM.contains(&&**key));
        vm.extend(address.map(|address| ("address".to_owned(), address)));
    }
    if is_done {
        object.retain(|key, _| !OF_THE_WAY.contains(&&**key));
    } else if let Some(op) = object.get("op_id").and_then(Value::as_str) {
        next = Some(format!("op_get {}", json!({ "op_id": op })));
    }
    object.extend(next.map(|next| ("next".to_owned(), next.into())));
}

/// What to call next, of a VM in its state; nothing for one that is deleted since its command has ended.
fn next_of(vm: &Map<String, Value>) -> Option<String> {
    let text = |key: &str| vm.get(key)?.as_str();
    let name = text("name").filter(|name| name.len() <= NAME_SHORT).or_else(|| text("id"))?;
    let state: VmState = vm.get("state")?.as_str()?.parse().ok()?;
    if vm.contains_key("run") {
        return None;
    }
    let NextStep { tool, force } = state.next();
    let mut arguments = json!({ "vm": name });
    if force {
        arguments["force"] = true.into();
    }
    if state == VmState::Ready {
        arguments["command"] = "...".into();
    }
    Some(format!("{tool} {arguments}"))
}

fn details(vm: &mut Map<String, Value>) {
    vm.retain(|key, _| !OF_THE_HOST.contains(&&**key));
    for drive in vm.get_mut("drives").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(drive) = drive {
            drive.remove("path");
        }
    }
}

fn ended(op: &mut Map<String, Value>) {
    op.remove("owner");
    if op.contains_key("ended_at") {
        op.retain(|key, _| !OF_THE_WAY.contains(&&**key) && key != "started_at" || key == "subject_name");
        if let Some(error) = op.get_mut("error") {
            *error = error["message"].take();
        }
    }
}

fn summary(vm: &mut Map<String, Value>) {
    vm.retain(|key, value| match &**key {
        "tags" => value.as_object().is_some_and(|tags| !tags.is_empty()),
        "protected" => *value == Value::Bool(true),
        "created_at" => false,
        _ => true,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compacted(mut value: Value) -> Value {
        compact(&mut value);
        value
    }

    fn vm(state: &str) -> Value {
        json!({
            "id": "kpukhbkw6qsnw", "name": "a-name-that-is-long", "state": state, "boot_id": "posjz2yvtl7te", "vcpus": 1,
            "drives": [{ "id": "d", "path": "/var/lib/nexus/drives/d/disk.ext4", "root": true }],
            "process": { "pid": 1 }, "cid": 4, "console_log": "/x", "generation": 7, "owner": "uid:0", "timings": {},
            "network": { "mode": "proxy" },
        })
    }

    #[test]
    fn what_a_vm_is_told_by_fits_in_300_bytes_and_says_what_is_next() {
        for (state, next) in [
            ("ready", r#"guest_run_command {"command":"...","vm":"a-name-that-is-long"}"#),
            ("stopped", r#"vm_start {"vm":"a-name-that-is-long"}"#),
            ("failed", r#"vm_start {"vm":"a-name-that-is-long"}"#),
            ("unreachable", r#"vm_restart {"force":true,"vm":"a-name-that-is-long"}"#),
        ] {
            let told = compacted(json!({
                "done": true, "op_id": "ots4vdu7ifkoc", "state": "succeeded", "progress": { "step": "booting" },
                "subject_id": "kpukhbkw6qsnw", "subject_name": "a-name-that-is-long", "result": vm(state),
            }));
            assert_eq!(told["next"], next);
            assert_eq!(told["result"].as_object().unwrap().len(), OF_A_VM.len() - 1, "{told}");
            assert!(told.to_string().len() <= 300, "{}: {told}", told.to_string().len());
        }
    }

    #[test]
    fn a_long_name_is_told_once_and_an_address_where_there_is_one() {
        let told = |vm: &Value| {
            compacted(json!({ "done": true, "op_id": "ots4vdu7ifkoc", "state": "succeeded", "result": vm }))
        };
        let mut vm = vm("ready");
        vm["network"]["interface"] = json!({ "mac": "52:54:00:00:00:01", "ipv4": "10.90.0.2", "tap": "nx0" });
        let short = told(&vm);
        assert_eq!(short["result"]["address"], "10.90.0.2", "{short}");
        assert!(short.to_string().len() <= 300, "{short}");
        vm["network"] = json!({ "mode": "proxy" });
        vm["name"] = "n".repeat(63).into();
        let long = told(&vm);
        assert_eq!(long["next"], r#"guest_run_command {"command":"...","vm":"kpukhbkw6qsnw"}"#);
        assert_eq!((&long["result"]["name"], long["result"].get("address")), (&vm["name"], None));
        assert!(long.to_string().len() <= 300, "{}: {long}", long.to_string().len());
    }

    #[test]
    fn every_state_has_a_next_step_that_the_default_set_takes() {
        let registry = crate::tools::Registry::new();
        let tools = registry.list(crate::host::View::Whole(crate::tools::Toolset::WORK));
        for state in VmState::ALL {
            let told = compacted(json!({
                "done": true, "op_id": "ots4vdu7ifkoc", "state": "succeeded", "result": vm(state.as_str()),
            }));
            let (name, arguments) = told["next"].as_str().unwrap().split_once(' ').unwrap();
            let arguments: Map<String, Value> = serde_json::from_str(arguments).unwrap();
            let tool = tools.iter().find(|tool| tool.name == name);
            let schema = &tool.unwrap_or_else(|| panic!("{state}: {name} is not offered")).input_schema;
            for needed in schema["required"].as_array().unwrap() {
                assert!(arguments.contains_key(needed.as_str().unwrap()), "{state}: {name} needs {needed}");
            }
            for given in arguments.keys() {
                assert!(schema["properties"].get(given).is_some(), "{state}: {name} takes no {given}");
            }
            assert!(told.to_string().len() <= 300, "{told}");
        }
    }

    #[test]
    fn a_run_is_told_with_its_output_and_no_next_step() {
        let mut vm = vm("stopped");
        vm["run"] = json!({ "status": 3, "stdout": "out\n", "stderr": "" });
        let told = compacted(json!({ "done": true, "op_id": "x", "state": "succeeded", "result": vm }));
        assert_eq!(told["result"]["run"]["status"], 3);
        assert_eq!(told.get("next"), None);
    }

    #[test]
    fn what_goes_on_says_how_to_follow_it_and_what_failed_says_why() {
        let going = compacted(
            json!({ "done": false, "op_id": "x", "state": "running", "progress": { "step": "booting" } }),
        );
        assert_eq!(going["next"], r#"op_get {"op_id":"x"}"#);
        assert_eq!(going["progress"]["step"], "booting");
        let failed = json!({ "done": true, "op_id": "x", "state": "failed", "error": { "code": "disk_full", "message": "m" } });
        assert_eq!(compacted(failed.clone()), failed);
        // What is no VM stays whole.
        let image = json!({ "done": true, "op_id": "x", "state": "succeeded", "result": { "id": "i", "name": "n", "size": 1 } });
        assert_eq!(compacted(image.clone()), image);
    }

    #[test]
    fn lists_and_details_have_nothing_of_the_host() {
        let details = compacted(vm("ready"));
        assert_eq!(details["network"]["mode"], "proxy");
        assert_eq!(details["drives"][0], json!({ "id": "d", "root": true }));
        assert!(OF_THE_HOST.iter().all(|key| details.get(key).is_none()), "{details}");

        let ops = compacted(json!({ "ops": [
            { "op_id": "a", "started_at": "s", "ended_at": "t", "owner": "o", "progress": {}, "subject_name": "n", "error": { "message": "why" } },
            { "op_id": "b", "owner": "o", "progress": { "step": "booting" } },
        ] }));
        assert_eq!(
            ops["ops"][0],
            json!({ "op_id": "a", "ended_at": "t", "subject_name": "n", "error": "why" })
        );
        assert_eq!(ops["ops"][1]["progress"]["step"], "booting");

        let vms = compacted(
            json!({ "vms": [{ "name": "a", "tags": {}, "protected": false }, { "name": "b", "tags": { "k": "v" }, "protected": true }] }),
        );
        assert_eq!(vms["vms"][0], json!({ "name": "a" }));
        assert_eq!(vms["vms"][1]["protected"], true);
        let checks = compacted(json!({ "doctor": { "checks": [{ "status": "ok" }, { "status": "warn" }] } }));
        assert_eq!(checks["doctor"]["checks"], json!([{ "status": "warn" }]));
    }
}
