//! Failures leave nothing behind.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_schema::ErrorCode;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::os::mounted::{Mounted, run};

fn source_of(base: &Path, mebibytes: usize) -> Source {
    let root = base.join("root");
    fs::create_dir(&root).unwrap();
    for number in 0..mebibytes {
        fs::write(root.join(number.to_string()), vec![1 + number as u8 % 200; 1 << 20]).unwrap();
    }
    Source::Directory(root)
}

#[tokio::test]
async fn a_full_disk_fails_cleanly() {
    let base = tempfile::tempdir().unwrap();
    let disk = Mounted::fresh("ext4", 128);
    let source = source_of(base.path(), 130);
    // Limited by the reserve, and by the disk itself.
    for (mebibytes, name) in [(64_u64, "reading"), (30, "later"), (0, "full")] {
        let limits = Limits { keep_free: mebibytes << 20, ..Limits::default() };
        let into = disk.path().join("image");
        let error = build_within(source.clone(), &into, &meta(InitMode::Agent), limits, &Progress::default())
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::DiskFull, "{name}: {error}");
        assert!(error.hint().unwrap().contains("free some space"), "{name}");
        assert_eq!(names(disk.path()), ["lost+found"], "{name}");
    }
}

#[tokio::test]
async fn cancellation_at_every_step_leaves_nothing() {
    let base = tempfile::tempdir().unwrap();
    let source = source_of(base.path(), 60);
    let images = base.path().join("images");
    fs::create_dir(&images).unwrap();
    let into = images.join("image");
    for wanted in ["reading", "writing", "checking"] {
        let error = loop {
            let (token, built) = begin(&source, &into, wanted).await;
            token.cancel();
            match built.await.unwrap() {
                Err(error) => break error,
                // The build was faster: try again.
                Ok(_) => fs::remove_dir_all(&into).unwrap(),
            }
        };
        assert_eq!(error.code(), ErrorCode::Cancelled, "{wanted}: {error}");
        assert!(names(&images).is_empty(), "{wanted}");
    }
}

/// Starts a build and waits until it reaches a step or ends.
async fn begin(
    source: &Source,
    into: &Path,
    wanted: &str,
) -> (CancellationToken, tokio::task::JoinHandle<Result<Built, ImageError>>) {
    let token = CancellationToken::new();
    let progress = Progress::new(token.clone());
    let mut watched = progress.watch();
    let (source, into) = (source.clone(), into.to_owned());
    let built = tokio::spawn(async move { build(source, &into, &meta(InitMode::Agent), &progress).await });
    // An error means that no more steps will be reported.
    drop(watched.wait_for(|p| p.step.starts_with(wanted)).await);
    (token, built)
}

#[tokio::test]
async fn a_build_that_nobody_waits_for_leaves_nothing() {
    let base = tempfile::tempdir().unwrap();
    let source = source_of(base.path(), 60);
    let images = base.path().join("images");
    fs::create_dir(&images).unwrap();
    let into = images.join("image");
    for wanted in ["reading", "writing"] {
        let token = loop {
            let (token, built) = begin(&source, &into, wanted).await;
            built.abort();
            match built.await {
                Err(error) => {
                    assert!(error.is_cancelled());
                    break token;
                }
                // The build was faster: try again.
                Ok(built) => {
                    built.unwrap();
                    fs::remove_dir_all(&into).unwrap();
                }
            }
        };
        // The source's reader is cancelled too, and cleans up after itself.
        token.cancel();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !names(&images).is_empty() {
            assert!(Instant::now() < deadline, "{wanted}: {:?}", names(&images));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn what_is_there_stays() {
    let base = tempfile::tempdir().unwrap();
    let source = source_of(base.path(), 1);
    let image = base.path().join("image");
    // An existing directory with the remains of an interrupted build.
    fs::create_dir(&image).unwrap();
    fs::create_dir(image.join(".build-old")).unwrap();
    fs::write(image.join(".build-old/0"), "x").unwrap();
    fs::write(image.join("note"), "mine").unwrap();
    let missing = Source::Directory(base.path().join("missing"));
    make(missing, &image).await.unwrap_err();
    assert_eq!(names(&image), ["note"]);
    let built = make(source.clone(), &image).await.unwrap();
    assert_eq!(names(&image), ["note", "rootfs.ext4"]);
    let before = fs::read(&built.path).unwrap();
    make(source, &image).await.unwrap_err();
    assert!(fs::read(&built.path).unwrap() == before);
}

#[tokio::test]
async fn sources_that_are_none_are_refused() {
    let base = tempfile::tempdir().unwrap();
    let file = base.path().join("file");
    for content in ["hello", &"hello, world\n".repeat(100)] {
        fs::write(&file, content).unwrap();
        let error = Source::detect(&file).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    }
    assert_eq!(Source::detect(&base.path().join("missing")).unwrap_err().code(), ErrorCode::InvalidArgument);
    let into = base.path().join("image");
    let error = make(Source::Busybox { binary: file.clone() }, &into).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    // An ext4 magic number alone is not a filesystem.
    let mut false_ext4 = vec![0; 1 << 20];
    false_ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    fs::write(&file, false_ext4).unwrap();
    let error = make(Source::detect(&file).unwrap(), &into).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageFailed, "{error}");
    // A filesystem that could not be grown is refused at import, not when a VM gets it.
    let disk = base.path().join("bigalloc");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4", "-O", "bigalloc"]).arg(&disk));
    let error = make(Source::detect(&disk).unwrap(), &into).await.unwrap_err();
    assert!(error.to_string().contains("bigalloc"), "{error}");
    assert!(!into.exists());
    let root = base.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("a"), "").unwrap();
    let made = build(Source::Directory(root), &into, &meta(InitMode::System), &Progress::default()).await;
    assert!(matches!(made, Err(ImageError::NoInit)));
    assert!(!into.exists());
}
