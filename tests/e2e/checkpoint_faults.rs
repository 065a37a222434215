//! What is refused or given up, with real machines: damaged checkpoints, those of another VMM, guests that do not prove what they renewed, agents
//! that are killed. The machine that was saved runs on whatever happens.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client, Failure};
use nexus_tests::daemon::{Daemon, kill_process};
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{
    assert_files, checkpoint, clock_is_right, count, create, delete_all, goes_on, is_on_console, outcome,
    roll_back, signal_agent,
};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// Changes one bit in the middle of a file.
fn flip(file: &Path) {
    let file = File::options().read(true).write(true).open(file).expect("a file of the checkpoint");
    let at = file.metadata().expect("its length").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte is read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("a byte is written");
}

/// Why neither a rollback nor a fork goes on from the checkpoint `clean` of `web`; both have to say the same.
#[track_caller]
fn refused(client: &mut Client) -> Failure {
    let back = json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 });
    let fork = json!({ "vm": "web", "checkpoint": "clean", "count": 2, "wait_s": 45 });
    let rollback = outcome(client, "vm_rollback", back).expect_err("it is not restored");
    let forked = outcome(client, "vm_fork", fork).expect_err("it is not restored");
    assert_eq!(rollback.code, forked.code, "{}; {}", rollback.text, forked.text);
    rollback
}

fn vms(client: &mut Client) -> usize {
    client.must("vm_list", json!({}))["vms"].as_array().map_or(0, Vec::len)
}

/// Changes the version of the VMM in the manifest of a checkpoint, on the disk and in the database.
fn as_if_of_another_version(daemon: &Daemon, directory: &Path, version: &str) -> String {
    let path = directory.join("manifest.json");
    let text = std::fs::read_to_string(&path).expect("the manifest");
    let mut manifest: Value = serde_json::from_str(&text).expect("JSON");
    let before = manifest["host"]["driver_version"].as_str().expect("a version").to_owned();
    manifest["host"]["driver_version"] = version.into();
    let manifest = manifest.to_string();
    std::fs::write(&path, &manifest).expect("the manifest is written");
    let database = rusqlite::Connection::open(daemon.state().join("nexus.db")).expect("the database");
    database.busy_timeout(Duration::from_mins(1)).expect("a timeout");
    let changed = database.execute("UPDATE checkpoints SET manifest = ?1 WHERE name = 'clean'", [&manifest]);
    assert_eq!(changed.expect("the row is changed"), 1);
    before
}

/// Takes the VM back to a checkpoint of an hour ago: its clock is set back right before, so its memory has the time of then.
#[track_caller]
fn an_hour_later(client: &mut Client, vm: &str) {
    let back = "date -s \"$(date -d @$(($(date +%s) - 3600)) '+%Y-%m-%d %H:%M:%S')\"";
    let mut rounds = 1..=3;
    let behind = rounds.find_map(|round| {
        assert_eq!(client.run(vm, back).exit_code, Some(0), "the clock is set");
        checkpoint(client, vm, &format!("hour-{round}"));
        let restored = roll_back(client, vm, &format!("hour-{round}"));
        // Now and then the daemon sets the clock right before the checkpoint.
        restored["contract"]["clock_behind_ms"].as_i64().filter(|behind| *behind >= 3_595_000)
    });
    assert!(behind.is_some(), "no checkpoint has the time of an hour ago");
}

#[test]
fn what_is_damaged_or_of_another_vmm_is_refused_and_the_clock_is_right_after_an_hour() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    let taken = checkpoint(&mut client, "web", "clean");
    let directory = daemon.state().join("checkpoints").join(taken["id"].as_str().expect("an id"));
    for file in ["state", "ram", "manifest.json"] {
        flip(&directory.join(file));
        let failure = refused(&mut client);
        assert_eq!(failure.code, "verification_failed", "{file}: {}", failure.text);
        assert!(failure.text.contains(&format!("/{file} is damaged")), "{file}: {}", failure.text);
        flip(&directory.join(file));
    }
    let version = as_if_of_another_version(&daemon, &directory, "0.0.1");
    let failure = refused(&mut client);
    assert_eq!(failure.code, "host_unsuitable", "{}", failure.text);
    assert!(failure.text.contains("0.0.1") && failure.text.contains(&version), "{}", failure.text);
    let row = client.must("checkpoint_list", json!({}))["checkpoints"][0].clone();
    assert!(row["problem"].as_str().is_some_and(|problem| problem.contains("0.0.1")), "{row}");
    assert_eq!(as_if_of_another_version(&daemon, &directory, &version), "0.0.1");
    // Nothing was changed by that.
    assert_eq!(client.inspect("web")["boot_id"], boot);
    goes_on(&mut client, "web");
    assert_eq!(vms(&mut client), 1);

    an_hour_later(&mut client, "web");
    clock_is_right(&mut client, "web");
    goes_on(&mut client, "web");
    delete_all(&daemon, &mut client);
    assert_in_order(&daemon);
}

/// Waits until the memory of a VM is being written to a checkpoint.
fn until_saving(daemon: &Daemon) {
    let checkpoints = daemon.state().join("checkpoints");
    let deadline = Instant::now() + Duration::from_mins(2);
    let is_begun = || {
        let parts = std::fs::read_dir(&checkpoints).expect("the directory").flatten();
        parts.map(|part| part.path()).any(|part| part.join("ram").exists())
    };
    while !is_begun() {
        assert!(Instant::now() < deadline, "no memory is saved\n{}", daemon.log());
        // Not longer, since a small memory is written soon.
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn a_vmm_or_a_shim_that_is_killed_within_a_save_leaves_no_checkpoint_and_a_machine_that_starts() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "web");
    for which in ["pid", "shim_pid"] {
        client.run("web", &format!("echo {which} > /srv/mark; sync"));
        let vm = client.inspect("web");
        let victim = vm["process"][which].as_u64().and_then(|pid| u32::try_from(pid).ok());
        let mut other = daemon.client();
        let saving = std::thread::spawn(move || {
            outcome(&mut other, "vm_checkpoint", json!({ "vm": "web", "wait_s": 45 }))
        });
        until_saving(&daemon);
        kill_process(victim.expect("a running VM has it"));
        let saved = saving.join().expect("no panic");
        assert!(saved.is_err(), "{which}: {saved:?}");
        client.wait_for("web", "its end", |vm| {
            ["crashed", "failed", "stopped"].contains(&vm["state"].as_str().unwrap_or_default())
        });
        assert_files(&daemon, &mut client);
        assert_in_order(&daemon);
        client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
        client.wait_for_state("web", "ready");
        assert_eq!(client.run("web", "cat /srv/mark").stdout, format!("{which}\n"));
    }
    let whole = checkpoint(&mut client, "web", "whole");
    assert_eq!(whole["quiesced"], true, "{whole}");
    delete_all(&daemon, &mut client);
}

/// Waits until a VM has a process that is not the one before, and returns its pid.
#[track_caller]
fn next_process(client: &mut Client, vm: &str, which: &str, before: Option<u64>) -> u32 {
    let next = until(BOOT, || {
        let vm = client.call("vm_inspect", json!({ "vm": vm })).ok()?;
        vm["process"][which].as_u64().filter(|pid| Some(*pid) != before)
    });
    let next = next.unwrap_or_else(|| panic!("{vm} has no {which}"));
    u32::try_from(next).expect("a process id")
}

#[test]
fn a_vmm_or_a_shim_that_is_killed_within_a_restore_leaves_no_fork_and_a_machine_that_starts() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    client.run("web", "echo then > /srv/mark; sync");
    // Until it is through, what is restored is not done.
    hook(&mut client, "sleep 6");
    checkpoint(&mut client, "web", "clean");
    let begin = |tool: &'static str, arguments: Value| {
        let mut client = daemon.client();
        std::thread::spawn(move || outcome(&mut client, tool, arguments))
    };
    for which in ["pid", "shim_pid"] {
        let fork = json!({ "vm": "web", "checkpoint": "clean", "names": ["a", "b"], "wait_s": 45 });
        let forking = begin("vm_fork", fork);
        kill_process(next_process(&mut client, "a", which, None));
        let forked = forking.join().expect("no panic");
        assert!(forked.is_err(), "{which}: {forked:?}");
        assert_eq!(vms(&mut client), 1, "{which}");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{which}");
        goes_on(&mut client, "web");
        assert_in_order(&daemon);
    }
    for which in ["pid", "shim_pid"] {
        client.run("web", &format!("echo {which} > /srv/mark; sync"));
        let before = client.inspect("web")["process"][which].as_u64();
        let back = json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 });
        let rolling = begin("vm_rollback", back);
        kill_process(next_process(&mut client, "web", which, before));
        let rolled = rolling.join().expect("no panic");
        assert!(rolled.is_err(), "{which}: {rolled:?}");
        client.wait_for("web", "its end", |vm| {
            ["crashed", "failed", "stopped"].contains(&vm["state"].as_str().unwrap_or_default())
        });
        assert_in_order(&daemon);
        // Its drives are those of the checkpoint.
        client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
        client.wait_for_state("web", "ready");
        assert_eq!(client.run("web", "cat /srv/mark").stdout, "then\n", "{which}");
    }
    assert_files(&daemon, &mut client);
    delete_all(&daemon, &mut client);
}

/// Writes a hook that runs whenever the guest goes on from a checkpoint.
fn hook(client: &mut Client, text: &str) {
    let path = "/etc/nexus/fork.d/10-hook";
    let content = format!("#!/bin/sh\n{text}\n");
    client.run("web", "mkdir -p /etc/nexus/fork.d");
    client.must("guest_file_write", json!({ "vm": "web", "path": path, "content": content, "mode": "0755" }));
    assert_eq!(client.run("web", &format!("test -x {path}")).exit_code, Some(0));
}

#[test]
fn a_guest_that_does_not_prove_what_it_renewed_is_ended_and_its_parent_runs_on() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    let fork = json!({ "vm": "web", "names": ["a", "b"], "wait_s": 45 });
    // A hook that fails, an agent that says nothing any more once it has begun to renew, and one that has to begin anew then.
    for (text, why) in
        [("exit 7".to_owned(), Some("10-hook")), (signal_agent("STOP"), None), (signal_agent("KILL"), None)]
    {
        hook(&mut client, &text);
        let failure = outcome(&mut client, "vm_fork", fork.clone()).expect_err("it is not proven");
        assert!(why.is_none_or(|why| failure.text.contains(why)), "{}", failure.text);
        assert_eq!(vms(&mut client), 1, "{}", failure.text);
        assert_eq!(client.inspect("web")["boot_id"], boot);
        goes_on(&mut client, "web");
        assert_in_order(&daemon);
    }
    client.run("web", "rm /etc/nexus/fork.d/10-hook");
    let made = outcome(&mut client, "vm_fork", fork).unwrap_or_else(|e| panic!("{}", e.text));
    assert_eq!(made["vms"].as_array().map(Vec::len), Some(2), "{made}");
    for name in ["a", "b"] {
        goes_on(&mut client, name);
        client.must_confirmed("vm_delete", json!({ "vm": name, "force": true }));
    }

    // An agent that is killed while it has to stop the commands: the checkpoint says what it is worth, or is none.
    let stop = format!("{}; echo it stands still > /dev/console", signal_agent("STOP"));
    let kill = format!("sleep 1; {stop}; sleep 4; {}", signal_agent("KILL"));
    client.must("guest_command_start", json!({ "vm": "web", "command": kill }));
    assert!(is_on_console(&mut client, "web", "it stands still"), "the agent is not stopped");
    if let Ok(taken) = outcome(&mut client, "vm_checkpoint", json!({ "vm": "web", "wait_s": 45 })) {
        assert_eq!(taken["quiesced"], false, "{taken}");
    }
    client.wait_for_state("web", "ready");
    goes_on(&mut client, "web");
    assert_eq!(client.inspect("web")["boot_id"], boot);

    // One that is killed while they stand still, by a process that is not one of them: the next one lets them go on.
    let leave = "echo $$ > /sys/fs/cgroup/cgroup.procs; echo it is outside > /dev/console";
    let frozen = "until read -r told < /sys/fs/cgroup/nexus/cgroup.freeze && [ $told = 1 ]; do :; done";
    let kill = format!("{leave}; {frozen}; {}; echo it is killed > /dev/console", signal_agent("KILL"));
    client.must("guest_command_start", json!({ "vm": "web", "command": kill }));
    assert!(is_on_console(&mut client, "web", "it is outside"), "it is a command still");
    outcome(&mut client, "vm_checkpoint", json!({ "vm": "web", "wait_s": 45 })).ok();
    assert!(is_on_console(&mut client, "web", "it is killed"), "the agent is not killed");
    client.wait_for_state("web", "ready");
    goes_on(&mut client, "web");
    assert_eq!(client.inspect("web")["boot_id"], boot);
    assert_files(&daemon, &mut client);
    delete_all(&daemon, &mut client);
    assert_in_order(&daemon);
}
