//! A build from beginning to end, of a source that is small but is built by the real programs.

use std::process::Command;

use super::*;

/// A source with the targets of Linux that a build asks for. Its kernel has the options as text.
const MAKEFILE: &str = "\
allnoconfig:
\tgrep -v NOT_THERE \"$$KCONFIG_ALLCONFIG\" > .config
vmlinux: .config
\techo \"  CC      init/main.o\"
\techo once >> ../compiled
\t{ echo 'const char banner[] = \"Linux version 6.12.1-test (nexus@nexus)\";'; echo 'void _start(void) { for (;;); }'; } > main.c
\tgcc -static -nostdlib -no-pie -g -o vmlinux main.c
";

/// The directory of a build, with its source.
fn scene() -> (tempfile::TempDir, Work) {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("linux-6.12.1");
    fs::create_dir_all(inner.join("tools/testing/selftests")).unwrap();
    fs::write(inner.join("Makefile"), MAKEFILE).unwrap();
    fs::write(inner.join("tools/testing/selftests/large"), "x").unwrap();
    let directory = dir.path().join("work");
    fs::create_dir(&directory).unwrap();
    let work = Work::new(directory, "6.12.1");
    let mut tar = Command::new("tar");
    tar.arg("-cJf").arg(work.source()).arg("-C").arg(dir.path()).arg("linux-6.12.1");
    assert!(tar.status().unwrap().success());
    (dir, work)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_is_built_from_its_source_and_an_interrupted_build_goes_on() {
    let (_dir, work) = scene();
    let progress = Progress::default().logged(crate::progress::Log::open(&work.log()).unwrap());
    let kernel = work.build("CONFIG_64BIT=y\n# a comment\nCONFIG_MODULES=n\n", &progress).await.unwrap();
    let bytes = fs::read(&kernel).unwrap();
    assert!(bytes.starts_with(b"\x7fELF"));
    assert!(memchr::memmem::find(&bytes, b"Linux version 6.12.1-test ").is_some());
    assert!(!work.tree().join("tools/testing").exists(), "what no kernel needs is not unpacked");
    let log = fs::read_to_string(work.log()).unwrap();
    for step in ["unpacking Linux 6.12.1", "configuring", "compiling", "CC init/main.o"] {
        let log = log.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(log.contains(step), "{step}: {log}");
    }

    // What is unpacked and compiled stays until the kernel is in its place.
    fs::remove_file(work.source()).unwrap();
    work.build("CONFIG_64BIT=y\n", &progress).await.unwrap();
    work.clear().await;
    let left: Vec<_> =
        fs::read_dir(work.log().parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.contains(&"log".into()) && !left.contains(&"tree".into()), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_the_source_lacks_are_named_before_anything_is_compiled() {
    let (_dir, work) = scene();
    let config = "CONFIG_64BIT=y\nCONFIG_NOT_THERE=y\nCONFIG_NOT_THERE_EITHER=n\nCONFIG_GCC_VERSION=120200\n";
    let error = work.build(config, &Progress::default()).await.unwrap_err();
    assert!(error.to_string().ends_with("CONFIG_NOT_THERE=y"), "{error}");
    assert_eq!(error.code(), nexus_schema::ErrorCode::InvalidArgument);
    assert!(!work.tree().join("vmlinux").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compiler_that_fails_is_heard() {
    let (_dir, work) = scene();
    work.unpack(&Progress::default()).await.unwrap();
    fs::write(
        work.tree().join("Makefile"),
        "allnoconfig:\n\ttouch .config\nvmlinux:\n\techo no such luck >&2; false\n",
    )
    .unwrap();
    let progress = Progress::default().logged(crate::progress::Log::open(&work.log()).unwrap());
    let error = work.build("", &progress).await.unwrap_err();
    let text = nexus_schema::error::chain(&error);
    assert!(text.starts_with("compile Linux 6.12.1: make failed") && text.contains("no such luck"), "{text}");
    assert_eq!(error.code(), nexus_schema::ErrorCode::ImageFailed);
    assert!(fs::read_to_string(work.log()).unwrap().contains("no such luck"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_cancelled() {
    let (_dir, work) = scene();
    let cancel = tokio_util::sync::CancellationToken::new();
    cancel.cancel();
    let error = work.build("", &Progress::new(cancel)).await.unwrap_err();
    assert_eq!(error.code(), nexus_schema::ErrorCode::Cancelled, "{error}");
}

#[test]
fn the_built_in_configuration_has_options_only() {
    let odd: Vec<_> = MICROVM
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with("CONFIG_"))
        .collect();
    assert!(odd.is_empty(), "{odd:?}");
    assert!(unmet(MICROVM, MICROVM).is_empty());
    assert!(unmet(MICROVM, "").len() > 50);
}

#[tokio::test]
async fn old_builds_are_removed_and_the_one_in_use_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let old = SystemTime::now() - KEPT - Duration::from_secs(60);
    for name in ["old", "used", "new"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        if name != "new" {
            std::fs::File::open(dir.path().join(name)).unwrap().set_modified(old).unwrap();
        }
    }
    sweep(dir.path(), &dir.path().join("used")).await;
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["new", "used"]);
}
