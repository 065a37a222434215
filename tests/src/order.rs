//! Whether everything that a daemon keeps belongs together: rows, files, processes and sockets.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use nexus_core::store::{Store, StoreError, drives, images, ops, vms};

use crate::daemon::Daemon;
use crate::wait::until;

/// How long ends may take to be all over after they were reported.
const SETTLE: Duration = Duration::from_secs(15);

/// Looks for anything that belongs to nothing. To be called when nothing is being made.
#[track_caller]
pub fn assert_in_order(daemon: &Daemon) {
    let mut findings = Vec::new();
    let in_order = until(SETTLE, || {
        findings = look(daemon);
        findings.is_empty().then_some(())
    });
    assert!(in_order.is_some(), "not in order: {findings:#?}\n{}", daemon.log());
}

/// Everything that is out of order.
fn look(daemon: &Daemon) -> Vec<String> {
    let state = daemon.state();
    let rows = rows(&state.join("nexus.db"));
    let mut findings = rows.half;
    for (directory, known) in [
        ("vms", &rows.vms),
        ("drives", &rows.drives),
        ("images", &rows.images),
        ("scratch", &BTreeSet::new()),
    ] {
        for name in names(&state.join(directory)) {
            if !known.contains(&name) {
                findings.push(format!("{directory}/{name} belongs to nothing"));
            }
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
        let place = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
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
    half: Vec<String>,
}

fn rows(database: &Path) -> Rows {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let store = Store::open(database).expect("the database opens beside its daemon");
    let read = store.read(|db| -> Result<Rows, StoreError> {
        let mut rows = Rows::default();
        for vm in vms::all(db)? {
            let attached = drives::of_vm(db, vm.id)?;
            if attached.len() != 1 || !attached.iter().all(|drive| drive.ready) {
                rows.half.push(format!("{} is {} and has the drives {attached:?}", vm.name, vm.state));
            }
            if vm.state.may_run() {
                rows.running.insert(vm.id.to_string());
            }
            rows.vms.insert(vm.id.to_string());
        }
        for drive in drives::all(db)? {
            if !drive.ready {
                rows.half.push(format!("the drive {} is half made", drive.name));
            }
            rows.drives.insert(drive.id.to_string());
        }
        if rows.drives.len() != rows.vms.len() {
            rows.half.push(format!("{} VMs have {} drives", rows.vms.len(), rows.drives.len()));
        }
        for image in images::all(db)? {
            if !image.ready {
                rows.half.push(format!("the image {} is half made", image.name));
            }
            rows.images.insert(image.id.to_string());
        }
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
