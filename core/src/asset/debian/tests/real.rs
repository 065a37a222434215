//! The chain against the archive that this host is configured for: the one test that downloads (some 20 to 60 MB).

use std::path::Path;
use std::time::Instant;

use nexus_schema::tools::asset::Verified;

use crate::asset::debian::Archive;
use crate::asset::{KernelFiles, compose_initramfs};
use crate::op::Progress;

#[tokio::test]
async fn real_archive_gives_a_kernel_and_busybox() {
    let progress = Progress::default();
    let start = Instant::now();
    let told = |what: &str| println!("{what} after {:?}", start.elapsed());

    let archive = Archive::open(Path::new("/"), &progress).await.unwrap();
    told(&format!("opened, with {:?} not used,", archive.problems()));
    let kernels = archive.kernels().await.unwrap();
    told(&format!(
        "{} kernels, newest {} with {} bytes",
        kernels.len(),
        kernels[0].version,
        kernels[0].size_bytes
    ));

    let dir = tempfile::tempdir().unwrap();
    let into = dir.path().join("kernel");
    let kernel = archive.fetch_kernel(None, &into, &progress).await.unwrap();
    let names: Vec<_> = kernel.modules.iter().map(|m| m.file_name().unwrap().to_str().unwrap()).collect();
    told(&format!("kernel of {} bytes with {names:?}", kernel.size_bytes));
    assert_eq!(
        (kernel.version.as_str(), kernel.verified),
        (kernels[0].version.as_str(), Verified::Signature)
    );
    assert_eq!(KernelFiles::load(&into).unwrap(), kernel);
    assert!(std::fs::read(&kernel.vmlinux).unwrap().starts_with(b"\x7fELF"));
    assert!(names.iter().any(|n| n.ends_with("-vmw_vsock_virtio_transport.ko")), "{names:?}");

    let busybox =
        archive.fetch_package_file("busybox-static", "./bin/busybox", dir.path(), &progress).await.unwrap();
    told(&format!("busybox of {} bytes", busybox.size_bytes));
    let output = std::process::Command::new(&busybox.path).args(["echo", "it runs"]).output().unwrap();
    assert_eq!(output.stdout, b"it runs\n");

    let initramfs = compose_initramfs(&dir.path().join("cache"), &[0; 1 << 20], &kernel.modules).unwrap();
    told(&format!("initramfs of {} bytes", std::fs::metadata(&initramfs).unwrap().len()));
    let source = archive.bootstrap_source();
    assert!(source.keyring.exists() && !source.mirrors.is_empty(), "{source:?}");

    // All this needs memory, and a daemon must not keep it.
    drop(archive);
    let (now, most) = (memory("RssAnon:"), memory("VmHWM:"));
    told(&format!("{now} kB kept of {most} kB"));
    assert!(now < 16 << 10, "{now} kB are kept");
    assert!(most < 192 << 10, "{most} kB were needed");
}

/// A figure of this process, in kB.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
