//! The kernel of the test guest.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Names a directory with a kernel: `vmlinux` or `vmlinuz`, and `modules/*.ko`, whose names sort in load order.
const VARIABLE: &str = "NEXUS_TEST_KERNEL_DIR";
/// The modules that a distribution's kernel needs for a vsock device on virtio-mmio, in load order.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// A kernel and the modules that the test guest loads.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The file that QEMU boots: an ELF file or a bzImage.
    pub image: PathBuf,
    /// Modules in load order.
    pub modules: Vec<PathBuf>,
}

impl Kernel {
    /// The kernel in the directory that `NEXUS_TEST_KERNEL_DIR` names, or else the one of the Debian package
    /// `linux-image-cloud-amd64`, which apt downloads into `cache` once.
    ///
    /// Panics if there is none: a skipped test must not count as passed.
    pub fn find(cache: &Path) -> Kernel {
        match std::env::var_os(VARIABLE) {
            Some(directory) => Self::load(Path::new(&directory)),
            None => Self::load(&fetch(cache)),
        }
    }

    /// The kernel in `directory`.
    pub fn load(directory: &Path) -> Kernel {
        let image = ["vmlinux", "vmlinuz"]
            .iter()
            .map(|name| directory.join(name))
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("no vmlinux or vmlinuz in {} (see {VARIABLE})", directory.display()));
        let mut modules: Vec<PathBuf> = match std::fs::read_dir(directory.join("modules")) {
            Ok(entries) => entries.map(|entry| entry.expect("list the modules").path()).collect(),
            Err(_) => vec![],
        };
        modules.retain(|path| path.extension().is_some_and(|extension| extension == "ko"));
        modules.sort();
        Kernel { image, modules }
    }
}

/// Downloads Debian's kernel into a directory under `cache` that stays empty until it is complete.
fn fetch(cache: &Path) -> PathBuf {
    let done = cache.join("vsock-test-kernel");
    if done.exists() {
        return done;
    }
    std::fs::create_dir_all(cache).expect("make the kernel's cache directory");
    let scratch = tempfile::tempdir_in(cache).expect("make a scratch directory");
    let run = |program: &str, arguments: &[&str]| -> String {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(scratch.path())
            .output()
            .unwrap_or_else(|e| panic!("run {program}: {e}; or name a kernel by {VARIABLE}"));
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}; or name a kernel by {VARIABLE}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("package names are ASCII")
    };
    let depends = run("apt-cache", &["depends", "linux-image-cloud-amd64"]);
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .unwrap_or_else(|| panic!("no kernel package to be had from apt; name a kernel by {VARIABLE}"));
    run("apt-get", &["download", package]);
    run(
        "sh",
        &[
            "-c",
            "dpkg-deb -x ./*.deb unpacked && mkdir -p ready/modules && mv unpacked/boot/vmlinuz-* ready/vmlinuz",
        ],
    );
    let found = run("find", &["unpacked/lib/modules", "-name", "*.ko"]);
    for (at, module) in MODULES.iter().enumerate() {
        let file = found.lines().find(|path| Path::new(path).file_stem().is_some_and(|stem| stem == *module));
        if let Some(file) = file {
            let to = scratch.path().join(format!("ready/modules/{at:02}-{module}.ko"));
            std::fs::rename(scratch.path().join(file), to).expect("keep a module");
        }
    }
    // Another process may have been faster; its result is just as good.
    if let Err(error) = std::fs::rename(scratch.path().join("ready"), &done) {
        assert!(done.exists(), "keep the kernel: {error}");
    }
    done
}
