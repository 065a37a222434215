//! A copy of the database that is put back is older than the files: what it does not know is kept, and what it says is not taken for the present.

use std::fs;
use std::path::{Path, PathBuf};

use nexus_tests::client::Client;
use nexus_tests::daemon::kill_process;
use rusqlite::Connection;
use serde_json::{Value, json};

use crate::world::{SOON, World, is_alive, process, refused, soon};

/// Makes a whole copy of the database, also of one that is in use.
fn copy(world: &World) -> PathBuf {
    let copy = world.path("copy.db");
    let database = Connection::open(world.daemon.state().join("nexus.db")).expect("the database");
    database.execute("VACUUM INTO ?1", [copy.to_str().expect("a path of UTF-8")]).expect("it is copied");
    copy
}

/// Puts a copy in the place of the database of a daemon that does not run.
fn put_back(world: &World, copy: &Path) {
    let state = world.daemon.state();
    for name in ["nexus.db-wal", "nexus.db-shm"] {
        fs::remove_file(state.join(name)).ok();
    }
    fs::copy(copy, state.join("nexus.db")).expect("the copy is put back");
}

/// Makes a VM that does not run.
fn make(world: &World, client: &mut Client, name: &str) -> Value {
    let mut arguments = world.arguments(name);
    arguments["start"] = false.into();
    client.to_the_end("vm_create", arguments, SOON)
}

/// What was made since a copy of the database, in the state directory.
struct Since {
    places: Vec<PathBuf>,
    disk: PathBuf,
    content: Vec<u8>,
}

impl Since {
    /// Makes a VM, a data drive of it, and an image.
    fn make(world: &World) -> Self {
        let mut client = world.client();
        let second = make(world, &mut client, "second");
        let data = client.to_the_end("drive_create", json!({ "name": "data", "size": "16MiB" }), SOON);
        client.must("drive_attach", json!({ "drive": "data", "vm": "second", "mount": "/data" }));
        let image = json!({ "from": world.from, "name": "later", "wait_s": 45 });
        client.to_the_end("image_create", image, SOON);
        let image = client.must("image_inspect", json!({ "image": "later" }));
        let second = client.must("vm_inspect", json!({ "vm": second["id"] }));
        let root = &second["drives"][0];
        let ids = [("drives", &root["id"]), ("drives", &data["id"]), ("images", &image["id"])];
        let state = world.daemon.state();
        let places = ids.map(|(directory, id)| state.join(directory).join(id.as_str().expect("an id")));
        let disk = PathBuf::from(data["path"].as_str().expect("a path"));
        let content = fs::read(&disk).expect("the disk is read");
        Self { places: places.into(), disk, content }
    }

    /// It is all there and listed, and the daemon knows only what the copy knows.
    #[track_caller]
    fn assert_kept(&self, world: &World) {
        let mut client = world.client();
        assert_eq!(client.inspect("first")["state"], "created");
        assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "second" })).code, "vm_not_found");
        let list = fs::read(world.daemon.state().join("kept.json")).expect("the list");
        let list: Vec<String> = serde_json::from_slice(&list).expect("names");
        for place in &self.places {
            assert!(place.exists(), "{}\n{}", place.display(), world.daemon.log());
            let name = place.file_name().expect("a name").to_string_lossy();
            assert!(list.iter().any(|kept| *kept == name), "{name} is not in {list:?}");
        }
        assert!(fs::read(&self.disk).expect("the disk is read") == self.content, "the disk has changed");
        assert!(world.daemon.log().contains("the database is an older copy"), "{}", world.daemon.log());
    }

    /// Removes it, as somebody does who does not need it.
    fn remove(self) {
        for place in self.places {
            fs::remove_dir_all(place).expect("nobody else removes it");
        }
    }
}

/// Puts a copy back that was made before `Since`, and starts the daemon twice.
fn start_with(world: &mut World, copy: &Path, since: Since) {
    world.daemon.stop();
    put_back(world, copy);
    for _ in 0..2 {
        world.daemon.restart();
        since.assert_kept(world);
        world.daemon.stop();
    }
    world.daemon.restart();
    since.assert_kept(world);
    since.remove();
    world.client().to_the_end("vm_start", json!({ "vm": "first" }), SOON);
    world.assert_in_order();
}

#[test]
fn what_an_older_database_does_not_know_is_kept() {
    let mut world = World::new();
    make(&world, &mut world.client(), "first");
    world.daemon.stop();
    let copy = copy(&world);
    world.daemon.restart();
    let since = Since::make(&world);
    start_with(&mut world, &copy, since);
}

#[test]
fn a_copy_of_a_database_in_use_is_older_once_its_daemon_has_stopped() {
    let mut world = World::new();
    make(&world, &mut world.client(), "first");
    let copy = copy(&world);
    let since = Since::make(&world);
    start_with(&mut world, &copy, since);
}

#[test]
fn a_start_with_an_older_database_that_is_cut_off_costs_nothing() {
    let mut world = World::new();
    make(&world, &mut world.client(), "first");
    let copy = copy(&world);
    let since = Since::make(&world);
    world.daemon.stop();
    put_back(&world, &copy);
    for point in ["unknown-kept", "recovered"] {
        world.daemon.set("NEXUS_FAILPOINT", Some(point));
        world.daemon.restart_until_ended();
    }
    world.daemon.set("NEXUS_FAILPOINT", None);
    // It is still an older one, so this is kept, too.
    let stray = world.daemon.state().join("drives/stray");
    fs::create_dir(&stray).expect("a directory is made");
    world.daemon.restart();
    since.assert_kept(&world);
    fs::remove_dir(&stray).expect("it was kept");
    since.remove();
    world.assert_in_order();
}

#[test]
fn what_has_no_epoch_that_can_be_read_is_kept_and_what_never_had_one_is_tidied_up() {
    let mut world = World::new();
    make(&world, &mut world.client(), "first");
    world.daemon.stop();
    let (epoch, stray) = (world.daemon.state().join("epoch"), world.daemon.state().join("drives/stray"));
    fs::write(&epoch, "no epoch").expect("the file is written");
    fs::create_dir(&stray).expect("a directory is made");
    world.daemon.restart();
    assert!(stray.exists(), "{}", world.daemon.log());
    let counted: u64 = fs::read_to_string(&epoch).expect("the file").trim().parse().expect("an epoch");
    world.daemon.stop();
    let later: u64 = fs::read_to_string(&epoch).expect("the file").trim().parse().expect("an epoch");
    assert!(later > counted, "{later} and {counted}");
    fs::remove_dir(&stray).expect("nobody else removes it");

    // A state directory of an earlier version has no such file.
    fs::remove_file(&epoch).expect("the file was there");
    let other = world.daemon.state().join("drives/other");
    fs::create_dir(&other).expect("a directory is made");
    world.daemon.restart();
    assert!(!other.exists(), "{}", world.daemon.log());
    assert!(epoch.exists());
    world.assert_in_order();
}

#[test]
fn what_an_older_database_knows_may_have_changed_since() {
    let mut world = World::new();
    let mut client = world.client();
    let mut arguments = world.arguments("busy");
    arguments["ttl"] = "1h".into();
    let end = client.create(arguments)["expires_at"].as_str().expect("a time").to_owned();
    make(&world, &mut client, "gone");
    client.to_the_end("drive_create", json!({ "name": "grown", "size": "16MiB" }), SOON);
    let copy = copy(&world);
    client.to_the_end("vm_restart", json!({ "vm": "busy" }), SOON);
    client.must_confirmed("vm_delete", json!({ "vm": "gone" }));
    client.must("drive_resize", json!({ "drive": "grown", "size": "64MiB" }));
    let shim = process(&client.wait_for_state("busy", "ready"), "shim_pid");
    world.daemon.stop();
    put_back(&world, &copy);
    world.daemon.restart();

    // It runs on, but a boot that nobody knows cannot be reached, and nothing else may write to its disk.
    let mut client = world.client();
    let busy = client.inspect("busy");
    let reason = busy["reason"].as_str().unwrap_or_default();
    assert!(reason.contains(&format!("end process {shim}")), "{busy}");
    assert_eq!(busy["state"], "crashed", "{busy}");
    // In a day, not in an hour.
    assert!(busy["expires_at"].as_str().is_some_and(|later| *later > *end), "{busy} after {end}");
    assert_eq!(
        refused(&mut client, "vm_start", json!({ "vm": "busy", "wait_s": 45 })).code,
        "vm_wrong_state"
    );
    assert!(is_alive(shim), "{}", world.daemon.log());
    assert_eq!(client.must("drive_inspect", json!({ "drive": "grown" }))["size"], "64MiB");
    // Its disk is gone.
    assert_eq!(
        refused(&mut client, "vm_start", json!({ "vm": "gone", "wait_s": 45 })).code,
        "drive_not_found"
    );
    client.must_confirmed("vm_delete", json!({ "vm": "gone" }));

    kill_process(shim);
    soon("the shim ends", || (!is_alive(shim)).then_some(()));
    client.to_the_end("vm_start", json!({ "vm": "busy" }), SOON);
    assert_eq!(client.run("busy", "echo up").stdout, "up\n");
    world.assert_in_order();
}

#[test]
fn a_vm_that_an_older_database_has_as_not_started_runs_on_at_each_later_start() {
    let mut world = World::new();
    let mut client = world.client();
    let root = make(&world, &mut client, "early")["drives"][0]["name"].clone();
    let root = root.as_str().expect("a name");
    client.to_the_end("drive_create", json!({ "name": "other", "size": "16MiB" }), SOON);
    let copy = copy(&world);
    client.to_the_end("vm_start", json!({ "vm": "early" }), SOON);
    let shim = process(&client.wait_for_state("early", "ready"), "shim_pid");
    world.daemon.stop();
    put_back(&world, &copy);
    for start in 1..=3 {
        world.daemon.restart();
        let mut client = world.client();
        assert_eq!(client.inspect("early")["state"], "created");
        let clone = format!("drive:{root}");
        for (tool, arguments) in [
            ("vm_start", json!({ "vm": "early", "wait_s": 45 })),
            ("drive_resize", json!({ "drive": root, "size": "256MiB" })),
            ("drive_detach", json!({ "drive": root })),
            ("drive_attach", json!({ "drive": "other", "vm": "early" })),
            ("drive_create", json!({ "from": clone, "name": "clone", "wait_s": 45 })),
        ] {
            let refused = refused(&mut client, tool, arguments);
            assert_eq!(refused.code, "vm_wrong_state", "start {start}: {tool}: {}", refused.text);
            assert!(refused.text.contains(&format!("end process {shim}")), "{tool}: {}", refused.text);
        }
        let deleted = client.call_confirmed("vm_delete", json!({ "vm": "early" }));
        assert!(deleted.is_err_and(|failure| failure.code == "vm_wrong_state"), "start {start}");
        assert!(is_alive(shim), "start {start}\n{}", world.daemon.log());
        world.daemon.stop();
    }
    kill_process(shim);
    soon("the shim ends", || (!is_alive(shim)).then_some(()));
    world.daemon.restart();
    let mut client = world.client();
    client.to_the_end("vm_start", json!({ "vm": "early" }), SOON);
    assert_eq!(client.run("early", "echo up").stdout, "up\n");
    world.assert_in_order();
}

#[test]
fn a_boot_that_an_older_database_has_as_begun_is_not_ended() {
    let mut world = World::new();
    let mut client = world.client();
    for name in ["later", "renewed"] {
        world.create(&mut client, name);
    }
    let copy = copy(&world);
    // As if it had been made while one was being started, which has another boot since, and the other one was being restored, which is over since.
    let rows = Connection::open(&copy).expect("the copy");
    let begun =
        "UPDATE vms SET state = 'starting', guest = NULL, shim_pid = NULL, shim_start = NULL, vmm_pid = NULL;
        INSERT INTO restores (vm_id, boot_id) SELECT id, boot_id FROM vms WHERE name = 'renewed';";
    rows.execute_batch(begun).expect("the rows are changed");
    rows.close().expect("the copy is written");
    client.to_the_end("vm_restart", json!({ "vm": "later" }), SOON);
    let shims = ["later", "renewed"].map(|name| process(&client.wait_for_state(name, "ready"), "shim_pid"));
    world.daemon.stop();
    put_back(&world, &copy);
    for _ in 0..2 {
        world.daemon.restart();
        let mut client = world.client();
        for (name, shim) in ["later", "renewed"].into_iter().zip(shims) {
            let vm = client.inspect(name);
            assert_eq!(vm["state"], "failed", "{vm}");
            let end = format!("end process {shim}");
            assert!(vm["reason"].as_str().is_some_and(|reason| reason.contains(&end)), "{vm}");
            assert!(is_alive(shim), "{name}\n{}", world.daemon.log());
        }
        world.daemon.stop();
    }
    for shim in shims {
        kill_process(shim);
        soon("the shim ends", || (!is_alive(shim)).then_some(()));
    }
    world.daemon.restart();
    let mut client = world.client();
    for name in ["later", "renewed"] {
        client.to_the_end("vm_start", json!({ "vm": name }), SOON);
        assert_eq!(client.run(name, "echo up").stdout, "up\n");
    }
    world.assert_in_order();
}

#[test]
fn a_damaged_list_of_what_is_kept_costs_nothing() {
    let mut world = World::new();
    make(&world, &mut world.client(), "first");
    world.daemon.stop();
    let (list, stray) = (world.daemon.state().join("kept.json"), world.daemon.state().join("drives/stray"));
    fs::write(&list, "[\"stray").expect("the list is written");
    fs::create_dir(&stray).expect("a directory is made");
    for _ in 0..2 {
        world.daemon.restart();
        assert!(stray.exists(), "{}", world.daemon.log());
        assert_eq!(fs::read_to_string(&list).expect("the list"), r#"["stray"]"#);
        world.daemon.stop();
    }
    let copy = fs::read_to_string(world.daemon.state().join("kept.json.damaged"));
    assert_eq!(copy.expect("its copy"), "[\"stray");
    fs::remove_dir(&stray).expect("it was kept");
    world.daemon.restart();
    world.assert_in_order();
}
