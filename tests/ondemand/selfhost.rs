//! Nexus in a VM of Nexus: the tutorial that tests and builds it there, and boots a VM with the guest that was built. Run by `make e2e-selfhost`.

use std::path::Path;
use std::process::Command;

use nexus_tests::daemon::Daemon;
use nexus_tests::tutorial::Place;

#[test]
fn a_vm_boots_with_the_guest_that_a_vm_has_built() {
    let place = Place::default();
    // The page begins with a clone: what is committed.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cloned = Command::new("git")
        .args(["clone", "--quiet", "--no-hardlinks", "--depth", "1"])
        .arg(format!("file://{}", repository.canonicalize().expect("the repository").display()))
        .arg(place.path().join("nexus"))
        .status();
    assert!(cloned.expect("git runs; install git").success(), "git clone failed");
    let root = place.path().display().to_string();
    let daemon = Daemon::start_set(&[("NEXUS_COPY_ROOTS", &root)]);
    place.follow("nexus-in-nexus.md", &daemon);
}
