//! Memories of real machines that are packed, and unpacked when something goes on from them: exactly what they were, whatever cuts that off.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{
    assert_files, checkpoint, count, create, delete_all, goes_on, kill_at, outcome, roll_back,
};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// How long packing may take on a busy machine.
const PACKED: Duration = Duration::from_mins(3);

fn row(client: &mut Client) -> Value {
    rows(client).swap_remove(0)
}

/// Has all checkpoints packed; returns the row of the first one.
#[track_caller]
fn pack(client: &mut Client) -> Value {
    pack_all(client).swap_remove(0)
}

fn rows(client: &mut Client) -> Vec<Value> {
    let listed = client.must("checkpoint_list", json!({ "vm": "web" }));
    listed["checkpoints"].as_array().expect("a list").clone()
}

/// The same; returns all rows.
#[track_caller]
fn pack_all(client: &mut Client) -> Vec<Value> {
    let after = |client: &mut Client, time: &str| {
        client.must("settings_set", json!({ "values": { "checkpoint.pack_after": time } }));
    };
    after(client, "1s");
    let are_packed = |rows: &Vec<Value>| rows.iter().all(|row| row["unpacked_bytes"].is_u64());
    let packed = until(PACKED, || Some(rows(client)).filter(are_packed));
    after(client, "off");
    packed.unwrap_or_else(|| panic!("not packed: {:?}", rows(client)))
}

/// The names of a checkpoint's files that are of its memory.
fn memories(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("its directory").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("ram")).collect();
    names.sort();
    names
}

#[test]
fn machines_go_on_from_a_packed_memory_exactly_as_it_was() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "web");
    // What is only in memory: a file, and what a command counts.
    let noise = client.run("web", "head -c 8000000 /dev/urandom > /run/noise; md5sum /run/noise").stdout;
    count(&mut client, "web");
    let taken = checkpoint(&mut client, "web", "clean");
    let directory = daemon.state().join("checkpoints").join(taken["id"].as_str().expect("an id"));
    assert_eq!(memories(&directory), ["ram"]);
    let packed = pack(&mut client);
    assert_eq!(memories(&directory), ["ram.packed"]);
    let bytes = |row: &Value, field: &str| row[field].as_u64().unwrap_or_default();
    assert!(bytes(&packed, "memory_bytes") < bytes(&taken, "memory_bytes") / 4 * 3, "{packed} and {taken}");
    let apart = bytes(&packed, "unpacked_bytes").abs_diff(bytes(&taken, "memory_bytes"));
    assert!(apart < 1 << 20, "{packed} and {taken}");
    assert!(packed["problem"].is_null(), "{packed}");
    goes_on(&mut client, "web");

    // Two that begin at once unpack it once.
    let fork = |names: &[&str]| json!({ "checkpoint": "clean", "names": names, "wait_s": 45 });
    let mut other = daemon.client();
    let second = std::thread::spawn(move || {
        outcome(
            &mut other,
            "vm_rollback",
            json!({ "vm": "web", "checkpoint": "clean", "keep_current": false, "wait_s": 45 }),
        )
    });
    client.to_the_end("vm_fork", fork(&["a"]), BOOT);
    second.join().expect("no panic").unwrap_or_else(|failure| panic!("{}", failure.text));
    for vm in ["a", "web"] {
        client.wait_for_state(vm, "ready");
        assert_eq!(client.run(vm, "md5sum /run/noise").stdout, noise, "{vm}");
        goes_on(&mut client, vm);
    }
    client.must_confirmed("vm_delete", json!({ "vm": "a", "force": true }));
    assert_eq!(memories(&directory), ["ram"]);
    let unpacked = row(&mut client);
    assert!(unpacked["unpacked_bytes"].is_null(), "{unpacked}");
    assert!(bytes(&unpacked, "memory_bytes") > bytes(&packed, "memory_bytes"), "{unpacked}");

    // Cut off, it is there in one form, and the next fork goes on from that.
    for (point, left) in [("checkpoint-unpacked", "ram.packed"), ("checkpoint-unpack-named", "ram")] {
        pack(&mut daemon.client());
        let mut client = kill_at(&mut daemon, point, "web", "vm_fork", fork(&["cut"]));
        assert_eq!(memories(&directory), [left], "{point}");
        let row = row(&mut client);
        assert_eq!(row["unpacked_bytes"].is_null(), left == "ram", "{point}: {row}");
        client.wait_for_state("web", "ready");
        let gone = client.call("vm_inspect", json!({ "vm": "cut" })).expect_err("it was never made");
        assert_eq!(gone.code, "vm_not_found", "{}", gone.text);
        assert_in_order(&daemon);
    }
    let mut client = daemon.client();
    client.to_the_end("vm_fork", fork(&["b"]), BOOT);
    assert_eq!(client.run("b", "md5sum /run/noise").stdout, noise);
    goes_on(&mut client, "b");
    client.must_confirmed("vm_delete", json!({ "vm": "b", "force": true }));

    // A damaged one is refused, and its VM runs on.
    pack(&mut client);
    let file = File::options().read(true).write(true).open(directory.join("ram.packed")).expect("it");
    let middle = file.metadata().expect("its length").len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).expect("a byte is read");
    file.write_all_at(&[byte[0] ^ 1], middle).expect("a byte is written");
    let refused = outcome(&mut client, "vm_fork", fork(&["c"])).expect_err("it is damaged");
    assert_eq!(refused.code, "verification_failed", "{}", refused.text);
    assert_eq!(memories(&directory), ["ram.packed"]);
    goes_on(&mut client, "web");
    file.write_all_at(&byte, middle).expect("a byte is written");
    roll_back(&mut client, "web", "clean");
    assert_eq!(client.run("web", "md5sum /run/noise").stdout, noise);
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": "clean" }));
    asks_the_quota(&daemon, &mut client);
    assert_eq!(client.run("web", "md5sum /run/noise").stdout, noise);

    // A later one of the same boot is packed as what differs from the first, and is whole when that is deleted.
    checkpoint(&mut client, "web", "first");
    let more = client.run("web", "head -c 100000 /dev/urandom > /run/more; md5sum /run/more").stdout;
    checkpoint(&mut client, "web", "second");
    let before = pack_all(&mut client);
    let sizes: Vec<u64> = before.iter().map(|row| bytes(row, "memory_bytes")).collect();
    assert!(sizes[1] < sizes[0] / 2, "{sizes:?}");
    let both = format!("{noise}{more}");
    for name in ["d", "e"] {
        let fork = json!({ "checkpoint": "second", "names": [name], "wait_s": 45 });
        client.to_the_end("vm_fork", fork, BOOT);
        assert_eq!(client.run(name, "md5sum /run/noise /run/more").stdout, both, "{name}");
        goes_on(&mut client, name);
        client.must_confirmed("vm_delete", json!({ "vm": name, "force": true }));
        if name == "d" {
            pack_all(&mut client);
            client.must_confirmed("checkpoint_delete", json!({ "checkpoint": "first" }));
            assert!(bytes(&row(&mut client), "memory_bytes") > sizes[0] / 2);
        }
    }
    assert_files(&daemon, &mut client);
    pack(&mut client);
    delete_all(&daemon, &mut client);
}

/// Whoever goes on from a checkpoint, the quota of who took it has to have room for what its memory takes more once it is unpacked.
#[track_caller]
fn asks_the_quota(daemon: &Daemon, client: &mut Client) {
    const QUOTA: u64 = 4 << 30;
    let mut owner = Client::connect_at(&daemon.socket(), "/mcp?tools=all").expect("the owner connects");
    let quota = json!({ "disk": format!("{QUOTA}B") });
    let made = owner.must("token_create", json!({ "tools": "all", "all_vms": true, "quota": quota }));
    let secret = made["token"].as_str().expect("a secret");
    let mut holder = Client::connect_with(&daemon.socket(), secret).expect("the token's holder connects");
    let taken = checkpoint(&mut holder, "web", "theirs");
    let directory = daemon.state().join("checkpoints").join(taken["id"].as_str().expect("an id"));
    let packed = pack(client);
    let bytes = |field: &str| packed[field].as_u64().expect("a size");
    let left = QUOTA - bytes("memory_bytes") - bytes("disk_bytes");
    // Far less than the memory takes more.
    let rest = (left - (1 << 20)) / 4096 * 4096;
    let drive = json!({ "name": "rest", "size": format!("{rest}B"), "wait_s": 45 });
    // The list looks at the file, and the quota has the new size a moment later.
    let drive = until(BOOT, || match outcome(&mut holder, "drive_create", drive.clone()) {
        Err(failure) if failure.code == "quota_exceeded" => None,
        made => Some(made.unwrap_or_else(|failure| panic!("{}", failure.text))),
    });
    assert!(drive.is_some(), "the quota has no room for what is left of it");
    let fork = json!({ "checkpoint": "theirs", "names": ["none"], "wait_s": 45 });
    let back = json!({ "vm": "web", "checkpoint": "theirs", "keep_current": false, "wait_s": 45 });
    for (by, tool, arguments) in [(&mut holder, "vm_fork", fork), (&mut *client, "vm_rollback", back)] {
        let refused = outcome(by, tool, arguments).expect_err("the quota has no room for it");
        assert_eq!(refused.code, "quota_exceeded", "{tool}: {}", refused.text);
        assert!(refused.text.contains("theirs is packed"), "{tool}: {}", refused.text);
        assert_eq!(memories(&directory), ["ram.packed"], "{tool}");
    }
    goes_on(client, "web");
    holder.must_confirmed("drive_delete", json!({ "drive": "rest" }));
    roll_back(client, "web", "theirs");
    assert_eq!(memories(&directory), ["ram"]);
    goes_on(client, "web");
    client.must_confirmed("checkpoint_delete", json!({ "checkpoint": "theirs" }));
}
