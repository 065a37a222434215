//! Machines made of OCI images.

use std::io::Write;
use std::process::{Command, Stdio};

use nexus_tests::client::{Client, stream};
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::registry::{Entry, Registry};
use serde_json::json;

use crate::guest::busybox;

#[test]
fn a_machine_is_made_of_an_image_in_a_registry() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let registry = Registry::start();
    let busybox = busybox(&mut client);
    let lower: &[_] = &[
        ("bin", Entry::Directory),
        ("bin/busybox", Entry::Program(&busybox)),
        ("bin/sh", Entry::Link("busybox")),
        ("app", Entry::Directory),
        ("app/old", Entry::Text("1")),
        ("app/kept", Entry::Text("of the lower layer")),
    ];
    let upper: &[_] = &[("app/.wh.old", Entry::Text("")), ("app/new", Entry::Text("2"))];
    let run = json!({ "Env": ["PATH=/bin:/app", "GREETING=from the image", "OTHER=image"], "WorkingDir": "/app",
        "User": "1000", "Cmd": ["sh"] });
    registry.put("team/tool", "1.0", &[lower, upper], &run);
    let from = format!("oci:{}/team/tool:1.0", registry.address());

    let vm = client.create(json!({ "name": "tool", "from": from, "env": { "OTHER": "asked for" } }));
    let said =
        client.run("tool", "pwd; echo $GREETING; echo $OTHER; busybox ls; busybox cat kept; busybox id -u");
    assert_eq!(said.stdout, "/app\nfrom the image\nasked for\nkept\nnew\nof the lower layer0\n", "{said:?}");
    assert!(client.run("tool", "echo $PATH").stdout.ends_with(":/bin:/app\n"));
    let elsewhere = json!({ "vm": "tool", "command": "pwd", "cwd": "/bin" });
    let elsewhere = client.call_whole("guest_run_command", elsewhere).expect("it runs");
    assert_eq!(stream(&elsewhere, "stdout"), "/bin\n");

    let name = vm["image"]["name"].as_str().expect("a VM has an image").to_owned();
    assert!(name.starts_with("oci-tool-1-0-"), "{name}");
    let image = client.must("image_inspect", json!({ "image": name }));
    assert!(
        image["source"].as_str().is_some_and(|s| s.starts_with(&from) && s.contains("@sha256:")),
        "{image}"
    );
    assert_eq!(image["config"]["user"], "1000", "{image}");
    assert_eq!(image["config"]["working_dir"], "/app", "{image}");

    // A shell is that of the image's user.
    for (options, user) in [(&[][..], "1000\n"), (&["-u", "root"], "0\n")] {
        let mut shell = Command::new(program("nexusctl"));
        shell.arg("shell").args(options).arg("tool").envs(daemon.environment());
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = shell.spawn().expect("nexusctl runs");
        let mut stdin = shell.stdin.take().expect("its input");
        stdin.write_all(b"busybox id -u; exit 4\n").expect("it is typed");
        drop(stdin);
        let ended = shell.wait_with_output().expect("it ends");
        assert_eq!((&*String::from_utf8_lossy(&ended.stdout), ended.status.code()), (user, Some(4)));
    }

    // The same image is not made again; a different one under the same tag is.
    let planned = |client: &mut Client, name: &str| {
        let arguments = json!({ "name": name, "from": from, "start": false });
        client.to_the_end("vm_create", arguments, nexus_tests::client::BOOT)["image"]["id"].clone()
    };
    assert_eq!(planned(&mut client, "again"), image["id"]);
    registry.put("team/tool", "1.0", &[lower], &run);
    assert_ne!(planned(&mut client, "newer"), image["id"]);
}

#[test]
fn an_image_of_one_program_is_a_machine() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let registry = Registry::start();
    let busybox = busybox(&mut client);
    registry.put(
        "scratch",
        "latest",
        &[&[("echo", Entry::Program(&busybox))]],
        &json!({ "Entrypoint": ["/echo"] }),
    );
    client.create(json!({ "name": "bare", "from": format!("oci:{}/scratch", registry.address()) }));

    let written = json!({ "vm": "bare", "path": "/data/note", "content": "kept", "create_parents": true });
    client.call_whole("guest_file_write", written).expect("the file is written");
    let read = client.call_whole("guest_file_read", json!({ "vm": "bare", "path": "/data/note" }));
    assert_eq!(stream(&read.expect("the file is read"), "content"), "kept");
    let listed =
        client.call_whole("guest_file_list", json!({ "vm": "bare", "path": "/" })).expect("it is listed");
    assert!(listed.to_string().contains("echo"), "{listed}");

    let line = client.call("guest_run_command", json!({ "vm": "bare", "command": "echo hello" }));
    let failure = line.expect_err("there is no shell");
    assert_eq!(failure.code, "program_not_found");
    assert!(failure.text.contains("no shell") && failure.text.contains("argv"), "{}", failure.text);
    let words = json!({ "vm": "bare", "argv": ["/echo", "hello"] });
    let words = client.call_whole("guest_run_command", words).expect("a program needs no shell");
    assert_eq!(stream(&words, "stdout"), "hello\n");
}
