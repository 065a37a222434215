//! The files for measuring the data plane: made once, kept in `bench` of the target directory, removed by `cargo clean`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nexus_core::FetchSettings;
use nexus_core::internals::Archive;
use nexus_core::internals::Progress;
use nexus_tests::daemon::program;

/// The directory.
pub(crate) fn home() -> PathBuf {
    let built = program("nexusd");
    let target = built.parent().and_then(Path::parent).expect("programs are in the target directory");
    let home = target.join("bench");
    fs::create_dir_all(&home).expect("a directory for what is measured with");
    home
}

/// A file of [`home`]. If it is missing, `make` writes it to the given path.
pub(crate) fn kept(name: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let path = home().join(name);
    if !path.exists() {
        eprintln!("making {}, once", path.display());
        let half = home().join(format!("half-{name}"));
        match fs::remove_dir_all(&half) {
            Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
                fs::remove_file(&half).expect("old halves go")
            }
            _ => {}
        }
        make(&half);
        fs::rename(&half, &path).expect("it is whole");
    }
    path
}

/// A root filesystem of the host's own distribution as a tar, some 200 MB.
pub(crate) fn rootfs() -> PathBuf {
    kept("rootfs.tar", |tar| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        let archive =
            runtime.block_on(Archive::open(Path::new("/"), &FetchSettings::default(), &Progress::default()));
        let packages =
            archive.expect("apt is configured for an archive of Debian or Ubuntu").bootstrap_source();
        let packages = packages.expect("the archive's keyring is there");
        let mut call = Command::new("mmdebstrap");
        call.args(["--quiet", "--variant=minbase", "--format=tar", "--include=python3-minimal"]);
        call.arg(format!("--keyring={}", packages.keyring.display()));
        call.args(packages.proxies.reveal().lines().map(|option| format!("--aptopt={option}")));
        run(call.arg(&packages.suite).arg(tar).args(&packages.mirrors));
    })
}

/// Runs a program that must succeed; returns how long it took.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Duration {
    let start = Instant::now();
    let done = command.stdin(Stdio::null()).output();
    let took = start.elapsed();
    let done = done.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    took
}

/// The same for a line of bash.
#[track_caller]
pub(crate) fn bash(line: &str) -> Duration {
    run(Command::new("bash").args(["-e", "-o", "pipefail", "-c", line]))
}

/// Whether a program is installed.
pub(crate) fn has(name: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|at| at.join(name).is_file())
}

/// Flushes pending writes, so that they do not affect the next measurement.
pub(crate) fn settle(path: &Path) {
    let file = File::open(path).expect("it is there");
    rustix::fs::syncfs(&file).expect("the filesystem is written out");
}

/// The median of some durations.
pub(crate) fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// One duration as a multiple of another.
pub(crate) fn ratio(of: Duration, to: Duration) -> f64 {
    of.as_secs_f64() / to.as_secs_f64()
}
