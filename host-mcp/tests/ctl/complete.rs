//! What a shell is offered while a line is typed.

use std::process::Stdio;

use serde_json::json;

use crate::fake::{Fake, World, finish, gives};

/// The words that bash is offered for the last of a line.
fn offered(world: &World, line: &str) -> Vec<String> {
    let words: Vec<&str> = line.split(' ').collect();
    let mut command = world.command("--");
    command.args(&words).env("NEXUSCTL_COMPLETE", "bash").env("_CLAP_IFS", "\n");
    command.env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string());
    let run = finish(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{line}");
    run.text().lines().map(str::to_owned).collect()
}

#[test]
fn completion_knows_what_there_is() {
    let world = World::new();
    let vm = |name: &str| json!({ "id": "bbbbbbbbbbbbe", "name": name, "state": "ready" });
    let tools = [
        ("vm_list", gives(json!({ "vms": [vm("web-1"), vm("web-2"), vm("db")] }))),
        (
            "image_list",
            gives(
                json!({ "images": [{ "name": "debian", "source": "debian" }, { "name": "mine", "source": "file:/a" }] }),
            ),
        ),
        ("template_list", gives(json!({ "templates": [{ "name": "webapp", "source": "debian" }] }))),
        ("drive_list", gives(json!({ "drives": [{ "name": "data", "size": "1GiB" }] }))),
    ];
    let _fake = Fake::start(&world.runtime(), tools);
    for (line, words) in [
        ("nexusctl vm start w", &["web-1", "web-2"][..]),
        ("nexusctl stop web-1 d", &["db"]),
        ("nexusctl guest run w", &["web-1", "web-2"]),
        ("nexusctl logs -f d", &["db"]),
        ("nexusctl image inspect m", &["mine"]),
        ("nexusctl drive attach ", &["data"]),
        ("nexusctl drive attach data w", &["web-1", "web-2"]),
        ("nexusctl vm from-template ", &["webapp"]),
        ("nexusctl vm create --from m", &["mine"]),
        ("nexusctl vm create --from template:", &["template:", "template:webapp"]),
        ("nexusctl vm create --from oci", &["oci:", "oci-layout:"]),
        ("nexusctl run m", &["mine"]),
        ("nexusctl vm cre", &["create"]),
        ("nexusctl mcp --vm d", &["db"]),
    ] {
        let mut offered = offered(&world, line);
        offered.retain(|word| !word.starts_with('-'));
        offered.sort();
        let mut words: Vec<_> = words.to_vec();
        words.sort();
        assert_eq!(offered, words, "{line}");
    }
}

#[test]
fn without_a_daemon_the_verbs_are_still_known() {
    let world = World::new();
    assert_eq!(offered(&world, "nexusctl vm sto"), ["stop"]);
    assert!(offered(&world, "nexusctl vm stop w").is_empty());
    assert!(offered(&world, "nexusctl vm create --from deb").contains(&"debian".to_owned()));
}
