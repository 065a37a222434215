//! Checkpoints of real machines: back to before a mistake, and several machines that go on from one moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nexus_schema::link::QUIET_MAX;
use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::wait::stay;
use serde_json::{Value, json};

/// Makes a machine that can be saved.
fn create(client: &mut Client, name: &str) -> Value {
    client.create(json!({
        "name": name, "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "256MiB", "wait_s": 45
    }))
}

/// Takes a VM back to a checkpoint; returns what became of it.
fn roll_back(client: &mut Client, vm: &str, checkpoint: &str) -> Value {
    let mut outcome =
        client.must_confirmed("vm_rollback", json!({ "vm": vm, "checkpoint": checkpoint, "wait_s": 45 }));
    while outcome["done"] != true {
        outcome = client.must("op_get", json!({ "op_id": outcome["op_id"], "wait_s": 45 }));
    }
    assert!(outcome["error"].is_null(), "{outcome}");
    outcome["result"]["vms"][0].clone()
}

/// Asks for a rollback that the daemon does not survive.
fn roll_back_in_vain(client: &mut Client, vm: &str, checkpoint: &str) {
    let mut arguments = json!({ "vm": vm, "checkpoint": checkpoint, "keep_current": false, "wait_s": 45 });
    let asked = client.call("vm_rollback", arguments.clone()).expect_err("it is to be confirmed");
    let token = asked.text.split(r#""confirm":""#).nth(1).and_then(|rest| rest.split('"').next());
    arguments["confirm"] = token.expect("a token in the hint").into();
    client.request("tools/call", &json!({ "name": "vm_rollback", "arguments": arguments })).ok();
}

fn words(restored: &Value, part: &str) -> Vec<String> {
    let words = restored["contract"][part].as_array().expect("a list");
    words.iter().map(|word| word.as_str().expect("a word").to_owned()).collect()
}

#[test]
fn a_mistake_is_undone_with_memory_and_what_was_not_synced() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    // A command that goes on counting, and a file that is in the page cache only.
    client.must(
        "guest_command_start",
        json!({ "vm": "web", "command":
        "i=0; while true; do i=$((i+1)); echo $i > /run/count; sleep 0.1; done" }),
    );
    client.run(
        "web",
        "echo 30 > /proc/sys/vm/dirty_expire_centisecs; mkdir -p /srv/data; echo kept > /srv/data/file",
    );
    let taken = client.to_the_end("vm_checkpoint", json!({ "vm": "web", "name": "clean" }), BOOT);
    assert_eq!((&taken["name"], &taken["quiesced"]), (&json!("clean"), &json!(true)), "{taken}");
    assert!(taken["memory_bytes"].as_u64().expect("a size") < 256 << 20, "{taken}");
    // The machine goes on as if nothing had been.
    assert_eq!(client.inspect("web")["boot_id"], boot);
    let count = |client: &mut Client| {
        client.run("web", "cat /run/count").stdout.trim().parse::<u64>().unwrap_or_default()
    };
    let before = count(&mut client);
    client.run("web", "rm -rf /srv/data; echo new > /srv/new; sync; sleep 2");
    assert!(count(&mut client) > before);

    let restored = roll_back(&mut client, "web", "clean");
    assert_ne!(restored["boot_id"], boot, "{restored}");
    assert!(words(&restored, "renewed").contains(&"kernel random numbers".to_owned()), "{restored}");
    assert_eq!(client.run("web", "cat /srv/data/file; ls /srv").stdout, "kept\ndata\n");
    // The command goes on where it was.
    let then = count(&mut client);
    let later = client.run("web", "sleep 1; cat /run/count").stdout.trim().parse::<u64>().expect("a number");
    assert!(later > then, "{later} and {then}");
    let skew = client.run("web", "date +%s").stdout.trim().parse::<i64>().expect("seconds")
        - i64::try_from(std::time::UNIX_EPOCH.elapsed().expect("a time").as_secs()).expect("a small number");
    assert!(skew.abs() <= 3, "{skew} s");

    // What was taken back is kept for an hour, and can be had again.
    let listed = client.must("checkpoint_list", json!({ "vm": "web" }));
    let names: Vec<_> =
        listed["checkpoints"].as_array().expect("a list").iter().map(|row| row["name"].clone()).collect();
    assert_eq!(names.len(), 2, "{listed}");
    let kept = names[1].as_str().expect("a name");
    assert!(kept.starts_with("before-rollback-"), "{kept}");
    roll_back(&mut client, "web", kept);
    assert_eq!(client.run("web", "cat /srv/new").stdout, "new\n");
    // A stop and a start are as those of any other machine.
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "stopped");
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    assert_eq!(client.run("web", "cat /srv/new").stdout, "new\n");
    let clean = taken["id"].as_str().expect("an id");
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": clean }));
}

#[test]
fn forks_go_on_from_one_moment_and_share_no_secrets() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "base");
    // A loop that is frozen in the middle, and takes random numbers as soon as it runs again.
    client.must(
        "guest_command_start",
        json!({ "vm": "base", "command":
        "while true; do cat /proc/sys/kernel/random/uuid >> /srv/random; \
         head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n' >> /srv/random; echo >> /srv/random; done" }),
    );
    client.run("base", "echo prepared > /srv/state; until [ -s /srv/random ]; do sleep 0.1; done");
    client.to_the_end("vm_checkpoint", json!({ "vm": "base", "name": "ready" }), BOOT);
    let made = client.to_the_end(
        "vm_fork",
        json!({ "checkpoint": "ready", "names": ["try-1", "try-2", "try-3"], "tags": { "of": "base" } }),
        BOOT,
    );
    let vms = made["vms"].as_array().expect("a list");
    assert_eq!(vms.len(), 3, "{made}");
    let all = ["base", "try-1", "try-2", "try-3"];
    for vm in vms {
        for part in ["kept", "renewed", "closed", "not_renewed"] {
            assert!(!words(vm, part).is_empty(), "{part} of {vm}");
        }
        assert_eq!(vm["contract"]["quiesced"], true, "{vm}");
    }
    let distinct = |client: &mut Client, line: &str| {
        let said: BTreeSet<String> = all.iter().map(|vm| client.run(vm, line).stdout).collect();
        assert_eq!(said.len(), all.len(), "{line}: {said:?}");
    };
    for line in [
        "head -c 16 /dev/urandom | od -An -tx1",
        "head -c 16 /dev/random | od -An -tx1",
        "cat /proc/sys/kernel/random/uuid",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /etc/machine-id || echo base",
        "hostname",
    ] {
        distinct(&mut client, line);
    }
    let boots: BTreeSet<String> = all.iter().map(|vm| client.inspect(vm)["boot_id"].to_string()).collect();
    assert_eq!(boots.len(), all.len());
    // No random number that the loop took after the checkpoint is in two machines; those before it are in all.
    let mut seen: Vec<BTreeSet<String>> = Vec::new();
    for vm in all {
        assert_eq!(client.run(vm, "cat /srv/state").stdout, "prepared\n");
        let lines = client.run(vm, "head -n 400 /srv/random").stdout;
        seen.push(lines.lines().filter(|line| line.len() >= 32).map(str::to_owned).collect());
    }
    let common = seen.iter().skip(1).fold(seen[0].clone(), |common, lines| &common & lines);
    for (at, one) in seen.iter().enumerate() {
        for other in &seen[at + 1..] {
            assert_eq!(&(one & other) - &common, BTreeSet::new(), "the same number in two machines");
        }
    }
    for name in ["try-1", "try-2", "try-3"] {
        let details = client.inspect(name);
        assert_eq!(details["parent_id"], client.inspect("base")["id"], "{details}");
        // What is alone in one stays there.
        client.run(name, &format!("echo {name} > /srv/own"));
    }
    assert_eq!(client.run("try-2", "cat /srv/own").stdout, "try-2\n");
    // They need the checkpoint no longer.
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": "ready" }));
    assert_eq!(client.run("try-1", "cat /srv/own").stdout, "try-1\n");
    client.must_confirmed("vm_delete", json!({ "tags": { "of": "base" }, "force": true }));
    let left = std::fs::read_dir(daemon.state().join("checkpoints")).expect("the directory").count();
    assert_eq!(left, 0);
}

#[test]
fn a_command_is_undone_by_its_checkpoint_and_seen_in_a_diff() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "web");
    client.run(
        "web",
        "mkdir -p /srv/data; for i in 1 2 3; do echo $i > /srv/data/$i; done; echo old > /srv/text",
    );
    let command =
        "rm -rf /srv/data; echo new > /srv/text; echo more > /srv/more; sleep 1000 >/dev/null 2>&1 &";
    let ran = client
        .call_whole("guest_run_command", json!({ "vm": "web", "command": command, "checkpoint": true }))
        .unwrap_or_else(|failure| panic!("{}", failure.text));
    let listed = client.must("checkpoint_list", json!({ "vm": "web" }));
    let row = &listed["checkpoints"][0];
    let name = row["name"].as_str().expect("a name");
    assert!(name.starts_with("before-run-") && row["expires_at"].is_string(), "{row}");
    assert!(ran.to_string().contains(name), "{ran}");

    let diff = client.must("checkpoint_diff", json!({ "from": name, "path": "/srv", "text": true }));
    let files: Vec<String> = diff["files"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|file| {
            format!(
                "{} {}",
                file["change"].as_str().unwrap_or_default(),
                file["path"].as_str().unwrap_or_default()
            )
        })
        .collect();
    assert_eq!(
        files,
        [
            "removed /srv/data",
            "removed /srv/data/1",
            "removed /srv/data/2",
            "removed /srv/data/3",
            "added /srv/more",
            "changed /srv/text",
        ],
        "{diff}"
    );
    assert!(diff["diff"].as_str().expect("a diff").contains("-old\n+new\n"), "{diff}");
    let started = diff["processes"]["started"].to_string();
    assert!(started.contains("sleep 1000"), "{diff}");
    // The machine was not disturbed, and no copy of its drive is left.
    assert_eq!(client.run("web", "cat /srv/text").stdout, "new\n");
    assert_eq!(std::fs::read_dir(daemon.state().join("scratch")).expect("the directory").count(), 0);

    roll_back(&mut client, "web", name);
    assert_eq!(client.run("web", "cat /srv/text; ls /srv/data").stdout, "old\n1\n2\n3\n");
    // What was taken back is a checkpoint as well.
    let listed = client.must("checkpoint_list", json!({ "vm": "web" }));
    let kept = listed["checkpoints"][1]["name"].as_str().expect("a name");
    let back = client.must("checkpoint_diff", json!({ "from": kept, "to": name, "path": "/srv/data" }));
    assert_eq!((&back["added"], &back["backwards"]), (&json!(4), &json!(true)), "{back}");
}

#[test]
fn a_daemon_that_is_killed_within_a_rollback_leaves_all_drives_as_before_or_all_as_then() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    client.to_the_end("drive_create", json!({ "name": "data", "size": "64MiB" }), BOOT);
    client.create(json!({
        "name": "web", "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "256MiB", "wait_s": 45
    }));
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "stopped");
    client.must("drive_attach", json!({ "drive": "data", "vm": "web", "mount": "/data" }));
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    client.run("web", "echo then > /srv/file; echo then > /data/file; sync");
    client.to_the_end("vm_checkpoint", json!({ "vm": "web", "name": "clean" }), BOOT);
    for (point, words) in [
        ("rollback-staged", "now\nnow\n"),
        ("rollback-down", "now\nnow\n"),
        ("rollback-placing", "then\nthen\n"),
        ("rollback-drive-away", "then\nthen\n"),
        ("rollback-drive-placed", "then\nthen\n"),
        ("rollback-launched", "then\nthen\n"),
    ] {
        daemon.client().run("web", "echo now > /srv/file; echo now > /data/file; sync");
        daemon.stop();
        daemon.set("NEXUS_FAILPOINT", Some(point));
        daemon.restart();
        let mut client = daemon.client();
        client.wait_for_state("web", "ready");
        roll_back_in_vain(&mut client, "web", "clean");
        daemon.wait_until_ended();
        daemon.set("NEXUS_FAILPOINT", None);
        daemon.restart();
        let mut client = daemon.client();
        let vm = client.inspect("web");
        match point {
            // Nothing of the machine had changed.
            "rollback-staged" => drop(client.wait_for_state("web", "ready")),
            // Its guest waited to be renewed, and could not be.
            "rollback-launched" => {
                assert_eq!(vm["state"], "failed", "{point}: {vm}");
                assert!(vm["reason"].to_string().contains("had renewed"), "{point}: {vm}");
            }
            _ => assert_eq!(vm["state"], "stopped", "{point}: {vm}"),
        }
        client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
        assert_eq!(client.run("web", "cat /srv/file /data/file").stdout, words, "{point}");
        assert_in_order(&daemon);
    }
    let mut client = daemon.client();
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "stopped");
    client.must("drive_detach", json!({ "drive": "data" }));
}

/// A fork whose daemon is killed leaves no machine, though it was protected.
fn a_fork_is_undone() {
    let mut daemon = Daemon::start();
    create(&mut daemon.client(), "base");
    daemon.client().to_the_end("vm_checkpoint", json!({ "vm": "base", "name": "ready" }), BOOT);
    daemon.stop();
    daemon.set("NEXUS_FAILPOINT", Some("fork-launched"));
    daemon.restart();
    let call =
        json!({ "name": "vm_fork", "arguments": { "checkpoint": "ready", "names": ["try"], "wait_s": 45 } });
    daemon.client().request("tools/call", &call).ok();
    daemon.wait_until_ended();
    let database = rusqlite::Connection::open(daemon.state().join("nexus.db")).expect("the database");
    database.execute("UPDATE vms SET protected = 1 WHERE name = 'try'", []).expect("a row is changed");
    drop(database);
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    let mut client = daemon.client();
    let left = client.call("vm_inspect", json!({ "vm": "try" })).expect_err("it is undone");
    assert_eq!(left.code, "vm_not_found", "{}", left.text);
    assert_eq!(client.run("base", "echo up").stdout, "up\n");
    assert_in_order(&daemon);
}

#[test]
fn commands_wait_for_a_daemon_after_a_checkpoint_that_was_cut_off_and_a_fork_that_was_is_undone() {
    let mut daemon = Daemon::start();
    create(&mut daemon.client(), "web");
    daemon.stop();
    daemon.set("NEXUS_FAILPOINT", Some("checkpoint-quiet"));
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("web", "ready");
    let ticks = "while true; do cut -d. -f1 /proc/uptime >> /run/ticks; sleep 1; done";
    client.must("guest_command_start", json!({ "vm": "web", "command": ticks }));
    client.run("web", "until [ -s /run/ticks ]; do sleep 0.1; done");
    let call = json!({ "name": "vm_checkpoint", "arguments": { "vm": "web", "wait_s": 45 } });
    client.request("tools/call", &call).ok();
    daemon.wait_until_ended();
    // The guest asks after this time, and nobody answers: it could have been restored. That is time for another machine.
    let over = Instant::now() + QUIET_MAX + Duration::from_secs(15);
    a_fork_is_undone();
    stay(over.saturating_duration_since(Instant::now()));
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    let mut client = daemon.client();
    client.wait_for_state("web", "ready");
    let said = client.run("web", "sleep 3; cat /run/ticks").stdout;
    let seconds: Vec<u64> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let gaps: Vec<u64> = seconds.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    let longest = gaps.iter().max().copied().unwrap_or_default();
    assert!(longest >= QUIET_MAX.as_secs() + 5, "{gaps:?}");
    assert!(gaps.last().is_some_and(|last| *last < 60), "{gaps:?}");
}
