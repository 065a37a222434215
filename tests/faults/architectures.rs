//! VMs of another architecture where nothing runs them: refused with what is missing, and nothing is left of them.

use std::fs;
use std::path::Path;

use nexus_schema::Arch;
use nexus_tests::daemon::Daemon;
use serde_json::json;

use crate::world::{SOON, refused};

/// A directory whose shell is a program for arm64, as far as its header says.
fn root_of_arm64(at: &Path) {
    let mut program = b"\x7fELF\x02\x01".to_vec();
    program.resize(64, 0);
    program[18..20].copy_from_slice(&Arch::Aarch64.elf_machine().to_le_bytes());
    for directory in ["bin", "etc"] {
        fs::create_dir_all(at.join(directory)).expect("a directory is made");
    }
    fs::write(at.join("bin/sh"), program).expect("a file is written");
    fs::write(at.join("etc/os-release"), "ID=far\n").expect("a file is written");
}

/// The header of an image of arm64, which says that it is as long as it is.
fn kernel_of_arm64() -> Vec<u8> {
    let mut image = vec![0; 64];
    image[16] = 64;
    image[56..60].copy_from_slice(b"ARMd");
    image
}

#[test]
fn a_vm_of_arm64_is_refused_where_there_is_no_guest_for_it() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let [made, unmade, kernel] = ["made", "unmade", "Image"].map(|name| daemon.root().join(name));
    root_of_arm64(&made);
    root_of_arm64(&unmade);
    fs::write(&kernel, kernel_of_arm64()).expect("a file is written");
    let file = |path: &Path| format!("file:{}", path.display());
    let image = json!({ "from": file(&made), "name": "far" });
    let image = client.to_the_end("image_create", image, SOON);
    assert_eq!((&image["arch"], &image["distro"]), (&json!("aarch64"), &json!("far")), "{image}");
    let copy = client.to_the_end("image_create", json!({ "from": "image:far", "name": "copy" }), SOON);
    assert_eq!(copy["arch"], "aarch64", "an image of an image is of the same: {copy}");

    let kernel = file(&kernel);
    for (from, kernel, code, told) in [
        // An image that exists is known at once, one that is made first only then.
        ("far", &kernel, "host_unsuitable", "VMs of aarch64 (experimental) cannot be run"),
        (file(&unmade).as_str(), &kernel, "host_unsuitable", "VMs of aarch64 (experimental) cannot be run"),
        ("busybox", &kernel, "invalid_argument", "is for aarch64, and image busybox for x86_64"),
    ] {
        let arguments =
            json!({ "name": "vain", "from": from, "kernel": kernel, "start": false, "wait_s": 45 });
        let failure = refused(&mut client, "vm_create", arguments);
        assert_eq!(failure.code, code, "{}", failure.text);
        assert!(failure.text.contains(told), "{}", failure.text);
        assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]), "nothing is left");
    }
    let listed = client.must("asset_list", json!({ "kind": "kernel", "limit": 500, "available": false }));
    let assets = listed["assets"].as_array().expect("a list");
    let of = |arch: Arch| assets.iter().filter(|asset| asset["arch"] == arch.as_str()).count();
    assert_eq!((of(Arch::X86_64), of(Arch::Aarch64)), (1, 1), "{listed}");
    let default = json!({ "kind": "kernel", "from": kernel, "make_default": true, "wait_s": 45 });
    let failure = refused(&mut client, "asset_download", default);
    assert!(failure.text.contains("is for aarch64"), "{}", failure.text);
    let default = assets.iter().find(|asset| asset["default"] == true).expect("one is the default");
    assert_eq!(default["arch"], "x86_64", "{listed}");
}
