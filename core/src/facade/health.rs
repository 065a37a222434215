//! What the doctor says about the database.

use std::path::Path;

use nexus_schema::ByteSize;
use nexus_schema::tools::system::{Doctor, DoctorCheck, DoctorStatus};

use crate::os::paths::Paths;
use crate::store::SCHEMA_VERSION;
use crate::store::health::{Health, examine};

/// Checks the database of a state directory and adds the finding to a report. Reads the whole database and changes nothing. Blocks.
///
/// With a damaged database, or one of a newer version, no daemon starts: then the report is no longer `ok`.
pub fn add_database_check(report: &mut Doctor, state_dir: &Path) {
    let check = database_check(&Paths::new(state_dir).database());
    if check.status == DoctorStatus::Fail {
        report.ok = false;
        report.why.clone_from(&check.found);
    }
    report.checks.push(check);
}

fn database_check(path: &Path) -> DoctorCheck {
    let shown = path.display();
    let (status, found, fix) = match examine(path) {
        Ok(Health::Missing) => {
            (DoctorStatus::Note, format!("{shown} is made when the daemon first starts"), None)
        }
        Ok(Health::Whole { schema, bytes }) => {
            let size = ByteSize::bytes(bytes).as_mib();
            let older = if schema < SCHEMA_VERSION { ", upgraded when the daemon starts" } else { "" };
            let found = format!("no damage found in {shown} (version {schema}{older}, {size} MiB)");
            (DoctorStatus::Ok, found, None)
        }
        Ok(Health::Busy) => {
            let found = format!("{shown} is not checked: the disk was full when its daemon started");
            (DoctorStatus::Note, found, Some("free space, then restart nexusd".to_owned()))
        }
        Ok(Health::Newer { schema }) => (
            DoctorStatus::Fail,
            format!("{shown} has version {schema}, and this nexusd knows versions up to {SCHEMA_VERSION}"),
            Some("start the newer nexusd that wrote it".to_owned()),
        ),
        Ok(Health::Damaged { why }) => (
            DoctorStatus::Fail,
            format!("{shown} is damaged: {why}"),
            Some(format!(
                "stop nexusd, copy the state directory, move the database away with its -wal and -shm, and put back a copy of yours or {shown}.before-vN: VMs and disks that it does not know are kept, and listed in kept.json"
            )),
        ),
        Err(error) => (
            DoctorStatus::Warn,
            format!("{shown} cannot be checked: {}", nexus_schema::error::chain(&error)),
            None,
        ),
    };
    DoctorCheck { name: "database".to_owned(), status, found, fix }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report_of(directory: &Path) -> (bool, DoctorCheck) {
        let (driver, accel) = (Some("qemu".to_owned()), Some("kvm".to_owned()));
        let mut report =
            Doctor { ok: true, driver, accel, why: "hardware KVM works".to_owned(), checks: Vec::new() };
        add_database_check(&mut report, directory);
        assert_eq!(report.why == "hardware KVM works", report.ok);
        (report.ok, report.checks.remove(0))
    }

    #[test]
    fn the_doctor_tells_a_damaged_database_from_a_missing_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = Paths::new(directory.path()).database();
        let (ok, check) = report_of(directory.path());
        assert_eq!((ok, check.status), (true, DoctorStatus::Note));
        drop(crate::store::Store::open(&path).unwrap());
        let (ok, check) = report_of(directory.path());
        assert_eq!((ok, check.status), (true, DoctorStatus::Ok));
        assert!(check.found.contains("no damage found"), "{}", check.found);
        std::fs::write(
            &path,
            "no database at all, but long enough to have a header that can be read as one.".repeat(9),
        )
        .unwrap();
        let (ok, check) = report_of(directory.path());
        assert_eq!((ok, check.status), (false, DoctorStatus::Fail));
        assert!(check.found.contains("nexus.db is damaged"), "{}", check.found);
        assert!(check.fix.unwrap().contains("before-vN"));
    }
}
