//! The Debian package in a VM with systemd: its units, and VMs that outlive the service. Run by `make e2e-systemd`, which makes the package first.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use nexus_tests::client::{Client, stream};
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::wait::until;
use serde_json::{Value, json};

use crate::run::must;

/// The outer VM, whose daemon is the one that is tested.
const VM: &str = "systemd";
/// What the package depends on and systemd needs, so that nothing is downloaded in the VM.
const PACKAGES: [&str; 7] =
    ["systemd-sysv", "dbus", "libpam-systemd", "adduser", "e2fsprogs", "ca-certificates", "uidmap"];
/// How long building the image, and a boot of systemd, may take on a busy machine.
const IMAGE: Duration = Duration::from_mins(15);
const BOOT: Duration = Duration::from_mins(10);
/// How long a service may take to be up again, under software emulation.
const SERVICE: Duration = Duration::from_mins(5);
/// Runs the rest of a line as the user, with the user's manager.
const AS_ALICE: &str = "runuser -u alice -- env HOME=/home/alice XDG_RUNTIME_DIR=/run/user/$(id -u alice)";

#[test]
fn the_package_serves_under_systemd_and_its_vms_outlive_the_service() {
    let outside = tempfile::tempdir().expect("a directory");
    let guest = outside.path().join("nexus-guest");
    fs::write(&guest, nexus_host::daemon::AGENT).expect("write the guest");
    fs::set_permissions(&guest, fs::Permissions::from_mode(0o755)).expect("make the guest a program");
    fs::copy(package(), outside.path().join("nexus.deb")).expect("copy the package");

    let root = outside.path().display().to_string();
    let daemon = Daemon::start_set(&[("NEXUS_COPY_ROOTS", &root)]);
    let mut client = daemon.client();
    let template = json!({ "name": VM, "source": "debian-minimal", "packages": PACKAGES, "init": "system" });
    client.must("template_create", template);
    client.to_the_end("build_start", json!({ "template": VM, "wait_s": 0 }), IMAGE);
    let created = json!({ "name": VM, "from": format!("template:{VM}"), "network": "none", "wait_s": 0 });
    let vm = client.to_the_end("vm_create", created, BOOT);
    assert_eq!(vm["state"], "ready", "{vm}");
    for (from, to) in [("nexus-guest", "/usr/local/lib/nexus-guest"), ("nexus.deb", "/srv/nexus.deb")] {
        let from = outside.path().join(from).display().to_string();
        client.to_the_end("guest_copy_in", json!({ "vm": VM, "from": from, "to": to }), BOOT);
    }

    install(&mut client);
    println!("{}", judged(&mut client));
    let inner = Service { manager: "systemctl", ctl: "nexusctl", vm: "inner" };
    serve(&mut client, &inner);
    assert_eq!(must(&mut client, VM, "nexusctl exec inner -- echo here"), "here\n");
    outlive(&mut client, &inner, "systemctl restart nexus");
    // All processes of the service: shims are none of them.
    outlive(&mut client, &inner, "systemctl kill -s KILL nexus");
    let restarts = must(&mut client, VM, "systemctl show -p NRestarts --value nexus");
    assert_eq!(restarts.trim(), "1", "systemd has started it again, once");
    let upgrade = "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Options::=--force-confold \
        --reinstall install /srv/nexus.deb";
    outlive(&mut client, &inner, upgrade);
    let journal = must(&mut client, VM, "journalctl -u nexus --no-pager -o cat");
    assert!(journal.matches("serving").count() >= 4, "{journal}");
    assert!(!journal.contains("panicked"), "{journal}");
    assert_eq!(must(&mut client, VM, "nexusctl exec inner -- echo still here"), "still here\n");

    // The same for a user who is not logged in.
    must(&mut client, VM, "useradd --create-home --shell /bin/sh alice && loginctl enable-linger alice");
    let lingers = until(SERVICE, || {
        let state = client.run(VM, "systemctl is-active user@$(id -u alice).service").stdout;
        (state.trim() == "active").then_some(())
    });
    assert!(lingers.is_some(), "{}", client.run(VM, "loginctl user-status alice").stdout);
    let own = Service {
        manager: &format!("{AS_ALICE} systemctl --user"),
        ctl: &format!("{AS_ALICE} nexusctl"),
        vm: "own",
    };
    must(&mut client, VM, &format!("{} enable --now nexus", own.manager));
    serve(&mut client, &own);
    outlive(&mut client, &own, &format!("{} restart nexus", own.manager));
    outlive(&mut client, &own, &format!("{} kill -s KILL nexus", own.manager));
    let journal = must(&mut client, VM, "journalctl _SYSTEMD_USER_UNIT=nexus.service --no-pager -o cat");
    assert!(journal.contains("serving"), "{journal}");
    assert_eq!(daemons(&mut client), 2);
    // Each sees its own VMs only.
    for service in [&inner, &own] {
        let listed = must(&mut client, VM, &format!("{} vm list -q", service.ctl));
        assert_eq!(listed.lines().count(), 1, "{listed}");
        must(&mut client, VM, &format!("{} vm delete {} --force --yes", service.ctl, service.vm));
    }

    must(&mut client, VM, &format!("{} disable --now nexus", own.manager));
    must(&mut client, VM, "DEBIAN_FRONTEND=noninteractive apt-get -q -y purge nexus");
    let state = client.run(VM, "systemctl is-active nexus").stdout;
    assert_eq!(state.trim(), "inactive");
    must(&mut client, VM, "! find /etc/systemd -name nexus.service | grep .");
    assert_eq!(daemons(&mut client), 0, "a daemon is left");
}

/// The package that `make deb` has made.
fn package() -> PathBuf {
    let nexusd = program("nexusd");
    let target = nexusd.ancestors().nth(2).expect("target/PROFILE/nexusd");
    let arch = nexus_schema::Arch::HOST.of_packages();
    let package = target.join(format!("dist/nexus_{}-1_{arch}.deb", env!("CARGO_PKG_VERSION")));
    assert!(package.is_file(), "{} is not made: make deb", package.display());
    package
}

/// Installs the package, with VMs that are processes, and starts the service.
fn install(client: &mut Client) {
    let installed = must(
        client,
        VM,
        "DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install /srv/nexus.deb",
    );
    assert!(!installed.contains("Failed"), "{installed}");
    assert_eq!(
        client.run(VM, "systemctl is-enabled nexus").stdout.trim(),
        "disabled",
        "nobody has asked for it"
    );
    let configuration =
        r#"printf 'driver = "process"\nguest = "/usr/local/lib/nexus-guest"\n' >> /etc/nexus/nexus.toml"#;
    must(client, VM, configuration);
    must(
        client,
        VM,
        "mkdir -p /srv/image/etc && echo PRETTY_NAME=Nothing > /srv/image/etc/os-release && chmod -R a+rX /srv",
    );
    must(client, VM, "systemctl enable --now nexus || { journalctl -u nexus --no-pager; false; }");
    must(client, VM, "nexusctl status");
}

/// What systemd thinks of the unit as it runs.
fn judged(client: &mut Client) -> String {
    let set = must(client, VM, "cat /proc/$(systemctl show -p MainPID --value nexus)/status");
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1"] {
        assert!(set.contains(line), "{line}: {set}");
    }
    let judged = "set -o pipefail; systemd-analyze security nexus --no-pager --threshold=49 | tail -n 1";
    must(client, VM, judged).trim().to_owned()
}

/// The daemons that run there.
fn daemons(client: &mut Client) -> usize {
    client.run(VM, "grep -lx nexusd /proc/[0-9]*/comm").stdout.lines().count()
}

/// A manager of services, and a VM of the daemon that it runs.
struct Service<'a> {
    manager: &'a str,
    ctl: &'a str,
    vm: &'a str,
}

impl Service<'_> {
    /// The daemon's process.
    fn pid(&self, client: &mut Client) -> String {
        let said = must(client, VM, &format!("{} show -p MainPID --value nexus", self.manager));
        said.trim().to_owned()
    }

    /// The VM's details, if the daemon answers.
    fn try_look(&self, client: &mut Client) -> Option<Value> {
        let arguments = json!({ "vm": VM, "command": format!("{} --json vm inspect {}", self.ctl, self.vm) });
        let result = client.run_to_the_end(arguments).ok()?;
        serde_json::from_str(&stream(&result, "stdout")).ok().filter(|vm: &Value| vm["id"].is_string())
    }

    /// What must stay as it is of a VM that runs.
    fn look(&self, client: &mut Client) -> Value {
        let ready = until(SERVICE, || self.try_look(client).filter(|vm| vm["state"] == "ready"));
        let vm = match ready {
            Some(vm) => vm,
            None => panic!(
                "{} is not ready: {:?}\n{}",
                self.vm,
                self.try_look(client),
                client.run(VM, "journalctl --no-pager -n 50").stdout
            ),
        };
        let process = &vm["process"];
        assert!(process["pid"].is_u64() && process["shim_pid"].is_u64(), "{vm}");
        json!({ "id": vm["id"], "boot_id": vm["boot_id"], "pid": process["pid"], "shim_pid": process["shim_pid"] })
    }
}

/// Makes the VM.
fn serve(client: &mut Client, service: &Service<'_>) {
    must(client, VM, &format!("{} status", service.ctl));
    must(client, VM, &format!("{} vm create {} --from file:/srv/image --disk 128M", service.ctl, service.vm));
    let shim = service.look(client)["shim_pid"].to_string();
    let group = must(client, VM, &format!("cat /proc/{shim}/cgroup"));
    assert!(group.contains("/nexus/"), "the shim is in the group of its service: {group}");
}

/// Does something that ends the daemon and starts another one, over which the VM must go on.
fn outlive(client: &mut Client, service: &Service<'_>, what: &str) {
    let (daemon, before) = (service.pid(client), service.look(client));
    must(client, VM, what);
    let next = until(SERVICE, || Some(service.pid(client)).filter(|pid| *pid != daemon && pid != "0"));
    assert!(next.is_some(), "{what}: {}", client.run(VM, "journalctl --no-pager -n 50").stdout);
    assert_eq!(service.look(client), before, "{what}: the VM is not the same");
}
