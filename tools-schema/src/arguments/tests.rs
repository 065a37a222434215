use serde_json::json;

use super::*;
use crate::tools::asset::AssetDownload;
use crate::tools::command::{CommandInput, CommandOutput, CommandSignal, RunCommand};
use crate::tools::drive::DriveResize;
use crate::tools::file::{FileEdit, FileWrite};
use crate::tools::http::HttpRequest;
use crate::tools::template::{TemplateCreate, TemplateUpdate};
use crate::tools::vm::{VmCreate, VmInspect, VmPublish, VmRename, VmStop, VmUnpublish, VmWait};

fn map(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { panic!("{value} is no object") };
    map
}

fn refused<T: Tool>(arguments: Value) -> String {
    let error = Takes::of::<T>().decode::<T>(map(arguments)).err().expect("it is refused");
    assert_eq!(error.code, crate::ErrorCode::InvalidArgument);
    let hint = error.hint.expect("it says what the tool takes");
    assert!(hint.starts_with(&format!("{} takes: ", T::NAME)), "{hint}");
    error.message
}

#[test]
fn what_can_mean_only_one_thing_is_taken() {
    let params = Takes::of::<VmCreate>().decode::<VmCreate>(map(json!({
        "name": "web-1", "vcpus": 2.0, "wait_s": "5", "start": "False", "memory": 536870912, "driver": "QEMU",
        "env": "{\"PORT\": 80, \"DEBUG\": true}", "tags": null, "files": [], "from": "", "disk": null,
    })));
    let params = params.unwrap();
    assert_eq!((params.vcpus, params.wait_s, params.start), (Some(2), Some(5), Some(false)));
    assert_eq!(params.memory.unwrap().as_mib(), 512);
    assert_eq!(
        params.env.into_iter().collect::<Vec<_>>(),
        [("DEBUG".to_owned(), "true".to_owned()), ("PORT".to_owned(), "80".to_owned())]
    );
    assert!(params.tags.is_empty() && params.files.is_empty());
    assert_eq!((params.from, params.disk), (None, None));

    let params = Takes::of::<RunCommand>().decode::<RunCommand>(map(json!({
        "argv": "[\"sleep\", 5]", "user": 1000, "command": "", "timeout_s": "7.0", "stdin_encoding": "Base64",
    })));
    let params = params.unwrap();
    assert_eq!(params.argv.unwrap(), ["sleep", "5"]);
    assert_eq!((params.user.as_deref(), params.command, params.timeout_s), (Some("1000"), None, Some(7.0)));
}

#[test]
fn what_is_empty_and_needed_is_kept() {
    let params =
        Takes::of::<FileWrite>().decode::<FileWrite>(map(json!({"path": "/x", "content": ""}))).unwrap();
    assert_eq!(params.content, "");
    let network = |network: Value| {
        Takes::of::<VmCreate>()
            .decode::<VmCreate>(map(json!({ "network": network })))
            .unwrap()
            .network
            .unwrap()
    };
    // A word stands for the one member that has it as a value.
    assert_eq!(network(json!("None")), network(json!({"mode": "none"})));
    assert_eq!(network(json!("open")), network(json!({"preset": "open"})));
    assert_eq!(network(json!({"allow": []})).allow, Some(Vec::new()));
    // An empty list of packages differs from a missing one: it removes the earlier packages.
    let update = |packages: Value| {
        let arguments = map(json!({"template": "web", "packages": packages, "remove_overlays": []}));
        Takes::of::<TemplateUpdate>().decode::<TemplateUpdate>(arguments).unwrap().packages
    };
    assert_eq!((update(json!([])), update(Value::Null)), (Some(Vec::new()), None));
}

#[test]
fn what_is_refused_is_named_with_what_it_must_be() {
    for (said, arguments) in [
        ("vcpus: must be a whole number from 1 to 32, got \"two\"", json!({"vcpus": "two"})),
        ("vcpus: must be a whole number from 1 to 32, got 1.5", json!({"vcpus": 1.5})),
        ("wait_s: must be a whole number from 0 to 45, got -1", json!({"wait_s": -1})),
        ("driver: must be one of auto, firecracker, qemu, got \"xen\"", json!({"driver": "xen"})),
        (
            "network: must be an object, or one of none, proxy, nat, internet, open, packages, got \"bridge\"",
            json!({"network": "bridge"}),
        ),
        ("network.mode: must be one of none, proxy, nat, got \"lan\"", json!({"network": {"mode": "lan"}})),
        ("network: `Web 1` is not a name", json!({"network": {"groups": ["Web 1"]}})),
        ("network: `a b` is not a name, an address or a CIDR", json!({"network": {"allow": ["a b"]}})),
        ("start: must be true or false, got 2", json!({"start": 2})),
        ("env.A: must be a string, got [1]", json!({"env": {"A": [1]}})),
        ("env: must be an object of strings such as {\"a\": \"b\"}, got \"A=1\"", json!({"env": "A=1"})),
        ("from: must be a string, got 3.1", json!({"from": 3.10})),
        ("memory: must be a string such as \"512MiB\" or \"10G\", got 1.5", json!({"memory": 1.5})),
        ("memory: `1.5G` is not a size", json!({"memory": "1.5G"})),
        ("name: `Web 1` is not a name", json!({"vcpus": 1, "memory": "1G", "name": "Web 1"})),
        ("name: must be a string, got 7", json!({"name": 7})),
        ("unknown argument `image`; use `from`", json!({"image": "debian"})),
        ("unknown argument `cpus`; use `vcpus`", json!({"cpus": 2})),
        ("unknown argument `waitS`; use `wait_s`", json!({"waitS": 2})),
        ("unknown argument `hostnme`; use `hostname`", json!({"hostnme": "x"})),
        ("unknown argument `quux`", json!({"quux": 1})),
    ] {
        let message = refused::<VmCreate>(arguments);
        assert!(message.starts_with(said), "{message}");
    }
    assert_eq!(refused::<VmInspect>(json!({})), "missing argument `vm` (the VM: its name or id)");
    assert_eq!(refused::<VmInspect>(json!({"vm": null})), "missing argument `vm` (the VM: its name or id)");
    let message = refused::<DriveResize>(json!({"drive": "data", "size": "lots"}));
    assert!(message.starts_with("size: `lots` is not a size"), "{message}");
    let long = refused::<VmCreate>(json!({"vcpus": "x".repeat(1000)}));
    assert!(long.ends_with("xxx...") && long.len() < 140, "{long}");
    let message = refused::<TemplateCreate>(
        json!({"name": "a", "source": "debian", "overlays": {"/etc/motd": {"content": 1, "mode": 644}}}),
    );
    assert_eq!(message, "overlays./etc/motd.mode: must be a string, got 644");
}

#[test]
fn a_command_is_named_as_in_results_too() {
    let id = "aaaaaaaaaaaac";
    let given = || map(json!({ "command_id": id }));
    assert_eq!(Takes::of::<CommandOutput>().decode::<CommandOutput>(given()).unwrap().id.to_string(), id);
    assert_eq!(Takes::of::<CommandInput>().decode::<CommandInput>(given()).unwrap().id.to_string(), id);
    assert_eq!(Takes::of::<CommandSignal>().decode::<CommandSignal>(given()).unwrap().id.to_string(), id);
    let both = refused::<CommandOutput>(json!({ "id": id, "command_id": id }));
    assert_eq!(both, "unknown argument `command_id`; use `id`");
    // An argument of that name stays what it is.
    let arguments = map(json!({ "vm": "web-1", "command_id": id }));
    let waited = Takes::of::<VmWait>().decode::<VmWait>(arguments).unwrap();
    assert_eq!(waited.command_id.unwrap().to_string(), id);
    assert_eq!(refused::<CommandOutput>(json!({})), "missing argument `id` (the `command_id`)");
}

#[test]
fn names_that_are_often_mistaken_are_corrected() {
    for (message, said) in [
        (refused::<VmPublish>(json!({ "vm": "web-1", "port": 80 })), "port`; use `guest_port`"),
        (refused::<VmUnpublish>(json!({ "vm": "web-1", "port": 80 })), "port`; use `guest_port`"),
        (refused::<HttpRequest>(json!({ "path": "/" })), "path`; use `url`"),
        (refused::<VmWait>(json!({ "vm": "web-1", "timeout_s": 5 })), "timeout_s`; use `wait_s`"),
        (refused::<VmRename>(json!({ "vm": "web-1", "new_name": "web-2" })), "new_name`; use `name`"),
        (refused::<CommandOutput>(json!({ "cmd_id": 7 })), "cmd_id`; use `id`"),
        (refused::<FileEdit>(json!({ "new_string": "x" })), "new_string`; `new` is a member of `edits`"),
        (refused::<FileEdit>(json!({ "path": "/x" })), "path`; `path` is a member of `edits`"),
        (refused::<VmCreate>(json!({ "allow": ["a.example"] })), "allow`; `allow` is a member of `network`"),
    ] {
        assert_eq!(message, format!("unknown argument `{said}"));
    }
}

#[test]
fn commands_and_programs_are_told_apart() {
    for (said, arguments) in [
        (
            "command: must be a string, got [\"ls\",\"-l\"]; give a program with its arguments as `argv`",
            json!({"command": ["ls", "-l"]}),
        ),
        (
            "argv: must be an array of strings such as [\"a\", \"b\"], got \"ls -l\"; give a line for the shell as `command`",
            json!({"argv": "ls -l"}),
        ),
        ("argv[1]: must be a string, got null", json!({"argv": ["ls", null]})),
        ("unknown argument `cmd`; use `command`", json!({"cmd": "ls"})),
        ("unknown argument `timeout`; use `timeout_s`", json!({"timeout": 5})),
        (
            "unknown argument `tty`: this tool gives no terminal; command_start does, with `tty`",
            json!({"command": "top", "tty": true}),
        ),
        ("unknown argument `vm`: this endpoint is the inside of one VM", json!({"vm": "web-1"})),
    ] {
        assert_eq!(refused::<RunCommand>(arguments), said);
    }
}

#[test]
fn a_tool_says_what_it_takes_under_the_name_that_it_has_there() {
    let takes = Takes::of::<FileWrite>();
    assert_eq!(
        takes.to_string(),
        "file_write takes: path, content, append, commit, create_parents, encoding, mode, offset, upload_id, user"
    );
    let takes = Takes::from(crate::tool::guest_info::<FileWrite>());
    assert_eq!(
        takes.to_string(),
        "guest_file_write takes: vm, path, content, append, commit, create_parents, encoding, mode, offset, upload_id, \
         user"
    );
}

#[test]
fn members_of_arguments_are_listed_with_them() {
    assert_eq!(
        Takes::from(crate::tool::guest_info::<FileEdit>()).to_string(),
        "guest_file_edit takes: vm, edits (each: path, old, new, expect_count, expect_sha256, replace_all), dry_run, user"
    );
    let create = Takes::of::<VmCreate>().to_string();
    assert!(create.contains(", network (allow, bandwidth, deny, groups, mode, preset)"), "{create}");
    assert!(create.contains(", files (each: a string, or content, "), "{create}");
    assert!(create.contains(", env, "), "{create}");
    let template = Takes::of::<TemplateCreate>().to_string();
    assert!(template.contains(", services (each: argv, command, "), "{template}");
}

#[test]
fn an_empty_condition_is_refused() {
    let said = "must not be empty: leave it out to do without the check";
    let stop = json!({ "vm": "web-1", "if_boot_id": "" });
    assert_eq!(refused::<VmStop>(stop), format!("if_boot_id: {said}"));
    let download = json!({ "kind": "kernel", "from": "https://example.org/vmlinux", "sha256": "" });
    assert_eq!(refused::<AssetDownload>(download), format!("sha256: {said}"));
    for guard in ["expect_sha256", "expect_count"] {
        let edit = json!({ "edits": [{ "path": "/x", "old": "a", "new": "b", guard: "" }] });
        assert_eq!(refused::<FileEdit>(edit), format!("edits[0].{guard}: {said}"));
    }
    // What is not there at all is no condition.
    let stop = map(json!({ "vm": "web-1", "if_boot_id": null, "force": "" }));
    assert_eq!(Takes::of::<VmStop>().decode::<VmStop>(stop).unwrap().if_boot_id, None);
}
