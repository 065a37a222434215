//! The chain against the archive that this host is configured for.

use std::path::Path;
use std::time::Instant;

use crate::asset::compose_initramfs;
use crate::asset::debian::Archive;
use crate::op::Progress;

#[tokio::test]
async fn real_archive_gives_a_kernel_and_busybox() {
    let progress = Progress::default();
    let start = Instant::now();
    let archive = Archive::open(Path::new("/"), &progress).await.unwrap();
    println!("open {:?} {:?}", start.elapsed(), archive.problems());
    let kernels = archive.kernels().await.unwrap();
    println!("kernels {:?} {:?}", start.elapsed(), kernels.iter().map(|k| &k.version).collect::<Vec<_>>());
    let dir = tempfile::tempdir().unwrap();
    let kernel = archive.fetch_kernel(None, &dir.path().join("kernel"), &progress).await.unwrap();
    println!("kernel {:?} {kernel:#?}", start.elapsed());
    let busybox =
        archive.fetch_package_file("busybox-static", "./bin/busybox", dir.path(), &progress).await.unwrap();
    println!("busybox {:?} {busybox:#?}", start.elapsed());
    let initramfs = compose_initramfs(&dir.path().join("cache"), b"agent", &kernel.modules).unwrap();
    println!("initramfs {:?} {}", start.elapsed(), std::fs::metadata(&initramfs).unwrap().len());
    println!("{:#?}", archive.bootstrap_source());
}
