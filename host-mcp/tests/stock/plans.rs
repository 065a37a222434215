//! Dry runs, which say what would be done and do nothing; and drives from all that images are made of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::common::until;
use crate::place::{Client, Place};

/// What a plan does, a word for each step and thing.
fn steps(plan: &Value) -> Vec<String> {
    let word = |step: &Value, key: &str| step[key].as_str().unwrap().to_owned();
    let steps = plan["steps"].as_array().unwrap();
    steps.iter().map(|step| format!("{} {}", word(step, "action"), word(step, "what"))).collect()
}

/// All that clients can see, and all files but the database's.
async fn everything(client: &mut Client, place: &Place) -> (Vec<Value>, BTreeMap<PathBuf, SystemTime>) {
    let mut seen = Vec::new();
    for (tool, rows) in [
        ("op_list", "ops"),
        ("vm_list", "vms"),
        ("image_list", "images"),
        ("drive_list", "drives"),
        ("build_list", "builds"),
        ("template_list", "templates"),
    ] {
        seen.push(client.must(tool, json!({})).await[rows].clone());
    }
    seen.push(client.must("asset_list", json!({ "available": false })).await["assets"].clone());
    // A drive that was copied is put on the disk in the background, and its mark goes then.
    until("all drives are on the disk", || !marked(place)).await;
    let mut files = BTreeMap::new();
    let mut queue = vec![place.state.clone()];
    while let Some(directory) = queue.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            if path.file_name().unwrap().to_string_lossy().starts_with("nexus.db") {
                continue;
            }
            if meta.is_dir() {
                queue.push(path.clone());
            }
            files.insert(path, meta.modified().unwrap());
        }
    }
    (seen, files)
}

/// Whether a drive has a mark beside its disk.
fn marked(place: &Place) -> bool {
    let drives = place.names("drives").into_iter();
    drives.flat_map(|drive| place.names(&format!("drives/{drive}"))).any(|name| name.starts_with("unsynced-"))
}

/// The plan of a call, which changes nothing.
async fn plan(client: &mut Client, place: &Place, tool: &str, mut arguments: Value) -> Value {
    let before = everything(client, place).await;
    arguments["dry_run"] = true.into();
    let mut reply = client.must(tool, arguments).await;
    assert_eq!(everything(client, place).await, before, "{tool} changed something: {reply}");
    assert_eq!(reply.as_object().unwrap().len(), 1, "there is no operation: {reply}");
    assert!(reply["plan"]["free_bytes"].as_u64().unwrap() > 0, "{reply}");
    reply["plan"].take()
}

#[tokio::test]
async fn a_dry_run_of_a_vm_says_what_would_be_made_and_makes_nothing() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let wanted = json!({ "name": "web", "from": place.source(), "disk": "256MiB" });
    let first = plan(&mut client, &place, "vm_create", wanted.clone()).await;
    assert_eq!((&first["makes"], &first["name"]), (&json!("vm"), &json!("web")));
    assert_eq!(first["driver"]["name"], "process", "{first}");
    assert_eq!(steps(&first), ["build image", "clone drive", "start vm"]);
    assert_eq!(
        (&first["steps"][0]["source"], &first["steps"][1]["size"]),
        (&json!(place.source()), &json!("256MiB"))
    );
    assert_eq!(first["download_bytes"], 0);

    // The image that was foreseen is the one that is made, and found the next time.
    let vm = client.finished("vm_create", wanted.clone()).await;
    let made = client.must("image_inspect", json!({ "image": vm["image"]["name"] })).await;
    assert_eq!(made["name"], first["steps"][0]["name"], "{first}");
    let failure =
        client.fails("vm_create", json!({ "name": "web", "from": place.source(), "dry_run": true })).await;
    assert_eq!(failure.0, "name_taken", "{}", failure.1);
    let again =
        plan(&mut client, &place, "vm_create", json!({ "from": place.source(), "start": false })).await;
    assert_eq!(steps(&again), ["use image", "clone drive"]);
    assert_eq!(
        (&again["steps"][0]["name"], &again["steps"][0]["bytes"]),
        (&made["name"], &made["used_bytes"])
    );
    assert_eq!((&again["name"], &again["steps"][1]["size"]), (&Value::Null, &json!("8GiB")));

    // What would be refused is refused.
    for (arguments, code) in [
        (json!({ "from": "image:nowhere" }), "image_not_found"),
        (json!({ "from": place.source(), "vcpus": 1000 }), "invalid_argument"),
        (json!({ "from": place.source(), "disk": "16MiB" }), "invalid_argument"),
    ] {
        let mut arguments = arguments;
        arguments["dry_run"] = true.into();
        let failure = client.fails("vm_create", arguments.clone()).await;
        assert_eq!(failure.0, code, "{arguments}: {}", failure.1);
    }
}

#[tokio::test]
async fn an_image_of_an_image_has_a_name_of_its_own() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    client.finished("image_create", json!({ "from": place.source(), "name": "first" })).await;
    let again = json!({ "from": "image:first" });
    let foreseen = plan(&mut client, &place, "image_create", again.clone()).await;
    assert_eq!(foreseen["name"], "copy-of-first", "{foreseen}");
    let made = client.finished("image_create", again.clone()).await;
    assert_eq!(made["name"], "copy-of-first", "{made}");
    let failure = client.fails("image_create", again).await;
    assert_eq!(failure.0, "name_taken", "{}", failure.1);
    let by_id = json!({ "from": format!("image:{}", made["id"].as_str().unwrap()) });
    let of_copy = client.finished("image_create", by_id).await;
    assert_eq!(of_copy["name"], "copy-of-copy-of-first", "{of_copy}");
}

#[tokio::test]
async fn a_dry_run_of_an_image_knows_what_was_built_before() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let overlays = json!({ "/etc/motd": { "content": "hello\n" } });
    client
        .must("template_create", json!({ "name": "web", "source": place.source(), "overlays": overlays }))
        .await;
    let of_template = json!({ "from": "template:web" });
    let first = plan(&mut client, &place, "image_create", of_template.clone()).await;
    assert_eq!(
        (steps(&first), &first["steps"][0]["source"]),
        (vec!["build image".to_owned()], &json!("template:web@1"))
    );
    let built = client.finished("image_create", of_template.clone()).await;
    let again = plan(&mut client, &place, "image_create", of_template.clone()).await;
    assert_eq!((steps(&again), &again["name"]), (vec!["use image".to_owned()], &built["name"]));
    // Other inputs make another image.
    std::fs::write(place.root().join("data/new"), "new").unwrap();
    assert_eq!(steps(&plan(&mut client, &place, "image_create", of_template).await), ["build image"]);
    std::fs::remove_file(place.root().join("data/new")).unwrap();

    // A template of an image.
    client
        .must(
            "template_create",
            json!({ "name": "upon", "source": format!("image:{}", built["id"].as_str().unwrap()) }),
        )
        .await;
    let upon =
        plan(&mut client, &place, "image_create", json!({ "from": "template:upon", "name": "own" })).await;
    assert_eq!(steps(&upon), ["use image", "build image", "build image"]);
    assert_eq!(upon["name"], "own");

    let named =
        plan(&mut client, &place, "image_create", json!({ "from": place.source(), "name": "mine" })).await;
    assert_eq!((steps(&named), &named["steps"][0]["name"]), (vec!["build image".to_owned()], &json!("mine")));
    client.finished("image_create", json!({ "from": place.source(), "name": "mine" })).await;
    let taken =
        client.fails("image_create", json!({ "from": "busybox", "name": "mine", "dry_run": true })).await;
    assert_eq!(taken.0, "name_taken", "{}", taken.1);
    // How large its packages are is known afterwards.
    let built_in = plan(&mut client, &place, "image_create", json!({ "from": "debian" })).await;
    assert_eq!(
        (steps(&built_in), &built_in["name"]),
        (vec!["download packages".to_owned(), "build image".to_owned()], &json!("debian"))
    );
    assert_eq!((&built_in["steps"][0]["bytes"], &built_in["download_bytes"]), (&json!(null), &json!(0)));
    // As an image that there is not yet it has the same name.
    let as_image = plan(&mut client, &place, "image_create", json!({ "from": "image:debian" })).await;
    assert_eq!(as_image["name"], "debian", "{as_image}");
    client
        .must("template_create", json!({ "name": "more", "source": "debian", "packages": ["hello"] }))
        .await;
    let more = plan(&mut client, &place, "image_create", json!({ "from": "template:more" })).await;
    assert_eq!(steps(&more), ["download packages", "build image"]);
}

#[tokio::test]
async fn drives_are_made_from_all_that_vms_and_images_are_made_from() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("template_create", json!({ "name": "web", "source": place.source() })).await;
    let tar = place.directory.path().join("root.tar");
    let mut builder = tar::Builder::new(std::fs::File::create(&tar).unwrap());
    builder.append_dir_all(".", place.root()).unwrap();
    builder.finish().unwrap();
    let file = format!("file:{}", tar.display());
    client.finished("asset_download", json!({ "kind": "rootfs", "from": file, "name": "base" })).await;
    for (name, from, planned) in [
        ("of-directory", place.source(), vec!["build image", "clone drive"]),
        ("of-template", "template:web".into(), vec!["build image", "clone drive"]),
        ("of-template-again", "template:web".into(), vec!["use image", "clone drive"]),
        ("of-archive", file, vec!["build image", "clone drive"]),
        ("of-rootfs", "rootfs:base".into(), vec!["use rootfs", "build image", "clone drive"]),
        ("of-drive", "drive:of-rootfs".into(), vec!["use drive", "clone drive"]),
    ] {
        let mut wanted = json!({ "name": name, "from": from });
        if name != "of-drive" {
            wanted["size"] = "128MiB".into();
        }
        let foreseen = plan(&mut client, &place, "drive_create", wanted.clone()).await;
        assert_eq!(
            (steps(&foreseen), &foreseen["makes"]),
            (planned.iter().map(|s| (*s).to_owned()).collect(), &json!("drive"))
        );
        let drive = client.finished("drive_create", wanted).await;
        assert_eq!((&drive["name"], &drive["size"]), (&json!(name), &json!("128MiB")), "{from}");
        assert_eq!(foreseen["steps"].as_array().unwrap().last().unwrap()["size"], drive["size"]);
        assert_eq!(release(drive["path"].as_str().unwrap()), "ID=trial\nVERSION_ID=1\n", "{from}");
    }
    let empty = plan(&mut client, &place, "drive_create", json!({ "name": "data" })).await;
    assert_eq!(
        (steps(&empty), &empty["steps"][0]["size"]),
        (vec!["format drive".to_owned()], &json!("8GiB"))
    );
    let small = json!({ "from": "drive:of-drive", "size": "64MiB", "dry_run": true });
    assert_eq!(client.fails("drive_create", small).await.0, "invalid_argument");
    // A VM starts from one.
    let vm = json!({ "name": "box", "from": place.source(), "start": false });
    client.finished("vm_create", vm).await;
    for drive in ["of-directory", "of-template", "of-template-again", "of-archive", "of-drive", "of-rootfs"] {
        client.must("drive_delete", json!({ "drive": drive })).await;
    }
}

/// What a filesystem says it is of.
fn release(disk: &str) -> String {
    let output = std::process::Command::new("debugfs")
        .args(["-R", "cat /etc/os-release"])
        .arg(Path::new(disk))
        .output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}
