//! Checks that everything a daemon keeps is consistent: rows, files, processes and sockets.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nexus_core::internals::{Store, StoreError, assets, builds, drives, images, ops, vms};
use nexus_schema::tools::build::BuildStatus;

use crate::daemon::Daemon;
use crate::wait::until;

/// How long cleanup may take after an end was reported.
const SETTLE: Duration = Duration::from_secs(60);

/// Looks for anything orphaned. Call it while nothing is being made.
#[track_caller]
pub fn assert_in_order(daemon: &Daemon) {
    let mut findings = Vec::new();
    let in_order = until(SETTLE, || {
        findings = look(daemon);
        findings.is_empty().then_some(())
    });
    assert!(in_order.is_some(), "not in order: {findings:#?}\n{}", daemon.log());
}

/// Everything that is inconsistent.
fn look(daemon: &Daemon) -> Vec<String> {
    let state = daemon.state();
    let rows = rows(&state.join("nexus.db"));
    let mut findings = rows.half;
    for (directory, known) in [
        ("vms", &rows.vms),
        ("drives", &rows.drives),
        ("images", &rows.images),
        ("assets", &rows.assets),
        ("builds", &rows.builds),
        ("suspended", &rows.suspended),
        ("scratch", &BTreeSet::new()),
    ] {
        for name in names(&state.join(directory)) {
            if !known.contains(&name) {
                findings.push(format!("{directory}/{name} belongs to nothing"));
            }
        }
    }
    for (directory, file) in [("drives", "disk.ext4"), ("images", "rootfs.ext4")] {
        for id in names(&state.join(directory)) {
            let there = names(&state.join(directory).join(&id));
            for left in there.iter().filter(|name| *name != file) {
                findings.push(format!("{directory}/{id}/{left} is left behind"));
            }
        }
    }
    for name in names(&state.join("downloads")) {
        if !name.ends_with(".part") && !name.ends_with(".json") {
            findings.push(format!("downloads/{name} is nothing to go on with"));
        }
    }
    for name in names(&state.join("prepared")) {
        if name.ends_with(".part") {
            findings.push(format!("prepared/{name} is half made"));
        }
    }
    for id in rows.vms.difference(&rows.running) {
        let directory = state.join("vms").join(id);
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_socket() || kind.is_fifo()) {
                findings.push(format!("{} of a VM that does not run", entry.path().display()));
            }
        }
    }
    for pid in daemon.processes() {
        let mut place = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        // A jailed VMM sees only its jail, which is in its VM's directory.
        if place.ends_with("jail") {
            place.pop();
        }
        let id = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !rows.running.contains(&id) && !place.as_os_str().is_empty() {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            findings.push(format!("process {pid} ({line:?}) in {} of no running VM", place.display()));
        }
    }
    findings
}

#[derive(Default)]
struct Rows {
    vms: BTreeSet<String>,
    running: BTreeSet<String>,
    drives: BTreeSet<String>,
    images: BTreeSet<String>,
    assets: BTreeSet<String>,
    builds: BTreeSet<String>,
    suspended: BTreeSet<String>,
    half: Vec<String>,
}

fn rows(database: &Path) -> Rows {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let store = Store::open(database).expect("the database opens beside its daemon");
    let read = store.read(|db| -> Result<Rows, StoreError> {
        let mut rows = Rows::default();
        for vm in vms::all(db)? {
            let attached = drives::of_vm(db, vm.id)?;
            let own = attached.iter().filter(|drive| drive.made_for == Some(vm.id)).count();
            if own != 1 || !attached.iter().all(|drive| drive.ready) {
                rows.half.push(format!("{} is {} and has the drives {attached:?}", vm.name, vm.state));
            }
            if vm.state.may_run() {
                rows.running.insert(vm.id.to_string());
            }
            rows.suspended.extend(vm.suspended.map(|memory| memory.manifest.checkpoint.to_string()));
            rows.vms.insert(vm.id.to_string());
        }
        for drive in drives::all(db)? {
            if !drive.ready {
                rows.half.push(format!("the drive {} is half made", drive.name));
            }
            if drive.made_for.is_some_and(|vm| !rows.vms.contains(&vm.to_string())) {
                rows.half.push(format!("the VM of the drive {} is gone", drive.name));
            }
            rows.drives.insert(drive.id.to_string());
        }
        for image in images::all(db)? {
            if !image.ready {
                rows.half.push(format!("the image {} is half made", image.name));
            }
            rows.images.insert(image.id.to_string());
        }
        rows.assets.extend(assets::all(db)?.into_iter().map(|asset| asset.id.to_string()));
        rows.builds.extend(builds::ids(db)?.into_iter().map(|id| id.to_string()));
        let building = builds::list(db, None, Some(BuildStatus::Building), None, 100)?;
        rows.half.extend(building.iter().map(|build| format!("the build {} never ends", build.id)));
        rows.half.extend(ops::running(db)?.iter().map(|op| format!("{:?} is still running", op.summary)));
        Ok(rows)
    });
    runtime.block_on(read).expect("the rows are read")
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
