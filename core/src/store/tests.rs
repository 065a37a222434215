mod calls;
mod checkpoints;
mod epoch;
mod health;
mod leases;
mod upgrades;
mod usage;
mod used_drives;

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_schema::id::{OpId, VmId};
use nexus_schema::link::InitMode;
use nexus_schema::tools::build::BuildStatus;
use nexus_schema::tools::op::{OpProgress, OpState, OpSummary};
use nexus_schema::tools::vm::{DriverChoice, VmState};
use nexus_schema::{ByteSize, Reference, Timestamp};

pub(crate) use self::checkpoints::checkpoint;
use super::calls::CallRecord;
use super::vms::{TmpPlace, VmRecord, VmSpec};
use super::*;

/// The saved memory of a VM.
pub(crate) fn suspended(vm: &VmRecord) -> super::suspended::Suspended {
    let hello = serde_json::json!({ "protocol": 1, "min_protocol": 1, "build": "0.1.0", "kernel": "6.12", "arch": "x86_64",
        "kernel_boot_id": "b", "uptime_ms": 5, "init": "agent" });
    let manifest = serde_json::json!({
        "version": 1, "checkpoint": "aaaaaaaaaaaig", "vm": vm.id, "boot_id": "aaaaaaaaaaadg", "spec": vm.spec, "image_id": null,
        "image_name": "debian", "kernel_id": null, "arch": "x86_64",
        "guest": { "hello": hello, "protocol": 1, "configured": true },
        "host": { "driver": "qemu", "driver_version": "7.2.22", "binary_sha256": "aa", "accel": "tcg", "cpu_sha256": "bb",
            "tsc_khz": 2_400_000 },
        "private": false, "state_sha256": "cc", "ram_sha256": "dd", "quiesced": true, "drive_bytes": [],
    });
    super::suspended::Suspended {
        manifest: serde_json::from_value(manifest).unwrap(),
        token: "of-then".into(),
        drives: Vec::new(),
        memory_bytes: 4096,
        at: now(),
    }
}

pub(crate) fn vm(name: &str, cid: u32) -> VmRecord {
    let spec = VmSpec {
        vcpus: 1,
        memory: ByteSize::mib(512),
        disk: ByteSize::gib(8),
        disk_given: false,
        dns: Vec::new(),
        driver: DriverChoice::Auto,
        init: InitMode::Agent,
        network: nexus_schema::network::NetworkPolicy::default(),
        hostname: name.into(),
        env: BTreeMap::new(),
        working_dir: None,
        image_user: None,
        tmp: TmpPlace::Disk,
        wait_for_init: true,
        files: BTreeMap::new(),
        from: "debian".into(),
        kernel: "debian".into(),
        start: true,
        idle_stop: None,
        idle_action: nexus_schema::tools::vm::IdleAction::Stop,
        checkpoints: false,
        run: None,
        warm: None,
    };
    VmRecord {
        state: VmState::Created,
        tags: BTreeMap::from([("team".into(), "a".into())]),
        ..VmRecord::creating(random_id(), name.parse().unwrap(), "uid:0".into(), "x86_64".into(), cid, spec)
    }
}

/// The record of a call that went well.
pub(crate) fn call() -> CallRecord {
    CallRecord {
        started: Timestamp::from_millis(1),
        owner: "uid:0".into(),
        tool: "vm_list".into(),
        vm: None,
        boot: None,
        duration: Duration::from_micros(60),
        outcome: "ok",
        rule: "owner",
        denied: false,
        trace: None,
        bytes_in: 2,
        bytes_out: 3,
    }
}

fn open() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("nexus.db")).unwrap();
    (dir, store)
}

async fn write<T: Send + 'static>(
    store: &Store,
    work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    store.write(work).await
}

#[tokio::test]
async fn vms_of_before_have_no_network_and_policies_are_kept() {
    use nexus_schema::ByteSize;
    use nexus_schema::network::{Bandwidth, NetworkMode, NetworkPolicy, NetworkPreset};

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nexus.db");
    {
        let mut db = Connection::open(&path).unwrap();
        migrations().to_version(&mut db, 7).unwrap();
        // Today's row, without the columns that came later.
        let newest = directory.path().join("newest.db");
        let mut now = Connection::open(&newest).unwrap();
        migrations().to_latest(&mut now).unwrap();
        vms::insert(&now, &vm("old", 3)).unwrap();
        db.execute("ATTACH ?1 AS newest", [newest.to_str().unwrap()]).unwrap();
        let sql = "SELECT group_concat(name) FROM pragma_table_info('vms', 'main')";
        let columns: String = db.query_row(sql, [], |row| row.get(0)).unwrap();
        db.execute(&format!("INSERT INTO vms ({columns}) SELECT {columns} FROM newest.vms"), []).unwrap();
        db.execute("UPDATE main.vms SET spec = json_set(spec, '$.network', 'none')", []).unwrap();
    }
    let store = Store::open(&path).unwrap();
    assert_eq!(store.read(vms::all).await.unwrap()[0].spec.network, NetworkPolicy::default());
    let policy = NetworkPolicy {
        mode: NetworkMode::Proxy,
        preset: NetworkPreset::Open,
        allow: vec!["*.example.org:443".parse().unwrap()],
        deny: vec!["10.0.0.0/8".parse().unwrap()],
        groups: vec!["web".parse().unwrap()],
        bandwidth: Bandwidth { rx: Some(ByteSize::mib(10)), tx: None },
        packages: vec!["pip.example:443".parse().unwrap()],
    };
    let mut new = vm("web", 4);
    new.spec.network = policy.clone();
    store.write(move |tx| vms::insert(tx, &new)).await.unwrap();
    let all = store.read(vms::all).await.unwrap();
    assert_eq!(all.iter().find(|vm| vm.name.as_str() == "web").unwrap().spec.network, policy);
}

#[test]
fn migrations_are_valid() {
    migrations().validate().unwrap();
}

#[tokio::test]
async fn the_instance_is_made_once() {
    let (dir, store) = open();
    let first = store.instance().await.unwrap();
    assert_eq!(store.instance().await.unwrap(), first);
    drop(store);
    assert_eq!(Store::open(&dir.path().join("nexus.db")).unwrap().instance().await.unwrap(), first);
}

#[tokio::test]
async fn rows_come_back_as_they_were() {
    let (_dir, store) = open();
    let mut stored = vm("web", 3);
    let row = stored.clone();
    write(&store, move |tx| vms::insert(tx, &row)).await.unwrap();
    stored.state = VmState::Ready;
    stored.generation = 2;
    stored.boot_id = Some(random_id());
    stored.token = Some("t".into());
    stored.processes = Some(vms::VmProcesses { shim_pid: 7, shim_start: 99, vmm_pid: 8 });
    stored.timings = Some(Default::default());
    stored.expires_at = Some(now());
    stored.spec.idle_stop = Some(nexus_schema::TimeSpan::seconds(90));
    stored.spec.idle_action = nexus_schema::tools::vm::IdleAction::Suspend;
    stored.suspended = Some(Box::new(suspended(&stored)));
    let row = stored.clone();
    write(&store, move |tx| vms::update(tx, &row, 1)).await.unwrap();
    let by_name: Reference<_> = "web".parse().unwrap();
    let by_id = Reference::Id(stored.id);
    for reference in [by_name, by_id] {
        let found = store.read(move |db| vms::get(db, &reference)).await.unwrap();
        assert_eq!(found.as_ref(), Some(&stored));
    }
}

#[tokio::test]
async fn a_stale_generation_is_refused() {
    let (_dir, store) = open();
    let row = vm("web", 3);
    write(&store, move |tx| {
        vms::insert(tx, &row)?;
        vms::update(tx, &VmRecord { generation: 2, ..row.clone() }, 1)?;
        assert!(matches!(
            vms::update(tx, &VmRecord { generation: 2, ..row }, 1),
            Err(StoreError::Changed { .. })
        ));
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_taken_name_is_said_so_and_rolls_back() {
    let (_dir, store) = open();
    write(&store, |tx| vms::insert(tx, &vm("web", 3))).await.unwrap();
    let error = write(&store, |tx| {
        vms::insert(tx, &vm("other", 4))?;
        vms::insert(tx, &vm("web", 5))
    })
    .await
    .unwrap_err();
    assert!(matches!(error, StoreError::NameTaken { kind: "VM", .. }), "{error}");
    let all = store.read(vms::all).await.unwrap();
    assert_eq!(all.len(), 1, "the other row was rolled back");
}

#[tokio::test]
async fn context_ids_fill_gaps() {
    let (_dir, store) = open();
    write(&store, |tx| {
        assert_eq!(vms::free_cid(tx)?, 3);
        vms::insert(tx, &vm("a", 3))?;
        assert_eq!(vms::free_cid(tx)?, 4);
        vms::insert(tx, &vm("b", 4))?;
        let c = vm("c", 6);
        vms::insert(tx, &c)?;
        assert_eq!(vms::free_cid(tx)?, 5);
        vms::insert(tx, &vm("d", 5))?;
        assert_eq!(vms::free_cid(tx)?, 7);
        vms::delete(tx, c.id)?;
        assert_eq!(vms::free_cid(tx)?, 6);
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn lists_filter_and_page() {
    let (_dir, store) = open();
    write(&store, |tx| {
        for (i, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let mut row = vm(name, 3 + i as u32);
            if name == "c" {
                row.tags.insert("role".into(), "db".into());
                row.state = VmState::Stopped;
            }
            vms::insert(tx, &row)?;
        }
        let names = |rows: Vec<VmRecord>| rows.into_iter().map(|r| r.name.to_string()).collect::<Vec<_>>();
        let none = BTreeMap::new();
        assert_eq!(names(vms::list(tx, None, &none, None, 3)?), ["a", "b", "c"]);
        assert_eq!(names(vms::list(tx, None, &none, Some("c"), 3)?), ["d"]);
        assert_eq!(names(vms::list(tx, Some(VmState::Stopped), &none, None, 9)?), ["c"]);
        let tags = BTreeMap::from([("role".to_string(), "db".to_string()), ("team".into(), "a".into())]);
        assert_eq!(names(vms::list(tx, None, &tags, None, 9)?), ["c"]);
        let tags = BTreeMap::from([("role".to_string(), "x".to_string())]);
        assert!(vms::list(tx, None, &tags, None, 9)?.is_empty());
        assert_eq!(vms::count_by_state(tx)?["created"], 3);
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn history_outlives_the_vm() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let row = vm("web", 3);
        vms::insert(tx, &row)?;
        history::insert(tx, row.id, &row.name, None, Some(VmState::Created), "asked for", "uid:0", None)?;
        vms::delete(tx, row.id)?;
        history::insert(tx, row.id, &row.name, Some(VmState::Created), None, "deleted", "uid:0", None)?;
        let all = history::list(tx, row.id, None, 10)?;
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].1.to, None, "newest first");
        assert_eq!(history::list(tx, row.id, Some(all[0].0), 10)?.len(), 1);
        // By name: the last one that had it.
        assert_eq!(history::past(tx, &Reference::Name(row.name.clone()))?[0].0, row.id);
        let next = vm("web", 4);
        history::insert(tx, next.id, &next.name, None, Some(VmState::Created), "asked for", "uid:0", None)?;
        assert_eq!(history::past(tx, &Reference::Name(row.name.clone()))?[0].0, next.id);
        assert!(history::past(tx, &"other".parse().unwrap())?.is_empty());
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn old_history_is_forgotten_and_the_last_of_living_vms_stay() {
    let (_directory, store) = open();
    let (living, dead) = (vm("living", 3), vm("dead", 4));
    let (living_id, dead_id) = (living.id, dead.id);
    write(&store, move |tx| {
        vms::insert(tx, &living)?;
        for change in 0..60 {
            for record in [&living, &dead] {
                let why = change.to_string();
                history::insert(tx, record.id, &record.name, None, Some(VmState::Ready), &why, "x", None)?;
            }
        }
        Ok(())
    })
    .await
    .unwrap();
    let count = async |id| {
        store.read(move |db| history::list(db, id, None, 1000)).await.map(|rows| rows.len()).unwrap()
    };
    let long_ago = Timestamp::from_millis(0);
    let forgotten = write(&store, move |tx| history::forget(tx, long_ago, 50)).await.unwrap();
    assert_eq!((forgotten, count(living_id).await, count(dead_id).await), (20, 50, 50));
    let newest = store.read(move |db| history::list(db, living_id, None, 1)).await.unwrap();
    assert_eq!(newest[0].1.reason, "59");
    let soon = Timestamp::from_millis(now().as_millis() + 60_000);
    let forgotten = write(&store, move |tx| history::forget(tx, soon, 50)).await.unwrap();
    assert_eq!((forgotten, count(living_id).await, count(dead_id).await), (80, 20, 0));
}

#[tokio::test]
async fn operations_end_once() {
    let (_dir, store) = open();
    let id: OpId = random_id();
    let op = OpSummary {
        op_id: id,
        tool: "vm_create".into(),
        state: OpState::Running,
        progress: OpProgress::default(),
        subject_id: Some(random_id::<nexus_schema::id::VmKind>().to_string()),
        subject_name: Some("web".into()),
        error: None,
        owner: "uid:0".into(),
        started_at: now(),
        ended_at: None,
    };
    let again = op.clone();
    write(&store, move |tx| {
        ops::insert(tx, &op)?;
        assert_eq!(ops::running(tx)?.len(), 1);
        let call = |owner: &str, tool, arguments: &str| idempotency::Once {
            owner: owner.into(),
            tool,
            key: "k".into(),
            arguments: arguments.into(),
        };
        let first = call("uid:0", "vm_create", "{}");
        idempotency::remember(tx, &first, id)?;
        assert_eq!(idempotency::earlier(tx, &first)?, Some(idempotency::Earlier::Op(id)));
        let other = call("uid:0", "vm_create", "{\"name\":\"x\"}");
        assert_eq!(idempotency::earlier(tx, &other)?, Some(idempotency::Earlier::Conflict));
        assert_eq!(idempotency::earlier(tx, &call("uid:1", "vm_create", "{}"))?, None);
        assert_eq!(idempotency::earlier(tx, &call("uid:0", "drive_create", "{}"))?, None);
        // After a day the key has expired, and may be used again.
        tx.execute("UPDATE idempotency SET at = at - 86400001", [])?;
        assert_eq!(idempotency::earlier(tx, &first)?, None);
        idempotency::remember(tx, &first, id)?;
        assert_eq!(idempotency::earlier(tx, &first)?, Some(idempotency::Earlier::Op(id)));
        ops::finish(tx, id, OpState::Cancelled, &OpProgress::default(), None, None)?;
        ops::finish(tx, id, OpState::Failed, &OpProgress::default(), None, None)?;
        assert_eq!(ops::get(tx, id)?.unwrap().summary.state, OpState::Cancelled);
        assert_eq!(ops::count_running(tx)?, 0);
        // Ended operations are forgotten by age; running ones never are.
        let running: OpId = random_id();
        ops::insert(tx, &OpSummary { op_id: running, ..again })?;
        assert_eq!(ops::forget(tx, Timestamp::from_millis(0))?, 0);
        assert_eq!(ops::forget(tx, Timestamp::from_millis(now().as_millis() + 60_000))?, 1);
        assert!(ops::get(tx, id)?.is_none() && ops::get(tx, running)?.is_some());
        Ok(())
    })
    .await
    .unwrap();
    let _: VmId = random_id();
}

fn template(name: &str) -> templates::TemplateRecord {
    let spec = serde_json::from_value(serde_json::json!({ "source": "busybox", "init": "agent" })).unwrap();
    templates::TemplateRecord {
        id: random_id(),
        name: name.parse().unwrap(),
        version: 1,
        spec,
        owner: "uid:0".into(),
        created_at: Timestamp::from_millis(1),
        updated_at: Timestamp::from_millis(1),
    }
}

#[tokio::test]
async fn templates_keep_their_versions() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let first = template("web");
        templates::insert(tx, &first)?;
        assert!(matches!(
            templates::insert(tx, &template("web")),
            Err(StoreError::NameTaken { kind: "template", .. })
        ));
        let mut second = first.clone();
        second.version = 2;
        second.spec.source = "debian".into();
        second.updated_at = Timestamp::from_millis(2);
        templates::add_version(tx, &second, "uid:1")?;
        // Another caller changed it meanwhile.
        assert!(matches!(templates::add_version(tx, &second, "uid:1"), Err(StoreError::Changed { .. })));
        assert_eq!(templates::get(tx, &Reference::Id(first.id))?, Some(second.clone()));
        assert_eq!(templates::spec(tx, first.id, 1)?, Some(first.spec));
        assert_eq!(templates::spec(tx, first.id, 3)?, None);
        let versions = templates::versions(tx, first.id)?;
        let versions: Vec<_> = versions.iter().map(|v| (v.version, v.owner.as_str())).collect();
        assert_eq!(versions, [(2, "uid:1"), (1, "uid:0")]);
        templates::insert(tx, &template("api"))?;
        let names = |after, limit| -> Result<Vec<_>, StoreError> {
            Ok(templates::list(tx, after, limit)?.into_iter().map(|t| t.name.to_string()).collect())
        };
        assert_eq!(names(None, 9)?, ["api", "web"]);
        assert_eq!(names(Some("api"), 9)?, ["web"]);
        templates::delete(tx, first.id)?;
        assert!(templates::versions(tx, first.id)?.is_empty());
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn builds_outlive_their_template_and_are_found_by_their_inputs() {
    let (_dir, store) = open();
    write(&store, |tx| {
        let made_from = template("web");
        templates::insert(tx, &made_from)?;
        let image = images::ImageRecord {
            id: random_id(),
            parent_id: None,
            name: "web-1".parse().unwrap(),
            source: "template:web@1".into(),
            ready: false,
            distro: None,
            init: InitMode::Agent,
            has_init: Some(true),
            config: None,
            arch: "x86_64".into(),
            size: ByteSize::mib(8),
            used_bytes: 1,
            sha256: "00".into(),
            owner: "uid:0".into(),
            created_at: Timestamp::from_millis(1),
        };
        images::insert(tx, &image)?;
        let build = |status| builds::BuildRecord {
            id: random_id(),
            seq: 0,
            template_id: Some(made_from.id),
            template_name: made_from.name.clone(),
            version: 1,
            spec: made_from.spec.clone(),
            status,
            cached: false,
            digest: None,
            image_id: None,
            image_name: None,
            op_id: random_id(),
            error: None,
            owner: "uid:0".into(),
            created_at: Timestamp::from_millis(1),
            ended_at: None,
        };
        let (first, second) = (build(BuildStatus::Building), build(BuildStatus::Building));
        builds::insert(tx, &first)?;
        builds::insert(tx, &second)?;
        for build in [&first, &second] {
            builds::set_digest(tx, build.id, "digest")?;
        }
        builds::finish(tx, first.id, BuildStatus::Success, false, Some(image.id), None)?;
        assert_eq!(builds::image_by_digest(tx, "digest")?, None, "the image is not ready");
        images::set_ready(tx, &image)?;
        assert_eq!(builds::image_by_digest(tx, "digest")?.map(|i| i.id), Some(image.id));
        assert_eq!(builds::image_by_digest(tx, "other")?, None);
        let error = nexus_schema::ToolError::internal("x");
        builds::finish(tx, second.id, BuildStatus::Failed, false, None, Some(&error))?;
        // What has ended is not changed.
        builds::finish(tx, second.id, BuildStatus::Success, false, Some(image.id), None)?;
        let newest = builds::newest(tx, &made_from.name)?.unwrap();
        assert_eq!((newest.id, newest.status, newest.error), (second.id, BuildStatus::Failed, Some(error)));
        let of = |status| -> Result<Vec<_>, StoreError> {
            Ok(builds::list(tx, Some(made_from.id), status, None, 9)?.into_iter().map(|b| b.id).collect())
        };
        assert_eq!(of(None)?, [second.id, first.id]);
        assert_eq!(of(Some(BuildStatus::Success))?, [first.id]);

        templates::delete(tx, made_from.id)?;
        images::delete(tx, image.id)?;
        let left = builds::get(tx, first.id)?.unwrap();
        assert_eq!((left.template_id, left.image_id, left.image_name), (None, None, None));
        assert_eq!((left.template_name, left.status), (made_from.name, BuildStatus::Success));
        assert_eq!(builds::image_by_digest(tx, "digest")?, None);

        builds::remember_hash(tx, "/a", "looks", "hash")?;
        builds::remember_hash(tx, "/a", "looks anew", "new hash")?;
        assert_eq!(builds::hashed(tx, "/a", "looks")?, None);
        assert_eq!(builds::hashed(tx, "/a", "looks anew")?.as_deref(), Some("new hash"));
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn settings_can_be_seen_as_they_were() {
    let (_dir, store) = open();
    write(&store, |tx| {
        assert_eq!((settings::revision(tx)?, settings::at(tx, i64::MAX)?.len()), (0, 0));
        settings::set(tx, "a", "1", "uid:0")?;
        let first = settings::revision(tx)?;
        settings::set(tx, "b", "x", "uid:0")?;
        settings::set(tx, "a", "2", "uid:1")?;
        settings::set(tx, "b", "", "uid:1")?;
        let values = |seq| -> Result<Vec<_>, StoreError> {
            Ok(settings::at(tx, seq)?.into_values().map(|row| (row.key, row.value)).collect())
        };
        assert_eq!(values(0)?, []);
        assert_eq!(values(first)?, [("a".into(), Some("1".into()))]);
        assert_eq!(values(i64::MAX)?, [("a".into(), Some("2".into())), ("b".into(), None)]);
        assert_eq!((settings::get(tx, "a")?, settings::get(tx, "b")?), (Some("2".into()), None));
        let seqs = |key, before| -> Result<Vec<_>, StoreError> {
            Ok(settings::history(tx, key, before, 2)?.into_iter().map(|row| row.seq - first).collect())
        };
        assert_eq!(seqs(None, None)?, [3, 2]);
        assert_eq!(seqs(None, Some(first + 2))?, [1, 0]);
        assert_eq!(seqs(Some("a"), None)?, [2, 0]);
        Ok(())
    })
    .await
    .unwrap();
}

#[test]
fn its_files_are_its_owners_alone_whatever_the_umask_is() {
    use std::os::unix::fs::PermissionsExt;
    // Here the umask belongs to this thread; nothing else shares its filesystem settings.
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        rustix::process::umask(rustix::fs::Mode::empty());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nexus.db");
        let files = ["nexus.db", "nexus.db-wal", "nexus.db-shm"].map(|name| directory.path().join(name));
        let modes =
            || files.clone().map(|file| std::fs::metadata(file).unwrap().permissions().mode() & 0o777);
        let store = Store::open(&path).unwrap();
        assert_eq!(modes(), [0o600; 3]);
        // As an earlier version left them, with a write-ahead log that was never checkpointed.
        for file in &files {
            std::fs::set_permissions(file, PermissionsExt::from_mode(0o644)).unwrap();
        }
        let again = Store::open(&path).unwrap();
        assert_eq!(modes(), [0o600; 3]);
        drop((store, again));
    });
    thread.join().unwrap();
}
