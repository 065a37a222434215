//! Real machines that start warm: from one that was booted before them, without anything of that one or of each other.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::{Daemon, kill_process};
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::outcome;
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// The arguments for a machine that can start warm, with something of its own.
fn machine(name: &str, disk: &str) -> Value {
    json!({
        "name": name, "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "192MiB", "disk": disk,
        "env": { "WHO": name }, "files": { "/srv/own": { "content": name } }, "wait_s": 45
    })
}

fn turn(client: &mut Client, on: bool) {
    client.must("settings_set", json!({ "values": { "default.warm_start": on.to_string() } }));
}

/// The directories of prepared machines, and of those that are being prepared.
fn prepared(daemon: &Daemon) -> Vec<PathBuf> {
    let entries = fs::read_dir(daemon.state().join("prepared")).expect("the directory").flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Waits until one machine is prepared, and its own VMM has ended.
#[track_caller]
fn wait_for_one(daemon: &Daemon) -> PathBuf {
    let found = until(BOOT, || match prepared(daemon).as_slice() {
        [one] if one.extension().is_none() => Some(one.clone()),
        _ => None,
    });
    let found =
        found.unwrap_or_else(|| panic!("no machine is prepared: {:?}\n{}", prepared(daemon), daemon.log()));
    assert_in_order(daemon);
    found
}

/// Why a VM changed its state, each time.
fn history(client: &mut Client, vm: &str) -> String {
    client.must("vm_history", json!({ "vm": vm, "limit": 50 }))["transitions"].to_string()
}

fn is_warm(client: &mut Client, vm: &str) -> bool {
    history(client, vm).contains("warm start: guest agent ready")
}

/// Checks that a VM has what was asked for, and nothing of another.
#[track_caller]
fn assert_own(client: &mut Client, vm: &str, least_kib: u64) {
    let said = client.run(vm, "cat /srv/own; echo; echo $WHO; hostname; cat /etc/hostname").stdout;
    assert_eq!(said, format!("{vm}\n{vm}\n{vm}\n{vm}\n"), "{}", history(client, vm));
    let hosts = client.run(vm, "cat /etc/hosts").stdout;
    assert!(hosts.contains(vm) && !hosts.contains("prepared"), "{hosts}");
    let disk = client.run(vm, "df -Pk / | tail -n 1").stdout;
    let kib = disk.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    assert!(kib.is_some_and(|kib| kib >= least_kib), "{vm} has a disk of {disk}");
}

fn delete(client: &mut Client, vm: &str) {
    client.must_confirmed("vm_delete", json!({ "vm": vm, "force": true }));
}

#[test]
fn a_machine_that_starts_warm_is_as_one_that_was_booted() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    turn(&mut client, true);
    let start = Instant::now();
    client.create(machine("first", "256MiB"));
    let cold = start.elapsed();
    assert!(!is_warm(&mut client, "first"));
    let directory = wait_for_one(&daemon);
    // It is the daemon's own, and nobody's VM or checkpoint.
    let disk = client.must("system_info", json!({}))["disk"].clone();
    let told = disk.as_array().expect("a list").iter().find(|kind| kind["what"] == "prepared");
    let told = told.unwrap_or_else(|| panic!("{disk}"));
    assert!(told["items"] == 1 && told["bytes"].as_u64() > Some(1 << 20), "{told}");
    assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(1));
    assert_eq!(client.must("checkpoint_list", json!({}))["checkpoints"].as_array().map(Vec::len), Some(0));

    let start = Instant::now();
    client.create(machine("second", "1GiB"));
    let warm = start.elapsed();
    assert!(is_warm(&mut client, "second"), "{}\n{}", history(&mut client, "second"), daemon.log());
    assert!(warm < cold, "warm {warm:?}, cold {cold:?}");
    client.create(machine("third", "256MiB"));
    assert!(is_warm(&mut client, "third"));
    for (vm, kib) in [("first", 200 << 10), ("second", 900 << 10), ("third", 200 << 10)] {
        assert_own(&mut client, vm, kib);
    }
    for line in [
        "head -c 16 /dev/urandom | od -An -tx1",
        "cat /proc/sys/kernel/random/uuid",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /etc/machine-id || echo first",
    ] {
        let all = ["first", "second", "third"];
        let said: BTreeSet<String> = all.iter().map(|vm| client.run(vm, line).stdout).collect();
        assert_eq!(said.len(), all.len(), "{line}: {said:?}");
    }
    // It can do what others can.
    client.to_the_end("vm_checkpoint", json!({ "vm": "second", "name": "kept", "wait_s": 45 }), BOOT);
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": "kept" }));
    client.run("second", "echo more > /srv/more; sync");
    client.to_the_end("vm_restart", json!({ "vm": "second", "wait_s": 45 }), BOOT);
    assert_eq!(client.run("second", "cat /srv/own /srv/more").stdout, "secondmore\n");
    // One of another size has none to go on from, nor has one with a smaller disk.
    let plan = machine("small", "128MiB");
    client.create(plan);
    assert!(!is_warm(&mut client, "small"));
    for vm in ["first", "second", "third", "small"] {
        delete(&mut client, vm);
    }
    // A machine with that disk takes the place of the one before.
    let replaced = until(BOOT, || match prepared(&daemon).as_slice() {
        [one] if one.extension().is_none() && *one != directory => Some(one.clone()),
        _ => None,
    });
    let directory = replaced.unwrap_or_else(|| panic!("{:?}\n{}", prepared(&daemon), daemon.log()));

    // One that is damaged is not used, and the VM is there all the same.
    let ram = fs::File::options().write(true).open(directory.join("ram")).expect("the memory opens");
    ram.write_all_at(&[0x5a; 4096], 1 << 20).expect("it is written");
    let kept = daemon.state().join("kept");
    link_all(&directory, &kept);
    a_drive_that_takes_the_place_of_a_copy_stays(&daemon, &mut client);
    fs::rename(kept, &directory).expect("it is there again");
    client.create(machine("fourth", "256MiB"));
    let told = history(&mut client, "fourth");
    assert!(told.contains("the warm start failed") && told.contains("damaged"), "{told}");
    assert!(!is_warm(&mut client, "fourth"));
    assert_own(&mut client, "fourth", 200 << 10);
    assert!(prepared(&daemon).is_empty(), "{:?}", prepared(&daemon));

    // The next one that starts cold has one prepared, which goes with its image.
    client.create(machine("fifth", "256MiB"));
    assert!(!is_warm(&mut client, "fifth"));
    wait_for_one(&daemon);
    for vm in ["fourth", "fifth"] {
        delete(&mut client, vm);
    }
    client.must_confirmed("image_delete", json!({ "image": "busybox" }));
    assert!(prepared(&daemon).is_empty(), "{:?}", prepared(&daemon));
}

/// Makes a directory with the files of another one.
fn link_all(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a directory is made");
    for entry in fs::read_dir(from).expect("the directory").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            link_all(&path, &to);
        } else {
            fs::hard_link(path, to).expect("a file is linked");
        }
    }
}

/// A VM that can start neither from its prepared machine, which is damaged, nor from its image, gets another root drive.
fn a_drive_that_takes_the_place_of_a_copy_stays(daemon: &Daemon, client: &mut Client) {
    let images: Vec<_> = fs::read_dir(daemon.state().join("images")).expect("images").flatten().collect();
    let [image] = images.as_slice() else { panic!("{images:?}") };
    let (rootfs, away) = (image.path().join("rootfs.ext4"), daemon.state().join("away.ext4"));
    fs::rename(&rootfs, &away).expect("the image's file is moved away");
    let call = json!({ "name": "vm_create", "arguments": machine("moved", "256MiB") });
    client.request("tools/call", &call).expect("an answer");
    fs::rename(away, rootfs).expect("it is moved back");
    assert!(prepared(daemon).is_empty(), "{:?}", prepared(daemon));
    assert_eq!(client.inspect("moved")["state"], "created");
    let own = client.inspect("moved")["drives"][0]["name"].clone();
    let other = json!({ "name": "other", "from": "busybox", "size": "256MiB" });
    let other = client.to_the_end("drive_create", other, BOOT)["id"].clone();
    client.must("drive_detach", json!({ "drive": own }));
    client.must("drive_attach", json!({ "drive": other, "vm": "moved", "root": true }));
    let disk = daemon.state().join("drives").join(other.as_str().expect("an id")).join("disk.ext4");
    let file = || fs::metadata(&disk).expect("the drive's file").ino();
    let before = file();
    client.to_the_end("vm_start", json!({ "vm": "moved", "wait_s": 45 }), BOOT);
    assert_eq!(file(), before, "another file is the drive's");
    assert_own(client, "moved", 200 << 10);
    delete(client, "moved");
    for drive in [own, other] {
        client.must_confirmed("drive_delete", json!({ "drive": drive }));
    }
}

/// Has the daemon end at a point while it creates a VM or after it, and starts it again.
#[track_caller]
fn kill_at(daemon: &mut Daemon, point: &str, arguments: &Value) -> Client {
    daemon.kill_at(point, |client| {
        client.request("tools/call", &json!({ "name": "vm_create", "arguments": arguments })).ok();
        // Until it does not answer: a machine is prepared only some time after the answer.
        let look = json!({ "name": "vm_list", "arguments": {} });
        until(BOOT, || client.request("tools/call", &look).is_err().then_some(()));
    })
}

#[test]
fn a_daemon_that_is_killed_within_a_warm_start_leaves_a_whole_machine() {
    let mut daemon = Daemon::start();
    turn(&mut daemon.client(), true);
    // While one is prepared: nothing of it is left, and the VM that it was for runs on.
    for point in ["prepare-launched", "prepare-saved"] {
        let mut client = kill_at(&mut daemon, point, &machine(point, "256MiB"));
        client.wait_for_state(point, "ready");
        assert_in_order(&daemon);
        assert!(prepared(&daemon).is_empty(), "{point}: {:?}", prepared(&daemon));
        assert_own(&mut client, point, 200 << 10);
        delete(&mut client, point);
    }
    // So it is if the daemon ends in order.
    let mut client = daemon.client();
    client.create(machine("base", "256MiB"));
    let begun = until(BOOT, || (!prepared(&daemon).is_empty()).then_some(()));
    assert!(begun.is_some(), "{}", daemon.log());
    daemon.stop();
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("base", "ready");
    assert_in_order(&daemon);
    delete(&mut client, "base");
    client.create(machine("base", "256MiB"));
    wait_for_one(&daemon);

    // While it is used: the VM becomes ready all the same, and has all that it is to have.
    for (point, warm) in [("warm-checked", true), ("start-launched", false), ("warm-lengthened", true)] {
        let mut client = kill_at(&mut daemon, point, &machine(point, "1GiB"));
        client.wait_for_state(point, "ready");
        assert_in_order(&daemon);
        assert_own(&mut client, point, 900 << 10);
        assert_eq!(is_warm(&mut client, point), warm, "{}", history(&mut client, point));
        let ids = client.run(point, "cat /etc/machine-id 2>/dev/null; hostname").stdout;
        assert!(!ids.contains("localhost"), "{ids}");
        delete(&mut client, point);
    }
    // While it starts cold in place of that.
    let one = wait_for_one(&daemon);
    let kept = daemon.state().join("kept");
    let copied = Command::new("cp").arg("-a").args([&one, &kept]).status();
    assert!(copied.expect("cp runs").success());
    let ram = fs::File::options().write(true).open(one.join("ram")).expect("the memory opens");
    ram.write_all_at(&[0x5a; 4096], 1 << 20).expect("it is written");
    daemon.stop();
    daemon.set("NEXUS_FAILPOINT", Some("warm-replaced"));
    daemon.restart();
    let call = json!({ "name": "vm_create", "arguments": machine("replaced", "1GiB") });
    daemon.client().request("tools/call", &call).ok();
    daemon.wait_until_ended();
    // The machine can be used again, but its memory does not know the drive that is there by now.
    assert!(prepared(&daemon).is_empty(), "{:?}", prepared(&daemon));
    fs::rename(kept, &one).expect("it is there again");
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("replaced", "ready");
    assert_in_order(&daemon);
    assert_own(&mut client, "replaced", 900 << 10);
    assert!(!is_warm(&mut client, "replaced"));
    for vm in ["base", "replaced"] {
        delete(&mut client, vm);
    }
    // Where VMs start cold only, none is kept.
    client.create(machine("base", "256MiB"));
    wait_for_one(&daemon);
    turn(&mut client, false);
    let gone = until(Duration::from_mins(3), || prepared(&daemon).is_empty().then_some(()));
    assert!(gone.is_some(), "{:?}\n{}", prepared(&daemon), daemon.log());
}

/// How often a machine was ready to be taken so far.
fn waits(daemon: &Daemon) -> usize {
    daemon.log().matches("a machine waits for a new vm").count()
}

/// Waits until one more machine can be taken than at an earlier look.
#[track_caller]
fn wait_for_waiting(daemon: &Daemon, before: usize) {
    let more = until(2 * BOOT, || (waits(daemon) > before).then_some(()));
    assert!(more.is_some(), "no machine waits\n{}", daemon.log());
}

fn pool(client: &mut Client, value: &str) {
    client.must("settings_set", json!({ "values": { "warm_pool": value } }));
}

#[test]
fn a_machine_that_waits_is_one_new_vm_and_nothing_is_left_of_others() {
    const ONE: &str = r#"{"busybox": 1}"#;
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    client.must(
        "settings_set",
        json!({ "values": {
        "default.warm_start": "true", "default.memory": "192MiB", "default.disk": "256MiB", "warm_pool": ONE
    } }),
    );
    wait_for_waiting(&daemon, 0);
    // It is nobody's VM.
    assert_eq!(client.must("vm_list", json!({}))["vms"].as_array().map(Vec::len), Some(0));
    let before = waits(&daemon);
    client.create(machine("one", "1GiB"));
    let told = history(&mut client, "one");
    assert!(told.contains("from a machine that waited") && is_warm(&mut client, "one"), "{told}");
    assert_own(&mut client, "one", 900 << 10);
    // Another one takes its place, and is another.
    wait_for_waiting(&daemon, before);
    client.create(machine("two", "256MiB"));
    assert!(history(&mut client, "two").contains("from a machine that waited"));
    assert_own(&mut client, "two", 200 << 10);
    for line in ["cat /proc/sys/kernel/random/uuid", "cat /etc/machine-id || echo one"] {
        assert_ne!(client.run("one", line).stdout, client.run("two", line).stdout, "{line}");
    }
    for vm in ["one", "two"] {
        delete(&mut client, vm);
    }

    // A daemon that is killed when a machine has been taken: the VM starts cold, with a drive that no other machine has used.
    daemon.stop();
    let before = waits(&daemon);
    daemon.set("NEXUS_FAILPOINT", Some("created"));
    daemon.restart();
    wait_for_waiting(&daemon, before);
    let call = json!({ "name": "vm_create", "arguments": machine("three", "256MiB") });
    daemon.client().request("tools/call", &call).ok();
    daemon.wait_until_ended();
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    let mut client = daemon.client();
    pool(&mut client, "");
    client.wait_for_state("three", "ready");
    assert!(!is_warm(&mut client, "three"), "{}", history(&mut client, "three"));
    assert_own(&mut client, "three", 200 << 10);
    assert_in_order(&daemon);
    delete(&mut client, "three");

    // One that is killed before that leaves nothing.
    client.create(machine("base", "256MiB"));
    wait_for_one(&daemon);
    let mut client = daemon.kill_at("pool-restored", |client| {
        client
            .request(
                "tools/call",
                &json!({ "name": "settings_set", "arguments": { "values": { "warm_pool": ONE } } }),
            )
            .ok();
    });
    pool(&mut client, "");
    assert_in_order(&daemon);
    client.wait_for_state("base", "ready");
    delete(&mut client, "base");
}

/// Creates a machine that starts warm, and kills a process of it as soon as it has one. Returns whether it was not ready yet, and was booted then.
fn kill_starting(daemon: &Daemon, which: &str) -> bool {
    wait_for_one(daemon);
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let creating = thread::spawn(move || outcome(&mut other, "vm_create", machine("cut", "256MiB")));
    let deadline = Instant::now() + BOOT;
    let pid = loop {
        let vm = client.call("vm_inspect", json!({ "vm": "cut" })).unwrap_or_default();
        if let Some(pid) = vm["process"][which].as_u64() {
            break u32::try_from(pid).expect("a process id");
        }
        assert!(Instant::now() < deadline, "it is not started: {vm}");
        // Not longer, since a small memory is read soon.
        thread::park_timeout(Duration::from_millis(1));
    };
    kill_process(pid);
    let created = creating.join().expect("no panic");
    let told = history(&mut client, "cut");
    let is_caught = told.contains("the warm start failed");
    if is_caught {
        assert_eq!(created.unwrap_or_else(|e| panic!("{}", e.text))["state"], "ready", "{told}");
        assert_own(&mut client, "cut", 200 << 10);
    }
    delete(&mut client, "cut");
    is_caught
}

#[test]
fn a_vmm_or_a_shim_that_is_killed_within_a_warm_start_leaves_a_machine_that_is_booted() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    turn(&mut client, true);
    for which in ["pid", "shim_pid"] {
        // What was prepared may be why, so it is prepared anew for the next one.
        let is_caught = (0..5).any(|_| {
            if prepared(&daemon).is_empty() {
                client.create(machine("base", "256MiB"));
                wait_for_one(&daemon);
                delete(&mut client, "base");
            }
            kill_starting(&daemon, which)
        });
        assert!(is_caught, "{which}: it was always ready too soon");
        assert_in_order(&daemon);
    }
}
