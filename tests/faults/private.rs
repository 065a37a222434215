//! A daemon's files are private to its user, regardless of the umask and of their previous modes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use nexus_tests::daemon::Daemon;

#[test]
fn state_is_private_at_every_start() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let state = place.path().join("state");
    // The umask belongs to the thread, and is inherited by the daemon that it starts.
    let mut daemon = std::thread::scope(|scope| {
        let start = || {
            // SAFETY: descriptors stay shared; the umask and the working directory become this thread's own.
            let own = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) };
            own.expect("filesystem settings of its own");
            rustix::process::umask(rustix::fs::Mode::empty());
            fs::create_dir(&state).expect("a state directory");
            Daemon::start_bare_at(&state, &[])
        };
        scope.spawn(start).join().expect("a daemon")
    });
    let names = ["", "nexus.db", "nexus.db-wal", "nexus.db-shm", "vms", "drives", "images", "assets"];
    let modes = || {
        names.map(|name| {
            let metadata = fs::metadata(state.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            format!("{name} {:o}", metadata.permissions().mode() & 0o7777)
        })
    };
    let private = [
        " 700",
        "nexus.db 600",
        "nexus.db-wal 600",
        "nexus.db-shm 600",
        "vms 700",
        "drives 700",
        "images 700",
        "assets 700",
    ];
    assert_eq!(modes(), private);

    daemon.kill();
    for name in names {
        let mode = if name.contains('.') { 0o644 } else { 0o755 };
        fs::set_permissions(state.join(name), Permissions::from_mode(mode)).expect("root may do this");
    }
    daemon.restart();
    assert_eq!(modes(), private);
}
