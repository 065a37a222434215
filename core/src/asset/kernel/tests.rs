//! Kernels of every compression, and files that only resemble one.

use std::io::Write;

use super::bzimage::examine;
use super::*;
use crate::asset::stream::Compression;
use crate::asset::testing::{arm64_image, bz_image, elf_kernel, module};

const VERSION: &str = "6.1.0-40-cloud-amd64";

fn elf() -> Vec<u8> {
    let mut body: Vec<u8> = (0..400_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    body.extend_from_slice(format!("Linux version %s\0Linux version {VERSION} (x@y) #1\0").as_bytes());
    elf_kernel(&body)
}

fn import(bytes: &[u8], sha256: Option<&str>) -> (tempfile::TempDir, Result<KernelFiles, AssetError>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("given");
    std::fs::write(&file, bytes).unwrap();
    let result = import_kernel(&file, &dir.path().join("kernel"), sha256);
    (dir, result)
}

fn problem(bytes: &[u8]) -> KernelProblem {
    let (dir, result) = import(bytes, None);
    assert!(!dir.path().join("kernel/kernel.json").exists());
    assert!(!dir.path().join("kernel/vmlinux").exists());
    match result.unwrap_err() {
        AssetError::Kernel { problem, .. } => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_compression_unpacks_to_the_same_kernel() {
    let elf = elf();
    for compression in
        [Compression::Plain, Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Lz4Legacy]
    {
        let (dir, result) = import(&bz_image(&elf, compression, VERSION), None);
        let kernel = result.unwrap();
        assert_eq!(std::fs::read(&kernel.vmlinux).unwrap(), elf, "{compression:?}");
        assert_eq!(kernel.version, VERSION);
        assert_eq!(kernel.sha256, Sha256::of(&elf).to_string());
        assert_eq!((kernel.modules.len(), kernel.verified), (0, Verified::None));
        assert_eq!(KernelFiles::load(&dir.path().join("kernel")).unwrap(), kernel);
    }
}

#[test]
fn an_elf_file_is_taken_as_it_is_and_says_its_version_itself() {
    let elf = elf();
    let digest = Sha256::of(&elf).to_string();
    let (_dir, result) = import(&elf, Some(&digest.to_uppercase()));
    let kernel = result.unwrap();
    assert_eq!((kernel.version.as_str(), kernel.verified), (VERSION, Verified::Checksum));
    assert_eq!(kernel.size_bytes, elf.len() as u64);

    let (_dir, result) = import(&elf_kernel(b"says nothing"), None);
    assert_eq!(result.unwrap().version, "unknown");
}

#[test]
fn an_image_of_arm64_is_taken_as_it_is_on_every_host() {
    let image = arm64_image(b"code\0Linux version 6.12.1-cloud-arm64 (x@y) #1\0");
    let (dir, result) = import(&image, None);
    let kernel = result.unwrap();
    assert_eq!((kernel.arch, kernel.version.as_str()), (Arch::Aarch64, "6.12.1-cloud-arm64"));
    assert_eq!(std::fs::read(&kernel.vmlinux).unwrap(), image);
    assert_eq!(KernelFiles::load(&dir.path().join("kernel")).unwrap(), kernel);
    let (_dir, result) = import(&elf(), None);
    assert_eq!(result.unwrap().arch, Arch::HOST);

    let mut big_endian = image.clone();
    big_endian[24] = 1;
    assert!(matches!(problem(&big_endian), KernelProblem::Malformed("it is big-endian")));
    let mut short = image.clone();
    short[16..24].copy_from_slice(&63_u64.to_le_bytes());
    assert!(matches!(problem(&short), KernelProblem::Malformed(_)));
    assert!(matches!(problem(&image[..60]), KernelProblem::Malformed(_)));
}

#[test]
fn a_kernel_of_an_earlier_version_is_for_the_host() {
    let (dir, result) = import(&elf(), None);
    let facts = dir.path().join("kernel/kernel.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&facts).unwrap()).unwrap();
    assert_eq!(json.as_object_mut().unwrap().remove("arch"), Some(Arch::HOST.as_str().into()));
    std::fs::write(&facts, json.to_string()).unwrap();
    assert_eq!(KernelFiles::load(&dir.path().join("kernel")).unwrap(), result.unwrap());
}

#[test]
fn a_digest_that_is_given_counts() {
    let elf = elf();
    let (_dir, result) = import(&elf, Some(&"0".repeat(64)));
    assert!(matches!(result, Err(AssetError::Checksum { .. })), "{result:?}");
    let (_dir, result) = import(&elf, Some("abc"));
    assert!(matches!(result, Err(AssetError::NotADigest { .. })), "{result:?}");
}

#[test]
fn what_is_no_kernel_is_refused() {
    assert!(matches!(problem(b""), KernelProblem::UnknownFormat));
    assert!(matches!(problem(b"#!/bin/sh\n"), KernelProblem::UnknownFormat));
    assert!(matches!(problem(b"\x7fELF"), KernelProblem::WrongElf(..)));

    let elf = elf();
    let mut other_machine = elf.clone();
    other_machine[0x12] = 8;
    assert!(matches!(problem(&other_machine), KernelProblem::WrongElf(..)));
    assert!(matches!(problem(&elf[..elf.len() / 2]), KernelProblem::WrongElf(_, "it is cut off")));
    assert!(matches!(problem(&module(&["depends="])), KernelProblem::WrongElf(..)));
    let nested = bz_image(b"no ELF file in here", Compression::Gzip, VERSION);
    assert!(matches!(problem(&nested), KernelProblem::WrongElf(..)));
}

#[test]
fn damaged_images_are_refused() {
    let elf = elf();
    for compression in [Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Lz4Legacy] {
        let image = bz_image(&elf, compression, VERSION);
        assert!(
            matches!(problem(&image[..image.len() - 10]), KernelProblem::Malformed(_)),
            "{compression:?}"
        );
        // The size behind the payload differs from the unpacked size.
        for size in [elf.len() as u32 - 1, elf.len() as u32 + 1, u32::MAX] {
            let mut wrong = image.clone();
            let end = wrong.len();
            wrong[end - 4..].copy_from_slice(&size.to_le_bytes());
            let problem = problem(&wrong);
            let fits = matches!(
                problem,
                KernelProblem::TooLarge { .. } | KernelProblem::Length { .. } | KernelProblem::Damaged(_)
            );
            assert!(fits, "{compression:?} {size} {problem:?}");
        }
        let mut flipped = image.clone();
        let middle = 0xa20 + (image.len() - 0xa20) / 2;
        flipped[middle..middle + 64].iter_mut().for_each(|b| *b ^= 0x5a);
        // LZ4's legacy frames have no checksum, and Zstandard's checksum is optional: the result may be longer, shorter or different.
        if matches!(compression, Compression::Gzip | Compression::Xz) {
            let problem = problem(&flipped);
            assert!(matches!(problem, KernelProblem::Damaged(_)), "{compression:?} {problem:?}");
        }
    }
    let mut unknown = bz_image(&elf, Compression::Gzip, VERSION);
    unknown[0xa20..0xa23].copy_from_slice(b"BZh");
    assert!(matches!(problem(&unknown), KernelProblem::Compression("bzip2")));
}

#[test]
fn a_bomb_is_stopped_at_the_size_that_its_header_says() {
    let bomb = vec![0; 64 << 20];
    let mut image = bz_image(&bomb, Compression::Xz, VERSION);
    let end = image.len();
    image[end - 4..].copy_from_slice(&1000u32.to_le_bytes());
    assert!(matches!(problem(&image), KernelProblem::TooLarge { limit: 1000 }));
}

#[test]
fn a_directory_and_a_missing_file_are_no_kernels() {
    let dir = tempfile::tempdir().unwrap();
    let result = import_kernel(dir.path(), &dir.path().join("k"), None);
    assert!(result.is_err());
    let error = import_kernel(&dir.path().join("none"), &dir.path().join("k"), None).unwrap_err();
    assert!(nexus_schema::error::chain(&error).contains("none"), "{error:?}");
    assert!(KernelFiles::load(dir.path()).is_err());
    std::fs::write(dir.path().join("kernel.json"), "{}").unwrap();
    assert!(matches!(
        KernelFiles::load(dir.path()),
        Err(AssetError::Kernel { problem: KernelProblem::Facts(_), .. })
    ));
}

#[test]
fn a_version_is_found_across_pieces() {
    let text = [vec![b'x'; 5000], b"Linux version 6.1.2-x (".to_vec(), vec![b'y'; 5000]].concat();
    for size in [1, 7, 100, 4096] {
        let mut scan = VersionScan::default();
        text.chunks(size).for_each(|piece| scan.push(piece));
        assert_eq!(scan.found.as_deref(), Some("6.1.2-x"), "{size}");
    }
}

/// A set of modules: name, what it depends on, what should be before it.
fn modules(all: &[(&str, &str, &str)], builtin: Option<&str>) -> Modules {
    let mut modules = Modules::default();
    if let Some(list) = builtin {
        modules.set_builtin(list);
    }
    for (name, depends, before) in all {
        let entries =
            [format!("depends={depends}"), format!("softdep=pre: {before}"), format!("name={name}")];
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        modules.add(name, module(&entries)).unwrap();
    }
    modules
}

const DEBIAN: [(&str, &str, &str); 10] = [
    ("virtio_mmio", "virtio,virtio_ring", ""),
    ("virtio_blk", "virtio_ring,virtio", ""),
    ("virtio_net", "net_failover,virtio,virtio_ring", ""),
    ("vmw_vsock_virtio_transport", "vmw-vsock-virtio-transport-common,vsock,virtio", ""),
    ("vmw_vsock_virtio_transport_common", "vsock", ""),
    ("net_failover", "failover", ""),
    ("failover", "", ""),
    ("vsock", "", ""),
    ("virtio", "", ""),
    ("virtio_ring", "virtio", ""),
];
const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\nkernel/drivers/char/hw_random/rng-core.ko\n";

fn order(modules: &Modules) -> Vec<String> {
    match modules.choose().unwrap() {
        Choice::Order(order) => order,
        Choice::Unread(names) => panic!("unread: {names:?}"),
    }
}

#[test]
fn modules_come_after_what_they_depend_on() {
    let order = order(&modules(&DEBIAN, Some(BUILTIN)));
    assert_eq!(order.len(), DEBIAN.len());
    let at = |name: &str| order.iter().position(|n| n == name).unwrap();
    for (name, depends, _) in DEBIAN {
        for dependency in depends.split(',').filter(|d| !d.is_empty()) {
            assert!(at(&dependency.replace('-', "_")) < at(name), "{order:?}");
        }
    }
}

#[test]
fn a_modular_ext4_brings_what_it_needs() {
    let mut all = DEBIAN.to_vec();
    all.extend([
        ("ext4", "crc16,mbcache,jbd2", "crc32c"),
        ("jbd2", "", ""),
        ("mbcache", "", ""),
        ("crc16", "", ""),
        ("crc32c_generic", "", ""),
        ("unneeded", "", ""),
    ]);
    let order = order(&modules(&all, Some("")));
    assert_eq!(order.last().unwrap(), "ext4");
    assert_eq!(order.len(), all.len() - 1, "{order:?}");
}

#[test]
fn what_is_neither_there_nor_built_in_is_missed() {
    let error = modules(&DEBIAN, Some("")).choose().unwrap_err();
    assert!(matches!(error, KernelProblem::NoModule(name) if name == "ext4"));
    // Without a list of built-in modules, missing ones are assumed to be built in.
    assert_eq!(order(&modules(&[], None)), Vec::<String>::new());
    // Entropy is optional.
    let builtin = "virtio_mmio.ko\nvirtio_blk.ko\nvirtio_net.ko\nvmw_vsock_virtio_transport.ko\next4.ko\n";
    assert_eq!(order(&modules(&[], Some(builtin))), Vec::<String>::new());
}

#[test]
fn modules_that_need_each_other_are_refused() {
    let all = [("virtio_mmio", "virtio_ring", ""), ("virtio_ring", "virtio_mmio", "")];
    assert!(matches!(modules(&all, None).choose(), Err(KernelProblem::Circle(_))));
    let soft = [("virtio_mmio", "", "virtio_ring"), ("virtio_ring", "", "virtio_mmio")];
    assert_eq!(order(&modules(&soft, None)), ["virtio_ring", "virtio_mmio"]);
}

#[test]
fn what_was_not_read_yet_is_asked_for() {
    let mut modules = modules(&DEBIAN[..1], None);
    modules.note_present("virtio");
    assert_eq!(modules.choose().unwrap(), Choice::Unread(["virtio".to_owned()].into()));
}

#[test]
fn module_names_are_told_from_paths() {
    for (path, name) in [
        ("kernel/drivers/char/hw_random/virtio-rng.ko", Some("virtio_rng")),
        ("a/b.ko.xz", Some("b")),
        ("b.ko.zst", Some("b")),
        ("a/b.ko.sig", None),
        ("a/.ko", None),
        ("a/b\n.ko", None),
        ("a/b", None),
    ] {
        assert_eq!(module_name(path).as_deref(), name, "{path}");
    }
}

#[test]
fn a_kernel_directory_has_its_modules_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let modules = modules(&DEBIAN, Some(BUILTIN));
    let order = order(&modules);
    let provenance = Provenance { origin: "x 1".into(), version: None, verified: Verified::Signature };
    let image = bz_image(&elf(), Compression::Lz4Legacy, VERSION);
    let kernel = install(&image, &modules, &order, None, provenance, dir.path()).unwrap();
    let names: Vec<_> = kernel.modules.iter().map(|m| m.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names[0], format!("00-{}.ko", order[0]));
    assert!(names.is_sorted() && names.len() == 10);
    std::fs::remove_file(&kernel.modules[3]).unwrap();
    assert!(KernelFiles::load(dir.path()).is_err(), "a kernel without one of its modules is not whole");
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_a_kernel_or_refused(mut bytes: Vec<u8>, header: bool) {
        if header {
            bytes.resize(bytes.len().max(0x300), 1);
            bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
        }
        if let Ok(Image::BzImage(image)) = examine(&bytes)
            && let Ok(mut reader) = image.reader()
        {
            let mut out = Vec::new();
            let _ = (&mut reader as &mut dyn Read).take(1 << 20).read_to_end(&mut out);
        }
        let _ = check_elf(&bytes, bytes.len() as u64);
    }

    #[test]
    fn any_module_is_read_or_refused(at: u16, byte: u8, cut in 0usize..400) {
        let mut file = module(&["depends=a,b", "softdep=pre: c post: d", "x"]);
        let length = file.len();
        file[usize::from(at) % length] = byte;
        file.truncate(length - cut.min(length));
        let _ = Modules::default().add("m", file);
    }
}

#[test]
fn a_written_kernel_is_readable_by_the_vmm_of_any_user() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf()).unwrap();
    let kernel = import_kernel(file.path(), dir.path(), None).unwrap();
    assert_eq!(std::fs::metadata(kernel.vmlinux).unwrap().permissions().mode() & 0o777, 0o644);
}
