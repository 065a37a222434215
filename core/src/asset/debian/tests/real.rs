//! The chain against the archive that this host is configured for. This is the only test that downloads (some 20 to 60 MB).

use std::path::Path;
use std::time::Instant;

use nexus_schema::tools::asset::Verified;

use crate::asset::debian::Archive;
use crate::asset::{KernelFiles, compose_initramfs};
use crate::config::FetchSettings;
use crate::progress::Progress;

#[tokio::test]
async fn real_archive_gives_a_kernel_and_busybox() {
    let progress = Progress::default();
    let start = Instant::now();
    let told = |what: &str| println!("{what} after {:?}", start.elapsed());

    let archive = Archive::open(Path::new("/"), &FetchSettings::default(), &progress).await.unwrap();
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

    compare_with_depmod(dir.path(), &kernel);
    told("modules compared");

    let busybox =
        archive.fetch_package_file("busybox-static", "./bin/busybox", dir.path(), &progress).await.unwrap();
    told(&format!("busybox of {} bytes", busybox.size_bytes));
    let output = std::process::Command::new(&busybox.path).args(["echo", "it runs"]).output().unwrap();
    assert_eq!(output.stdout, b"it runs\n");

    let initramfs = compose_initramfs(&dir.path().join("cache"), &[0; 1 << 20], &kernel.modules).unwrap();
    told(&format!("initramfs of {} bytes", std::fs::metadata(&initramfs).unwrap().len()));
    let source = archive.bootstrap_source().unwrap();
    assert!(source.keyring.exists() && !source.mirrors.is_empty(), "{source:?}");

    // This takes memory that a daemon must not keep.
    drop(archive);
    let (now, most) = (memory("RssAnon:"), memory("VmHWM:"));
    told(&format!("{now} kB kept of {most} kB"));
    assert!(now < 16 << 10, "{now} kB are kept");
    assert!(most < 192 << 10, "{most} kB were needed");
}

/// All modules are there, and the files made for them equal depmod's.
fn compare_with_depmod(dir: &Path, kernel: &KernelFiles) {
    let run = |program: &str, arguments: &[&str]| {
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        let output = std::process::Command::new(program).env("PATH", path).args(arguments).output();
        let output = output.unwrap_or_else(|e| panic!("{program}: {e} (packages kmod and e2fsprogs)"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let image = kernel.module_image.as_ref().unwrap();
    let tree = dir.join("root/lib/modules").join(&kernel.version);
    std::fs::create_dir_all(&tree).unwrap();
    let dump = format!("rdump / {}", tree.display());
    run("debugfs", &["-R", &dump, image.path.to_str().unwrap()]);
    std::fs::remove_dir(tree.join("lost+found")).unwrap();
    let read = |name: &str| std::fs::read(tree.join(name)).unwrap();
    let names = ["dep", "alias", "symbols", "builtin", "builtin.alias"].map(|n| format!("modules.{n}.bin"));
    let (ours, our_aliases) = (names.clone().map(|name| read(&name)), read("modules.alias"));
    let (our_softdep, our_devname) = (read("modules.softdep"), read("modules.devname"));
    let our_dependencies = String::from_utf8(read("modules.dep")).unwrap();
    run("depmod", &["-b", dir.join("root").to_str().unwrap(), &kernel.version]);

    // The order of independent modules is not the same; what each depends on is.
    let dependencies =
        |text: &str| -> std::collections::BTreeMap<String, std::collections::BTreeSet<String>> {
            let lines = text.lines().map(|line| line.split_once(':').unwrap());
            lines.map(|(of, on)| (of.into(), on.split_whitespace().map(String::from).collect())).collect()
        };
    let theirs = String::from_utf8(read("modules.dep")).unwrap();
    assert!(theirs.lines().count() > 500, "{} modules", theirs.lines().count());
    assert_eq!(dependencies(&our_dependencies), dependencies(&theirs));
    assert_eq!(our_aliases, read("modules.alias"));
    assert_eq!(our_softdep, read("modules.softdep"));
    assert_eq!(our_devname, read("modules.devname"));
    for (name, ours) in names.iter().zip(ours) {
        if name != "modules.dep.bin" && name != "modules.symbols.bin" {
            assert!(ours == read(name), "{name} is not what depmod makes");
        }
    }
}

/// A figure of this process, in kB.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
