//! What a daemon that is killed within a restore leaves: drives that are replaced together, and guests that nobody renewed.
//!
//! Machines here are processes, which cannot be saved; so rows and files of restores are planted.

use std::fs;
use std::path::PathBuf;

use nexus_schema::id::DriveId;
use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::checkpoints::{database, plant};
use crate::world::{SOON, World, is_alive, process, refused, soon};

/// The size that drives have at the planted checkpoint.
const SIZE: u64 = 100 << 20;

/// The drives of a stopped machine, with a data drive beside its root drive.
struct Drives {
    ids: Vec<DriveId>,
}

impl Drives {
    fn attach(world: &World, client: &mut Client) -> Self {
        world.create(client, "web");
        client.to_the_end("drive_create", json!({ "name": "data", "size": "64MiB" }), SOON);
        client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
        client.wait_for_state("web", "stopped");
        client.must("drive_attach", json!({ "drive": "data", "vm": "web" }));
        plant(world, "web", 1001, "clean", "uid:0");
        let database = database(world);
        let mut rows =
            database.prepare("SELECT drive_id FROM vm_drives ORDER BY position").expect("a statement");
        let ids = rows.query_map([], |row| row.get::<_, i64>(0)).expect("rows");
        let ids = ids.map(|id| DriveId::from_i64(id.expect("a number")).expect("an id"));
        Self { ids: ids.collect() }
    }

    /// Stops the machine and takes the data drive away, which does not go with it.
    fn detach(client: &mut Client) {
        client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
        client.wait_for_state("web", "stopped");
        client.must("drive_detach", json!({ "drive": "data" }));
    }

    fn place(&self, world: &World, at: usize) -> PathBuf {
        world.daemon.state().join("drives").join(self.ids[at].to_string())
    }

    /// The first words on each drive.
    fn words(&self, world: &World) -> Vec<String> {
        let read = |at| fs::read_to_string(self.place(world, at).join("disk.ext4")).unwrap_or_default();
        (0..self.ids.len()).map(read).collect()
    }

    /// Takes a drive away, and its copy of the rollback `new`; returns where the copy was and where it is.
    fn take_away(&self, world: &World, at: usize) -> (PathBuf, PathBuf) {
        let [staged, away, old] =
            [&format!("drives/.nexus-new-{at}"), "away", "old"].map(|name| world.daemon.state().join(name));
        fs::rename(&staged, &away).expect("a directory is moved");
        fs::rename(self.place(world, at), old).expect("a directory is moved");
        (staged, away)
    }

    /// Plants a rollback of which nothing is done yet; its drives will have these words on them.
    fn plant(&self, world: &World, words: &str) {
        let staged: Vec<String> = (0..self.ids.len()).map(|at| format!(".nexus-{words}-{at}")).collect();
        for (at, name) in staged.iter().enumerate() {
            let copy = world.daemon.state().join("drives").join(name);
            fs::create_dir(&copy).expect("a directory is made");
            fs::write(copy.join("disk.ext4"), format!("{words}-{at}")).expect("a disk is written");
        }
        let drives = self.ids.iter().zip(&staged);
        let drives: Vec<Value> = drives
            .map(|(id, staged)| json!({ "drive": id.to_string(), "staged": staged, "size_bytes": SIZE }))
            .collect();
        database(world)
            .execute(
                "INSERT INTO rollbacks (vm_id, checkpoint_id, drives) VALUES ((SELECT id FROM vms WHERE name = 'web'), 1001, ?1)",
                [Value::from(drives).to_string()],
            )
            .expect("a row is planted");
    }
}

fn number(world: &World, sql: &str) -> i64 {
    database(world).query_row(sql, [], |row| row.get(0)).expect("a number")
}

/// Whether nothing of a rollback is left to do.
#[track_caller]
fn assert_finished(world: &World, drives: &Drives, words: &str) {
    assert_eq!(drives.words(world), [format!("{words}-0"), format!("{words}-1")]);
    assert_eq!(number(world, "SELECT count(*) FROM rollbacks"), 0);
    let sizes = format!("SELECT count(*) FROM drives WHERE size_bytes = {SIZE}");
    assert_eq!(number(world, &sizes), 2);
    assert_eq!(number(world, "SELECT count(*) FROM vms WHERE checkpoint_id = 1001"), 1);
    world.assert_in_order();
}

#[test]
fn all_drives_are_replaced_at_whatever_point_that_was_cut_off() {
    let mut world = World::new();
    let mut client = world.client();
    let drives = Drives::attach(&world, &mut client);
    for point in ["rollback-drive-away", "rollback-drive-placed", "rollback-drives"] {
        world.daemon.stop();
        database(&world).execute("UPDATE vms SET checkpoint_id = NULL", []).expect("a row is changed");
        database(&world).execute("UPDATE drives SET size_bytes = 1", []).expect("rows are changed");
        drives.plant(&world, point);
        world.daemon.set("NEXUS_FAILPOINT", Some(point));
        world.daemon.restart_until_ended();
        let reached = format!("ending at a failpoint point=\"{point}\"");
        assert!(world.daemon.log().contains(&reached), "{point} was not reached\n{}", world.daemon.log());
        world.daemon.set("NEXUS_FAILPOINT", None);
        world.daemon.restart();
        assert_finished(&world, &drives, point);
    }
    let mut client = world.client();
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    Drives::detach(&mut client);
}

#[test]
fn nothing_uses_drives_of_which_some_are_replaced() {
    let mut world = World::new();
    let mut client = world.client();
    let drives = Drives::attach(&world, &mut client);
    world.daemon.stop();
    drives.plant(&world, "new");
    // The copy of the data drive cannot be read, and neither can the drive.
    let (staged, away) = drives.take_away(&world, 1);
    world.daemon.restart();
    let mut client = world.client();
    let vm = client.inspect("web");
    assert_eq!(vm["state"], "stopped", "{vm}");
    assert!(vm["reason"].to_string().contains("rollback is not finished"), "{vm}");
    let failure = refused(&mut client, "vm_start", json!({ "vm": "web", "wait_s": 45 }));
    assert!(failure.text.contains("rollback is not finished"), "{}", failure.text);
    assert_eq!(refused(&mut client, "drive_detach", json!({ "drive": "data" })).code, "busy");
    let root: String = database(&world)
        .query_row("SELECT name FROM drives WHERE made_for IS NOT NULL", [], |row| row.get(0))
        .expect("the root drive has a row");
    let copy = json!({ "name": "copy", "from": format!("drive:{root}"), "wait_s": 45 });
    assert_eq!(refused(&mut client, "drive_create", copy).code, "busy");
    assert_eq!(number(&world, "SELECT count(*) FROM rollbacks"), 1);
    // Once the cause is gone, a start finishes it.
    fs::rename(&away, &staged).expect("a directory is moved");
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    assert!(client.inspect("web")["reason"].is_null());
    assert_finished(&world, &drives, "new");
    Drives::detach(&mut client);
}

#[test]
fn drives_stay_locked_if_a_rollback_panics_in_the_middle() {
    let mut world = World::new();
    let mut client = world.client();
    let drives = Drives::attach(&world, &mut client);
    world.daemon.stop();
    drives.plant(&world, "new");
    // The start of the daemon cannot begin with it: neither the copy of the first drive can be read, nor the drive.
    let (staged, away) = drives.take_away(&world, 0);
    world.daemon.set("NEXUS_FAILPOINT", Some("panic:rollback-drive-placed"));
    world.daemon.restart();
    let mut client = world.client();
    fs::rename(&away, &staged).expect("a directory is moved");
    let failure = refused(&mut client, "vm_start", json!({ "vm": "web", "wait_s": 45 }));
    assert_eq!(failure.code, "internal", "{}", failure.text);
    soon("its task runs again", || world.daemon.log().contains("restarting the task").then_some(()));
    // One drive is of another time than the other.
    let copy = json!({ "name": "copy", "from": "drive:data", "wait_s": 45 });
    assert_eq!(refused(&mut client, "drive_create", copy).code, "busy");
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_finished(&world, &drives, "new");
    assert_eq!(client.run("web", "echo up").stdout, "up\n");
    Drives::detach(&mut client);
}

#[test]
fn a_restored_guest_that_the_daemon_did_not_renew_is_ended_by_the_next_one() {
    let mut world = World::hostile(&[]);
    let mut client = world.client();
    let mut processes = Vec::new();
    for name in ["silent-restored", "silent-booted"] {
        let arguments = json!({ "name": name, "from": world.from, "disk": "128MiB", "wait_s": 0 });
        client.must("vm_create", arguments);
        let vm = client.wait_for(name, "a process", |vm| vm["process"]["pid"].is_u64());
        assert_eq!(vm["state"], "starting", "{vm}");
        processes.push(process(&vm, "pid"));
    }
    world.daemon.kill();
    database(&world)
        .execute("INSERT INTO restores SELECT id, boot_id FROM vms WHERE name = 'silent-restored'", [])
        .expect("a row is planted");
    world.daemon.restart();
    let mut client = world.client();
    let ended = client.wait_for_state("silent-restored", "failed");
    assert!(ended["reason"].to_string().contains("before the restored guest had renewed"), "{ended}");
    soon("its process has ended", || (!is_alive(processes[0])).then_some(()));
    // One that was not restored is waited for on.
    assert_eq!(client.inspect("silent-booted")["state"], "starting");
    assert!(is_alive(processes[1]));
}

#[test]
fn a_fork_reaches_no_more_than_its_parent_did_when_it_was_deleted() {
    let world = World::new();
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner");
    let scopes = ["read", "exec", "lifecycle"];
    let made = owner.must("token_create", json!({ "name": "ci", "tools": "all", "scopes": scopes }));
    let secret = made["token"].as_str().expect("a secret");
    let mut holder = Client::connect_with(&world.daemon.socket(), secret).expect("its holder");
    let fork = |holder: &mut Client, checkpoint: &str| {
        let call = json!({ "checkpoint": checkpoint, "wait_s": 45 });
        holder.call("vm_fork", call).expect_err("it cannot be restored here").code
    };
    // A token may not name files of the host, so it takes an image that is there.
    owner.to_the_end("image_create", json!({ "from": world.from, "name": "small" }), SOON);
    for (number, name) in [(1001, "open"), (1002, "closed")] {
        holder.create(json!({
            "name": name, "from": "image:small", "disk": "128MiB", "network": { "mode": "none" }, "wait_s": 45
        }));
        owner.must("vm_update", json!({ "vm": name, "network": { "mode": "proxy" } }));
        let maker: String = database(&world)
            .query_row("SELECT owner FROM vms WHERE name = ?1", [name], |row| row.get(0))
            .expect("the VM has a row");
        plant(&world, name, number, name, &maker);
        assert_ne!(fork(&mut holder, name), "forbidden");
    }
    owner.must("vm_update", json!({ "vm": "closed", "network": { "mode": "none" } }));
    assert_eq!(fork(&mut holder, "closed"), "forbidden");
    for name in ["open", "closed"] {
        holder.must_confirmed("vm_delete", json!({ "vm": name, "force": true }));
    }
    // The deletion opens nothing, and takes nothing away.
    assert_ne!(fork(&mut holder, "open"), "forbidden");
    assert_eq!(fork(&mut holder, "closed"), "forbidden");
}
