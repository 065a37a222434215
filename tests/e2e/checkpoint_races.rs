//! Several at once of what concerns one machine or one checkpoint, and forks of forks. Random numbers of many children are in
//! `tests/ondemand/checkpoints.rs`, those of some in `tests/e2e/checkpoints.rs`.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use nexus_tests::client::{BOOT, Client, Failure};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{
    assert_files, checkpoint, count, create, delete_all, goes_on, is_on_console, listed, outcome, roll_back,
    signal_agent,
};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// Makes two calls at once, each by a client of its own; what became of them.
fn at_once(daemon: &Daemon, calls: [(&'static str, Value); 2]) -> [Result<Value, Failure>; 2] {
    let begin = |(tool, arguments): (&'static str, Value)| {
        let mut client = daemon.client();
        thread::spawn(move || outcome(&mut client, tool, arguments))
    };
    calls.map(begin).map(|call| call.join().expect("no panic"))
}

/// How many of them succeeded; all others were refused because something else was under way.
#[track_caller]
fn succeeded(both: &[Result<Value, Failure>; 2]) -> usize {
    for failure in both.iter().filter_map(|one| one.as_ref().err()) {
        let codes = ["busy", "changed", "boot_changed", "vm_wrong_state", "checkpoint_not_found"];
        assert!(codes.contains(&failure.code.as_str()), "{}: {}", failure.code, failure.text);
    }
    both.iter().filter(|one| one.is_ok()).count()
}

fn names(client: &mut Client) -> BTreeSet<String> {
    let listed = client.must("vm_list", json!({}));
    let vms = listed["vms"].as_array().expect("a list").iter();
    vms.filter_map(|vm| Some(vm["name"].as_str()?.to_owned())).collect()
}

fn delete(client: &mut Client, names: &[&str]) {
    for name in names {
        client.must_confirmed("vm_delete", json!({ "vm": name, "force": true }));
    }
}

#[test]
fn two_at_once_and_forks_of_forks_leave_each_machine_whole() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "web");
    client.run("web", "echo then > /srv/mark; sync");
    count(&mut client, "web");

    // Two checkpoints.
    let take = |name: &str| ("vm_checkpoint", json!({ "vm": "web", "name": name, "wait_s": 45 }));
    let both = at_once(&daemon, [take("one"), take("two")]);
    assert_eq!(succeeded(&both), listed(&mut client).len());
    let clean = both.iter().flatten().next().expect("at least one succeeds")["id"].clone();
    goes_on(&mut client, "web");
    assert_files(&daemon, &mut client);

    // Two rollbacks: the last one that is begun wins.
    client.run("web", "echo now > /srv/mark; sync");
    let back = json!({ "vm": "web", "checkpoint": clean, "keep_current": false, "wait_s": 45 });
    let both = at_once(&daemon, [("vm_rollback", back.clone()), ("vm_rollback", back)]);
    assert!(succeeded(&both) >= 1);
    client.wait_for_state("web", "ready");
    goes_on(&mut client, "web");
    assert_eq!(client.run("web", "cat /srv/mark").stdout, "then\n");
    assert_in_order(&daemon);

    // Two forks.
    let fork = |name: &str| ("vm_fork", json!({ "checkpoint": clean, "names": [name], "wait_s": 45 }));
    let both = at_once(&daemon, [fork("a"), fork("b")]);
    assert_eq!(succeeded(&both), 2, "forks do not concern each other");
    for name in ["a", "b"] {
        goes_on(&mut client, name);
    }
    delete(&mut client, &["a", "b"]);

    // A deletion of the checkpoint that is forked: either waits, is refused, or is first.
    let gone = ("checkpoint_delete", json!({ "checkpoint": clean }));
    let [forked, deleted] = delete_within(&daemon, fork("c"), gone);
    assert!(forked.is_ok() || deleted.is_ok(), "one of them has its way");
    assert_eq!(names(&mut client).contains("c"), forked.is_ok(), "all of the fork or nothing");
    if forked.is_ok() {
        goes_on(&mut client, "c");
        delete(&mut client, &["c"]);
    }
    if deleted.is_err() {
        let deleted = until(Duration::from_mins(1), || {
            client.call_confirmed("checkpoint_delete", json!({ "checkpoint": clean })).ok()
        });
        assert!(deleted.is_some(), "it can be deleted once nobody uses it");
    }
    assert_files(&daemon, &mut client);
    delete_all(&daemon, &mut client);

    // A fork of a fork of a rollback.
    checkpoint(&mut client, "web", "first");
    client.run("web", "echo lost > /srv/mark");
    roll_back(&mut client, "web", "first");
    client.run("web", "echo web >> /srv/mark; echo web > /run/memory");
    for (of, name) in [("web", "child"), ("child", "grandchild")] {
        client.to_the_end("vm_fork", json!({ "vm": of, "names": [name], "wait_s": 45 }), BOOT);
        goes_on(&mut client, name);
        client.run(name, &format!("echo {name} >> /srv/mark; echo {name} >> /run/memory"));
    }
    assert_eq!(client.run("web", "cat /srv/mark /run/memory").stdout, "then\nweb\nweb\n");
    assert_eq!(client.run("child", "cat /srv/mark").stdout, "then\nweb\nchild\n");
    let last = client.run("grandchild", "cat /srv/mark /run/memory").stdout;
    assert_eq!(last, "then\nweb\nchild\ngrandchild\nweb\nchild\ngrandchild\n");
    let (child, grandchild) = (client.inspect("child"), client.inspect("grandchild"));
    assert_eq!(grandchild["parent_id"], child["id"]);
    assert_eq!(child["parent_id"], client.inspect("web")["id"]);
    let ids: BTreeSet<String> =
        ["child", "grandchild"].map(|vm| client.run(vm, "cat /etc/machine-id").stdout).into();
    assert_eq!(ids.len(), 2, "{ids:?}");
    // Each goes on without those that it came from.
    delete_all(&daemon, &mut client);
    delete(&mut client, &["web", "child"]);
    goes_on(&mut client, "grandchild");
    assert_in_order(&daemon);
}

/// Deletes a checkpoint as soon as an operation uses it.
fn delete_within(
    daemon: &Daemon,
    (fork, arguments): (&'static str, Value),
    (delete, checkpoint): (&'static str, Value),
) -> [Result<Value, Failure>; 2] {
    let mut client = daemon.client();
    let forking = thread::spawn(move || outcome(&mut client, fork, arguments));
    let mut client = daemon.client();
    let begun = until(Duration::from_mins(1), || {
        let ops = client.must("op_list", json!({ "limit": 1 }));
        (ops["ops"][0]["tool"] == fork && ops["ops"][0]["state"] == "running").then_some(())
    });
    assert!(begun.is_some(), "the fork never begins");
    let deleted = client.call_confirmed(delete, checkpoint);
    [forking.join().expect("no panic"), deleted]
}

/// A resize waits for the VM's agent, which stands still, and has its drive meanwhile.
#[test]
fn a_rollback_that_cannot_have_the_drives_leaves_the_machine_running() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    count(&mut client, "web");
    checkpoint(&mut client, "web", "clean");
    let drive = client.inspect("web")["drives"][0].clone();
    let drive = client.must("drive_inspect", json!({ "drive": drive["name"] }));
    let disk = drive["path"].as_str().expect("a path").to_owned();
    let length = || std::fs::metadata(&disk).expect("the drive's file").len();
    let before = length();
    let line = format!(
        "sleep 1; {}; echo it stands still > /dev/console; sleep 45; {}",
        signal_agent("STOP"),
        signal_agent("CONT")
    );
    client.must("guest_command_start", json!({ "vm": "web", "command": line }));
    assert!(is_on_console(&mut client, "web", "it stands still"), "the agent is not stopped");
    let mut other = daemon.client();
    let resize = json!({ "drive": drive["name"], "size": format!("{}B", before + (64 << 20)) });
    let resizing = thread::spawn(move || other.call("drive_resize", resize).map(|_| ()));
    let begun = until(Duration::from_mins(1), || (length() > before).then_some(()));
    assert!(begun.is_some(), "the resize has not begun");

    let back = json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 });
    match outcome(&mut client, "vm_rollback", back) {
        Err(failure) => {
            assert_eq!(failure.code, "busy", "{}", failure.text);
            assert_eq!(client.inspect("web")["boot_id"], boot, "{}", failure.text);
        }
        // On a slow machine.
        Ok(_) => assert!(resizing.is_finished(), "the drive was replaced while it was resized"),
    }
    resizing.join().expect("no panic").ok();
    client.wait_for_state("web", "ready");
    goes_on(&mut client, "web");
    delete_all(&daemon, &mut client);
    assert_in_order(&daemon);
}
