//! The kernel that `make kernel` builds, next to the distribution's, and one that is compiled in a VM. Run by `make e2e-kernel`.

use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::linux;
use nexus_tests::saved::outcome;
use nexus_tests::web::Web;
use serde_json::{Value, json};

/// How often each of the two is booted.
const TIMES: usize = 3;

#[test]
fn the_microvm_kernel_boots_faster_and_works() {
    let nexusd = program("nexusd");
    let target = nexusd.ancestors().nth(2).expect("target/PROFILE/nexusd");
    let kernel = target.join("kernel/vmlinux");
    assert!(kernel.is_file(), "{} is not built: make kernel", kernel.display());
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let imported =
        json!({ "kind": "kernel", "from": format!("file:{}", kernel.display()), "name": "microvm" });
    let asset = client.to_the_end("asset_download", imported, Duration::from_mins(2));
    let version = asset["version"].as_str().expect("a kernel has a version").to_owned();
    assert!(version.ends_with("-microvm"), "{asset}");

    // They take turns, so that a busy machine is busy for both.
    let (mut fast, mut plain) = (Vec::new(), Vec::new());
    for turn in 0..TIMES {
        for (boots, kernel) in [(&mut fast, "microvm"), (&mut plain, "debian")] {
            let name = format!("{kernel}-{turn}");
            let vm = client.create(json!({ "name": name, "from": "busybox", "kernel": kernel }));
            boots.push(milliseconds(&vm));
            if turn == 0 && kernel == "microvm" {
                works(&mut client, &name, &version);
            }
            client.must("vm_delete", json!({ "vm": name, "force": true }));
        }
    }
    let (fast, plain) = (median(&mut fast), median(&mut plain));
    println!("| boot, spawn to hello, median of {TIMES} | microvm {fast} ms | distribution {plain} ms |");
    assert!(fast * 10 < plain * 6, "it takes {fast} ms, the distribution's takes {plain} ms");
}

/// What was asked of its configuration is there.
fn works(client: &mut Client, vm: &str, version: &str) {
    assert_eq!(client.run(vm, "uname -r").stdout.trim(), version);
    for (what, command) in [
        ("the root filesystem has grown to its drive", "[ $(df -m / | awk 'END { print $2 }') -gt 7000 ]"),
        ("nothing is missed in /lib/modules", "[ ! -e /lib/modules/$(uname -r)/modules.dep ]"),
        ("overlay", "grep -q overlay /proc/filesystems"),
        ("squashfs", "grep -q squashfs /proc/filesystems"),
        ("cgroups", "[ -e /sys/fs/cgroup/cgroup.controllers ]"),
        ("namespaces", "unshare -m -u -i -n -p -f -U -r true"),
        ("namespaces of time", "[ -e /proc/self/ns/time ] && [ -e /proc/self/ns/cgroup ]"),
        (
            "what sandboxes ask for",
            "mount -t securityfs none /sys/kernel/security && grep -q landlock /sys/kernel/security/lsm",
        ),
        ("bridges", "brctl addbr bridge && brctl addif bridge dummy0"),
        (
            "what Docker's networks ask for",
            "zcat /proc/config.gz | grep -Ec '^CONFIG_(VETH|NFT_COMPAT|IP_NF_NAT)=y' | grep -q 3",
        ),
        ("limits of containers", "grep -q 'cpu .*io .*memory .*pids' /sys/fs/cgroup/cgroup.controllers"),
        ("random numbers at once", "head -c 16 /dev/random | wc -c | grep -q 16"),
    ] {
        let ran = client.run(vm, command);
        assert_eq!(ran.exit_code, Some(0), "{what}: {ran:?}");
    }
}

fn milliseconds(vm: &Value) -> u64 {
    vm["timings"]["boot_ms"].as_u64().unwrap_or_else(|| panic!("a boot has its time: {vm}"))
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The source is a small one, but it is compiled in a real VM of the template that is made for that, from the package archive.
#[test]
fn a_kernel_is_compiled_in_a_vm_by_the_compiler_of_its_template() {
    let web = Web::start();
    let public = linux::serve(&web, "");
    let providers = linux::providers(&web, &[public]);
    let daemon = Daemon::start_set(&[("NEXUS_PROVIDERS", &providers), ("NO_PROXY", "127.0.0.1")]);
    let mut client = daemon.client();
    let build = json!({ "version": linux::VERSION, "from": "kernel-org", "config": "CONFIG_64BIT=y\n", "name": "in-vm",
        "in_vm": true, "wait_s": 45 });
    let built = outcome(&mut client, "kernel_build", build).unwrap_or_else(|e| panic!("{}", e.text));
    assert_eq!((&built["ok"], &built["asset"]["version"]), (&json!(true), &json!(linux::BUILT)), "{built}");
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]), "its VM is deleted");
    let template = client.must("template_inspect", json!({ "template": "kernel-builder" }));
    assert!(template["spec"]["packages"].to_string().contains("gcc"), "{template}");
}
