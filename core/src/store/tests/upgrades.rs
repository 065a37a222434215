//! Databases of earlier versions: they are taken up with all their rows, after a copy of them was written. Those of later versions are
//! refused. The fixtures are databases as daemons of each version left them.

use std::path::{Path, PathBuf};

use nexus_schema::id::TokenId;
use nexus_schema::network::{NetworkMode, NetworkPolicy, NetworkPreset, NetworkRule};
use nexus_schema::tools::vm::{IdleAction, VmFile};
use nexus_schema::{ErrorCode, Name};

use super::*;
use crate::store::checkpoints;
use crate::store::drives::{self, DriveRecord};
use crate::store::epoch;
use crate::store::images::ImageRecord;
use crate::store::leases;
use crate::store::restores;

fn fixture(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/store/v{version}.sql"))
}

/// A database of a version, with rows, and its directory.
fn written_by(version: u32) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nexus.db");
    let sql = std::fs::read_to_string(fixture(version))
        .unwrap_or_else(|e| panic!("version {version}: {e}; core/tests/fixtures/store/make makes it"));
    Connection::open(&path).unwrap().execute_batch(&sql).unwrap();
    (directory, path)
}

fn version_of(path: &Path) -> u32 {
    let db = Connection::open(path).unwrap();
    db.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
}

/// Every table and index, by name.
fn schema(db: &Connection) -> Result<Vec<(String, String)>, StoreError> {
    let mut all = db.prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")?;
    let rows = all.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

fn number(db: &Connection, sql: &str) -> i64 {
    db.query_row(sql, [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn every_earlier_version_is_taken_up_with_its_rows() {
    let (_directory, new) = open();
    let expected = new.read(schema).await.unwrap();
    for version in 1..=SCHEMA_VERSION {
        let (_directory, path) = written_by(version);
        assert_eq!(version_of(&path), version);
        let store = Store::open(&path).unwrap_or_else(|e| panic!("version {version}: {e}"));
        assert_eq!(store.read(schema).await.unwrap(), expected, "version {version}");
        assert_eq!(store.instance().await.unwrap().as_i64(), 4242, "version {version}");
        let looked_at = store.read(move |db| -> Result<(), StoreError> {
            assert!(!db.prepare("PRAGMA foreign_key_check")?.exists([])?, "version {version}");
            the_first_vm_is_whole(db);
            vms_are_as_they_were(db, version);
            assets_and_images_are_as_they_were(db, version);
            work_is_as_it_was(db);
            later_tables_are_as_they_were(db, version);
            Ok(())
        });
        looked_at.await.unwrap();
        // It can be written, too.
        write(&store, |tx| vms::insert(tx, &vm("new", vms::free_cid(tx)?))).await.unwrap();
    }
}

fn the_first_vm_is_whole(db: &Connection) {
    let first = vms::get(db, &"v1".parse().unwrap()).unwrap().unwrap();
    assert_eq!((first.id.as_i64(), first.state, first.reason.as_deref()), (1, VmState::Ready, None));
    assert_eq!((first.generation, first.protected, first.cid), (7, true, 3));
    assert_eq!(first.tags, BTreeMap::from([("team".into(), "a".into())]));
    let spec = &first.spec;
    assert_eq!((spec.vcpus, spec.memory, spec.disk), (2, ByteSize::gib(1), ByteSize::gib(8)));
    assert_eq!((spec.tmp, spec.disk_given, spec.wait_for_init), (TmpPlace::Disk, false, true));
    assert_eq!(spec.env, BTreeMap::from([("LANG".into(), "C".into())]));
    assert_eq!(spec.files, BTreeMap::from([("/etc/motd".into(), VmFile::text("hello\n"))]));
    // A VM of before has no network, whatever the default for new ones is.
    assert_eq!(spec.network, NetworkPolicy::default());
    assert_eq!((spec.idle_stop, spec.run.as_deref(), first.expires_at), (None, None, None));
    // With these the daemon finds the running VM again.
    let boot = first.boot_id.map(|id| id.as_i64());
    assert_eq!((boot, first.token.as_deref()), (Some(51), Some("secret-of-the-boot")));
    let processes = vms::VmProcesses { shim_pid: 4711, shim_start: 99, vmm_pid: 4712 };
    assert_eq!(first.processes, Some(processes));
    let guest = first.guest.unwrap();
    assert_eq!((guest.hello.protocol, guest.configured, guest.problems.len()), (1, true, 0));
    assert_eq!(first.timings.unwrap().total_ms, 21);
}

fn vms_are_as_they_were(db: &Connection, version: u32) {
    let mut all: BTreeMap<String, VmRecord> =
        vms::all(db).unwrap().into_iter().map(|vm| (vm.name.to_string(), vm)).collect();
    let count = [1, 2, 6, 8, 9, 10, 15].into_iter().filter(|added| *added <= version).count();
    assert_eq!(all.len(), count, "version {version}");
    if let Some(vm) = all.remove("v2") {
        assert_eq!((vm.state, vm.spec.init, vm.spec.start), (VmState::Stopped, InitMode::System, false));
    }
    if let Some(vm) = all.remove("v6") {
        assert_eq!(vm.spec.dns, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((vm.spec.tmp, vm.spec.disk_given, vm.spec.wait_for_init), (TmpPlace::Tmpfs, true, false));
        assert_eq!(
            (vm.spec.working_dir.as_deref(), vm.spec.image_user.as_deref()),
            (Some("/srv"), Some("nobody"))
        );
        assert_eq!(vm.spec.network.mode, NetworkMode::None);
    }
    if let Some(vm) = all.remove("v8") {
        let network = vm.spec.network;
        assert_eq!((network.mode, network.preset), (NetworkMode::Proxy, NetworkPreset::Open));
        assert_eq!(network.allow, ["*.example.org:443".parse::<NetworkRule>().unwrap()]);
        assert_eq!(network.deny, ["10.0.0.0/8".parse::<NetworkRule>().unwrap()]);
        assert_eq!(vm.spec.files["/opt/run"].mode.as_deref(), Some("0755"));
    }
    if let Some(vm) = all.remove("v9") {
        assert_eq!(vm.spec.network.mode, NetworkMode::Nat);
        assert_eq!(vm.spec.network.groups, ["app".parse::<Name>().unwrap()]);
        let lease = leases::of_vm(db, vm.id).unwrap().unwrap();
        assert_eq!((lease.number, lease.mac.as_str()), (5, "02:00:00:00:00:05"));
        assert_eq!((lease.boot.map(|id| id.as_i64()), lease.tap.as_deref()), (Some(59), Some("nx5")));
        assert_eq!(leases::subnet(db).unwrap().as_deref(), Some("10.9.0.0/20"));
    }
    if let Some(vm) = all.remove("v10") {
        assert_eq!(vm.spec.network.bandwidth.rx, Some(ByteSize::mib(10)));
        assert_eq!(vm.spec.idle_stop, Some(nexus_schema::TimeSpan::seconds(1800)));
        assert_eq!(vm.spec.run.as_deref(), Some("make test"));
        assert_eq!((vm.owner.as_str(), vm.expires_at.is_some()), ("token:91", true));
    }
}

fn assets_and_images_are_as_they_were(db: &Connection, version: u32) {
    let kernel = assets::get(db, &"debian-6-12".parse().unwrap()).unwrap().unwrap();
    assert_eq!((kernel.version.as_str(), kernel.sha256.as_str()), ("6.12.1", "aa11"));
    assert_eq!((kernel.verified.as_str(), kernel.files.len()), ("signature", 0));
    let drives: BTreeMap<String, DriveRecord> =
        drives::all(db).unwrap().into_iter().map(|drive| (drive.name.to_string(), drive)).collect();
    let root = &drives["v1-root"];
    assert!(root.ready && root.is_root() && !root.read_only);
    assert_eq!(root.made_for.map(|id| id.as_i64()), Some(1), "it is deleted with its VM");
    // Of drives from before nobody knows whether a guest wrote to them.
    assert!(drives::may_hold_data(db, root.id).unwrap());
    let images: BTreeMap<String, ImageRecord> =
        images::all(db).unwrap().into_iter().map(|image| (image.name.to_string(), image)).collect();
    let debian = &images["debian"];
    assert!(debian.ready && debian.config.is_none() && debian.has_init.is_none());
    assert_eq!((debian.init, debian.distro.as_deref()), (InitMode::Agent, Some("debian-12")));
    if version >= 2 {
        let data = &drives["data"];
        let attached = data.attachment.as_ref().unwrap();
        assert_eq!((attached.position, attached.mount.as_deref()), (1, Some("/srv/data")));
        assert_eq!((data.made_for, data.parent_id, data.read_only), (None, Some(root.id), true));
    }
    if version >= 3 {
        let rootfs = assets::get(db, &"alpine-3-21".parse().unwrap()).unwrap().unwrap();
        assert_eq!((rootfs.files[0].name.as_str(), rootfs.files[0].size_bytes), ("rootfs.tar", 2000));
        assert_eq!(rootfs.download_sha256.as_deref(), Some("dd44"));
        assert_eq!(providers::get(db, "ours").unwrap().unwrap().spec["kind"], "kernel");
    }
    if version >= 4 {
        let web = templates::get(db, &"web".parse().unwrap()).unwrap().unwrap();
        assert_eq!((web.version, web.spec.init), (2, InitMode::System));
        assert_eq!((web.spec.packages.as_slice(), web.spec.overlays.len()), (&["nginx".to_owned()][..], 1));
        assert_eq!(templates::spec(db, web.id, 1).unwrap().unwrap().source, "busybox");
        let build = builds::newest(db, &web.name).unwrap().unwrap();
        assert_eq!((build.status, build.digest.as_deref()), (BuildStatus::Success, Some("ff66")));
        assert_eq!(builds::image_by_digest(db, "ff66").unwrap().unwrap().name.as_str(), "web-2");
        assert_eq!(builds::hashed(db, "/srv/rootfs.tar", "looks").unwrap().as_deref(), Some("7788"));
    }
    if version >= 5 {
        let config = images["python"].config.clone().unwrap();
        assert_eq!((config.working_dir.as_deref(), config.cmd.len()), (Some("/srv"), 1));
    }
    if version >= 6 {
        assert_eq!(images["busybox"].has_init, Some(false));
    }
}

fn work_is_as_it_was(db: &Connection) {
    let first = VmId::from_i64(1).unwrap();
    let history = history::list(db, first, None, 10).unwrap();
    let reasons: Vec<&str> = history.iter().map(|(_, change)| change.reason.as_str()).collect();
    assert_eq!(reasons, ["the guest is ready", "asked for"]);
    let gone = history::past(db, &"gone".parse().unwrap()).unwrap();
    assert_eq!(gone[0].0.as_i64(), 5);
    let created = ops::get(db, OpId::from_i64(61).unwrap()).unwrap().unwrap();
    assert_eq!((created.seq, created.summary.state), (1, OpState::Succeeded));
    assert_eq!(created.result.unwrap()["name"], "v1");
    let failed = ops::get(db, OpId::from_i64(62).unwrap()).unwrap().unwrap();
    assert_eq!(failed.summary.error.unwrap().code, ErrorCode::DiskFull);
    assert_eq!((failed.summary.progress.done, failed.summary.progress.total), (Some(5), Some(9)));
    assert_eq!(number(db, "SELECT op_id FROM idempotency WHERE key = 'once'"), 61);
    assert_eq!(settings::get(db, "default.memory").unwrap().as_deref(), Some("2GiB"));
    assert_eq!(settings::get(db, "default.vcpus").unwrap(), None);
    assert_eq!(settings::history(db, None, None, 10).unwrap().len(), 4);
    // What was not counted when a call was recorded is nothing; the caller was the daemon's user.
    let old = "SELECT count(*) FROM calls WHERE tool = 'vm_create' AND rule = 'owner' AND bytes_in = 0 AND NOT denied";
    assert_eq!(number(db, old), 1);
}

fn later_tables_are_as_they_were(db: &Connection, version: u32) {
    if version >= 7 {
        let ports = ports::of_vm(db, VmId::from_i64(1).unwrap()).unwrap();
        let ports: Vec<_> = ports.iter().map(|port| (port.guest_port, port.host_port)).collect();
        assert_eq!(ports, [(80, Some(8080)), (5432, None)]);
    }
    if version >= 10 {
        let all = tokens::all(db).unwrap();
        let (ci, sub) = (&all[0], &all[1]);
        assert_eq!((ci.name.as_str(), ci.hash.as_str(), ci.revoked_at), ("ci", "hash-of-ci", None));
        assert_eq!((ci.rights.quota.vms, ci.rights.tools.as_str()), (Some(3), "work"));
        assert_eq!((sub.parent, sub.rights.all_vms), (TokenId::from_i64(91), true));
        assert!(sub.revoked_at.is_some() && sub.expires_at.is_some());
        assert_eq!(number(db, "SELECT count(*) FROM calls WHERE denied AND rule = 'no scope'"), 1);
    }
    if version >= 11 {
        assert_eq!(number(db, "SELECT size_bytes FROM drive_growths WHERE owner = 'token:91'"), 4096);
    }
    if version >= 12 {
        let all = events::all(db).unwrap();
        assert_eq!((all.len(), all[0].event.seq, all[0].event.text.as_str()), (1, 77, "v1 is ready"));
        assert_eq!((all[0].owner.as_deref(), all[0].tags["team"].as_str()), (Some("uid:0"), "a"));
        assert_eq!(number(db, "SELECT count(*) FROM calls WHERE traceparent LIKE '00-0af7%'"), 1);
    }
    if version >= 13 {
        let clean = &checkpoints::list(db, None, None, 10).unwrap()[0];
        let manifest = clean.manifest.as_ref().unwrap();
        assert_eq!((clean.name.as_str(), clean.token.as_deref()), ("clean", Some("secret-of-the-boot")));
        assert_eq!((manifest.checkpoint, manifest.host.tsc_khz), (clean.id, Some(2_400_000)));
        assert!(checkpoints::is_current(db, clean.id, VmId::from_i64(1).unwrap()).unwrap());
        assert_eq!(checkpoints::drives_of(db, clean.id).unwrap()[0].size, ByteSize::gib(8));
    }
    if version >= 14 {
        let first = VmId::from_i64(1).unwrap();
        let rollback = &restores::rollbacks(db).unwrap()[0];
        assert_eq!((rollback.vm, rollback.drives[0].staged.as_str()), (first, ".nexus-1-2-3"));
        assert_eq!(restores::restored_boot(db, first).unwrap().map(|boot| boot.as_i64()), Some(59));
        let network = checkpoints::last_network(db, rollback.checkpoint).unwrap();
        assert_eq!(network.map(|network| network.mode), Some(NetworkMode::Proxy));
    }
    if version >= 15 {
        let vm = vms::get(db, &"v15".parse().unwrap()).unwrap().unwrap();
        let memory = vm.suspended.as_ref().unwrap();
        assert_eq!((vm.state, vm.spec.idle_action), (VmState::Suspended, IdleAction::Suspend));
        assert_eq!((memory.token.as_str(), memory.memory_bytes), ("secret-of-v15", 73_400_320));
        assert_eq!(memory.drives[0].modified_ns, 1_764_000_150_000_000_001);
    }
    if version >= 16 {
        let unused = drives::get(db, &"unused".parse().unwrap()).unwrap().unwrap();
        assert!(!drives::may_hold_data(db, unused.id).unwrap());
    }
    // One of before was never counted on.
    assert_eq!(epoch::get(db).unwrap(), if version >= 17 { 7 } else { 0 });
}

#[test]
fn a_copy_is_written_before_a_migration_and_one_is_kept() {
    use std::os::unix::fs::PermissionsExt;
    let (directory, path) = written_by(SCHEMA_VERSION - 1);
    let beside = |more: &str| directory.path().join(format!("nexus.db.{more}"));
    std::fs::write(beside("before-v2"), "of an earlier migration").unwrap();
    std::fs::write(beside("before-part"), "of a daemon that was killed").unwrap();
    let names = number(&Connection::open(&path).unwrap(), "SELECT count(*) FROM vms");
    drop(Store::open(&path).unwrap());
    assert_eq!(version_of(&path), SCHEMA_VERSION);
    let copy = beside(&format!("before-v{SCHEMA_VERSION}"));
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(version_of(&copy), SCHEMA_VERSION - 1);
    assert_eq!(number(&Connection::open(&copy).unwrap(), "SELECT count(*) FROM vms"), names);
    assert!(!beside("before-v2").exists() && !beside("before-part").exists());
    // A start without a migration leaves it as it is.
    let bytes = std::fs::read(&copy).unwrap();
    drop(Store::open(&path).unwrap());
    assert_eq!(std::fs::read(&copy).unwrap(), bytes);
    // It can be gone back to.
    std::fs::rename(&copy, &path).unwrap();
    for more in ["wal", "shm"] {
        std::fs::remove_file(directory.path().join(format!("nexus.db-{more}"))).ok();
    }
    drop(Store::open(&path).unwrap());
    assert_eq!(version_of(&path), SCHEMA_VERSION);
}

#[test]
fn a_new_database_needs_no_copy() {
    let (directory, store) = open();
    drop(store);
    let names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("before")), "{names:?}");
}

#[test]
fn without_a_copy_nothing_is_migrated() {
    let (directory, path) = written_by(1);
    std::fs::write(directory.path().join("nexus.db.before-v1"), "of an earlier migration").unwrap();
    // What cannot be removed is in the way.
    std::fs::create_dir(directory.path().join("nexus.db.before-part")).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Backup { .. }), "{error}");
    assert_eq!(version_of(&path), 1);
    assert!(directory.path().join("nexus.db.before-v1").exists());
}

/// Without room for SQLite's shared memory, one connection has the database alone.
#[test]
fn one_connection_alone_takes_up_an_earlier_version_or_refuses_it() {
    let (directory, path) = written_by(1);
    let in_the_way = directory.path().join("nexus.db.before-part");
    std::fs::create_dir(&in_the_way).unwrap();
    let error = connect_alone(&path).unwrap_err();
    assert!(matches!(error, StoreError::Backup { .. }), "{error}");
    assert_eq!(version_of(&path), 1);
    std::fs::remove_dir(&in_the_way).unwrap();
    let alone = connect_alone(&path).unwrap();
    assert_eq!(number(&alone, "PRAGMA user_version"), i64::from(SCHEMA_VERSION));
    the_first_vm_is_whole(&alone);
    drop(alone);
    assert!(directory.path().join(format!("nexus.db.before-v{SCHEMA_VERSION}")).exists());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    let error = connect_alone(&path).unwrap_err();
    assert!(matches!(error, StoreError::Newer { .. }), "{error}");
}

#[test]
fn a_newer_database_is_refused_with_what_to_do_and_left_alone() {
    let (directory, store) = open();
    drop(store);
    let path = directory.path().join("nexus.db");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found, .. } if found == SCHEMA_VERSION + 1), "{error}");
    let said = error.to_string();
    assert!(said.contains("nexus.db") && said.contains("start the newer nexusd"), "{said}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}
