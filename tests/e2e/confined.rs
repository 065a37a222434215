//! The restrictions of machines of an ordinary user's daemon: what /proc shows, and what a VMM cannot do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

/// An ordinary user.
const USER: u32 = 54_321;

/// QEMU's answer to a command on its monitor.
fn ask(monitor: &mut BufReader<UnixStream>, command: &Value) -> Value {
    monitor.get_mut().write_all(format!("{command}\n").as_bytes()).expect("a monitor takes commands");
    loop {
        let mut line = String::new();
        monitor.read_line(&mut line).expect("a monitor answers");
        let answer: Value = serde_json::from_str(&line).expect("JSON");
        // Skips events.
        if answer.get("return").is_some() || answer.get("error").is_some() {
            return answer;
        }
    }
}

#[test]
fn machines_of_an_ordinary_user_are_confined() {
    let daemon = Daemon::start_as_in(USER, &[], &[("NEXUS_DRIVER", "qemu")]);
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "walled", "from": "busybox" }));
    assert_eq!(client.run("walled", "echo works").stdout, "works\n");

    for which in ["pid", "shim_pid"] {
        let pid = vm["process"][which].as_u64().unwrap_or_else(|| panic!("no {which} in {vm}"));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that runs");
        for line in ["Uid:\t54321\t54321\t54321\t54321", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(line), "{which}: {line} is not in {status}");
        }
        // Each of its threads.
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads") {
            let thread = thread.expect("a thread").path().join("status");
            let status = std::fs::read_to_string(&thread).expect("a thread's status");
            assert!(status.contains("Seccomp:\t2"), "{which}: {}: {status}", thread.display());
        }
    }

    // Through its monitor, QEMU tries what a guest that broke out of it would try.
    let id = vm["id"].as_str().expect("an id");
    let place = daemon.state().join("vms").join(id);
    let monitor = UnixStream::connect(place.join("q.sock")).expect("QEMU's monitor");
    let mut monitor = BufReader::new(monitor);
    ask(&mut monitor, &json!({ "execute": "qmp_capabilities" }));
    let mut open = |path: &Path, read_only: bool| {
        let file = json!({ "driver": "file", "node-name": "x", "filename": path, "read-only": read_only });
        let answer = ask(&mut monitor, &json!({ "execute": "blockdev-add", "arguments": file }));
        answer["error"]["desc"].as_str().map(str::to_owned)
    };
    for file in [daemon.state().join("nexus.db"), place.join("plan.json"), "/etc/passwd".into()] {
        let refused = open(&file, true).unwrap_or_else(|| panic!("QEMU reads {}", file.display()));
        assert!(refused.contains("Permission denied"), "{refused}");
    }
    let address = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": "9" } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    let network = json!({ "execute": "chardev-add", "arguments": { "id": "net", "backend": backend } });
    let refused = ask(&mut monitor, &network);
    let why = refused["error"]["desc"].as_str().unwrap_or_else(|| panic!("QEMU has a network: {refused}"));
    assert!(why.contains("Operation not permitted"), "{why}");
    // The sockets of the daemon's user are closed to it, the daemon's own above all.
    let address = json!({ "type": "unix", "data": { "path": daemon.socket() } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    let caller = json!({ "execute": "chardev-add", "arguments": { "id": "caller", "backend": backend } });
    let refused = ask(&mut monitor, &caller);
    let why = refused["error"]["desc"].as_str().unwrap_or_else(|| panic!("QEMU calls the daemon: {refused}"));
    assert!(why.contains("Operation not permitted"), "{why}");
    assert_eq!(client.run("walled", "echo works still").stdout, "works still\n");
}
