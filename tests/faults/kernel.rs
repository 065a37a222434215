//! Faults that only show with a guest's own kernel: real virtual machines, with software emulation if there is no KVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nexus_tests::client::{BOOT, Client, Failure};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::vsock::compile;
use serde_json::{Value, json};

/// A machine of the `busybox` image that was never started.
fn create(client: &mut Client, name: &str, init: &str) -> PathBuf {
    let arguments = json!({ "name": name, "from": "busybox", "start": false, "init": init });
    let vm = client.to_the_end("vm_create", arguments, BOOT);
    PathBuf::from(vm["drives"][0]["path"].as_str().expect("a drive is a file"))
}

/// Writes a program to a drive that is not in use.
fn put(daemon: &Daemon, disk: &Path, name: &str, content: &[u8]) {
    let source = daemon.root().join("program");
    fs::write(&source, content).expect("a file is written");
    let script = daemon.root().join("script");
    let commands =
        format!("cd /bin\nrm {name}\nwrite {} {name}\nsif {name} mode 0100755\n", source.display());
    fs::write(&script, commands).expect("a file is written");
    let output =
        Command::new("debugfs").arg("-w").arg("-f").arg(script).arg(disk).output().expect("debugfs runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Starts a machine that fails to start; returns the error, however long that takes.
fn start_in_vain(client: &mut Client, name: &str) -> Failure {
    let mut outcome = match client.call("vm_start", json!({ "vm": name, "wait_s": 45 })) {
        Ok(outcome) => outcome,
        Err(failure) => return failure,
    };
    while outcome["done"] != true {
        outcome = client.must("op_get", json!({ "op_id": outcome["op_id"], "wait_s": 45 }));
    }
    let error = &outcome["error"];
    let text = error["message"].as_str().unwrap_or_else(|| panic!("{name} came up: {outcome}"));
    Failure { code: error["code"].as_str().unwrap_or_default().to_owned(), text: text.to_owned() }
}

#[test]
fn what_does_not_boot_is_told_with_the_consoles_last_lines() {
    let daemon = Daemon::start();
    let mut client = daemon.client();

    // An init that ends is a kernel panic.
    let disk = create(&mut client, "panics", "system");
    put(&daemon, &disk, "init", b"#!/bin/sh\necho the moon is missing > /dev/console\nexit 7\n");
    let failure = start_in_vain(&mut client, "panics");
    // Either that init or the agent's hello may come first.
    assert!(["boot_failed", "vm_gone"].contains(&&*failure.code), "{} {}", failure.code, failure.text);
    for line in ["the moon is missing", "Kernel panic - not syncing: Attempted to kill init"] {
        assert!(failure.text.contains(line), "{}", failure.text);
    }
    let vm = client.inspect("panics");
    assert!(vm["reason"].to_string().contains("Kernel panic"), "{vm}");

    // A drive without a filesystem.
    let disk = create(&mut client, "empty", "agent");
    let file = fs::File::options().write(true).open(disk).expect("the drive is opened");
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 1 << 20], 0).expect("its start is wiped");
    drop(file);
    let failure = start_in_vain(&mut client, "empty");
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    assert!(failure.text.contains("mount the root drive /dev/vda"), "{}", failure.text);
    assert_in_order(&daemon);
}

#[test]
fn a_kernel_whose_modules_are_missing_says_so() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    // The distribution's kernel as a plain file: its drivers are modules, which the file does not contain.
    let assets = fs::read_dir(daemon.state().join("assets")).expect("the assets").flatten();
    let kernel = assets.map(|asset| asset.path().join("vmlinux")).find(|file| file.exists());
    let mut bytes = fs::read(kernel.expect("a kernel")).expect("the kernel is read");
    // A file that differs from the known kernel, with that kernel's modules.
    bytes.push(0);
    let file = daemon.root().join("vmlinux");
    fs::write(&file, bytes).expect("a kernel is written");
    let kernel = format!("file:{}", file.display());
    let arguments = json!({ "name": "bare", "from": "busybox", "kernel": kernel, "start": false });
    client.to_the_end("vm_create", arguments, BOOT);
    let failure = start_in_vain(&mut client, "bare");
    assert_eq!(failure.code, "boot_failed", "{}", failure.text);
    for told in ["/dev/vda did not appear", "without modules", "virtio_blk"] {
        assert!(failure.text.contains(told), "{}", failure.text);
    }
    assert_in_order(&daemon);
}

#[test]
fn the_hello_port_is_closed_to_all_but_the_agent() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let disk = create(&mut client, "box", "agent");
    put(&daemon, &disk, "dial", &compile("dial", daemon.root()));
    let started = client.to_the_end("vm_start", json!({ "vm": "box" }), BOOT);
    let hello = json!({ "type": "hello", "protocol": 1, "min_protocol": 1, "build": "forged", "kernel": "0",
        "arch": "x86_64", "kernel_boot_id": "0", "uptime_ms": 1, "init": "agent" });
    let bye = json!({ "type": "bye", "token": "0".repeat(64), "reason": "poweroff" });
    let mut dial = |user: &str, source: u32, line: &Value| {
        let argv = ["/bin/dial", "1024", &source.to_string(), &line.to_string()].map(str::to_owned);
        let arguments = json!({ "vm": "box", "argv": argv, "user": user });
        let result = client.call_whole("guest_run_command", arguments).expect("the program runs");
        nexus_tests::client::stream(&result, "stdout").trim().to_owned()
    };
    for line in [&hello, &bye] {
        // Only root can use ports below 1024; connections from all other ports are refused.
        assert_eq!(dial("nobody", 700, line), "refused 13");
        for (user, source) in [("nobody", 0), ("nobody", 2000), ("root", 0)] {
            let answer = dial(user, source, line);
            assert!(answer.starts_with("refused"), "{user} from {source}: {answer}");
        }
        // Root can connect, but is refused without the boot's token.
        let answer = dial("root", 700, line);
        assert!(answer.contains("refused") && answer.contains("token"), "{answer}");
        assert!(!answer.contains("configure"), "{answer}");
    }
    let vm = client.inspect("box");
    assert_eq!((&vm["state"], &vm["boot_id"]), (&json!("ready"), &started["boot_id"]), "{vm}");
    assert_ne!(vm["guest"]["build"], "forged", "{vm}");
    assert_in_order(&daemon);
}
