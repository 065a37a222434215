use super::*;

fn config() -> Config {
    Config {
        state_dir: "/nowhere".into(),
        agent: b"",
        foreign_agent: None,
        shim_binary: "/nowhere".into(),
        driver: DriverSetting::Auto,
        apt_root: "/".into(),
        home: None,
        docker_config: None,
        docker_environment: Default::default(),
        vmms: Default::default(),
        assets: Default::default(),
        boot_timeout_s: 60,
        boot_timeout_tcg_s: 180,
        stop_timeout_s: 20,
        jail: true,
        copy_roots: Vec::new(),
        audit_file: None,
        nexus_net: "/nowhere/nexus-net".into(),
        force_kvm: false,
    }
}

fn vmms(firecracker: Program, qemu: Program) -> Vec<FoundVmm> {
    let jailer = DoctorCheck {
        name: "jailer".into(),
        status: DoctorStatus::Ok,
        found: "/bin/jailer".into(),
        fix: None,
    };
    let closer = Closer { unjailable: None, for_root: Some(jailer) };
    let found = |kind, program, closer| {
        let vmm = facts(kind).vmm.as_ref().unwrap();
        FoundVmm { kind, vmm, program, closer }
    };
    vec![
        found(DriverKind::Firecracker, firecracker, closer),
        found(DriverKind::Qemu, qemu, Closer::default()),
    ]
}

fn host_with_firecracker(firecracker: Program) -> Host {
    let qemu = host().vmms.pop().unwrap().program;
    Host { vmms: vmms(firecracker, qemu), ..host() }
}

pub(super) fn host() -> Host {
    Host {
        setting: DriverSetting::Auto,
        kvm: Kvm::Usable,
        force_kvm: false,
        walls: Walls {
            jail: true,
            landlock: Some(6),
            groups: Some("control groups, version 2 (cpu, io, memory, pids)".into()),
            lacking: vec![],
        },
        vmms: vmms(
            Program::Found { binary: "/bin/firecracker".into(), version: Version(1, 16, 1) },
            Program::Found { binary: "/bin/qemu".into(), version: Version(7, 2, 22) },
        ),
        foreign: Foreign { program: Program::Missing, has_guest: false },
        e2fsck: Some("/bin/e2fsck".into()),
        debugfs: Some("/bin/debugfs".into()),
        mmdebstrap: Some("/bin/mmdebstrap".into()),
        ids: Ok(()),
        memory_available: Some(8 << 30),
        is_root: true,
        nat: Ok(FoundNat::default()),
    }
}

fn picked(host: &Host, choice: DriverChoice) -> (DriverKind, Accel) {
    let choice = host.choose(choice).unwrap();
    (choice.driver, choice.accel)
}

#[test]
fn auto_prefers_firecracker_where_the_hardware_allows_it() {
    assert_eq!(picked(&host(), DriverChoice::Auto), (DriverKind::Firecracker, Accel::Kvm));
    assert_eq!(picked(&host(), DriverChoice::Qemu), (DriverKind::Qemu, Accel::Kvm));
    let no_firecracker = host_with_firecracker(Program::Missing);
    assert_eq!(picked(&no_firecracker, DriverChoice::Auto), (DriverKind::Qemu, Accel::Kvm));
    assert_eq!(no_firecracker.report().why, "hardware KVM works; firecracker is not installed");
    let old = Program::Found { binary: "/bin/firecracker".into(), version: Version(1, 9, 0) };
    assert_eq!(picked(&host_with_firecracker(old), DriverChoice::Auto), (DriverKind::Qemu, Accel::Kvm));
    for kvm in [Kvm::SoftwareOnly, Kvm::NoDevice, Kvm::Denied, Kvm::NoModule] {
        let host = Host { kvm, ..host() };
        assert_eq!(picked(&host, DriverChoice::Auto), (DriverKind::Qemu, Accel::Tcg));
        let refused = host.choose(DriverChoice::Firecracker).unwrap_err();
        assert_eq!(refused.code, ErrorCode::HostUnsuitable);
        assert!(refused.hint.unwrap().contains("use driver `qemu`"));
    }
}

#[test]
fn vms_that_can_be_checkpointed_get_a_driver_that_can() {
    let chosen = |host: Host, choice| host.choose_for_checkpoints(choice).unwrap().driver;
    assert_eq!(chosen(host(), DriverChoice::Auto), DriverKind::Firecracker);
    assert_eq!(chosen(host(), DriverChoice::Qemu), DriverKind::Qemu);
    assert_eq!(chosen(host_with_firecracker(Program::Missing), DriverChoice::Auto), DriverKind::Qemu);
    let fixed = || Host { setting: DriverSetting::Vmm(DriverKind::Qemu), ..host() };
    assert_eq!(chosen(fixed(), DriverChoice::Auto), DriverKind::Qemu);
    assert_eq!(chosen(fixed(), DriverChoice::Firecracker), DriverKind::Firecracker);
    // An older one cannot, and is refused with the version that can.
    let old = Program::Found { binary: "/bin/firecracker".into(), version: Version(1, 15, 0) };
    let refused = host_with_firecracker(old).choose_for_checkpoints(DriverChoice::Firecracker).unwrap_err();
    assert_eq!(refused.code, ErrorCode::HostUnsuitable);
    assert!(format!("{} {:?}", refused.message, refused.hint).contains("1.16.1"), "{refused:?}");
    let guest = Host { setting: DriverSetting::Process { guest: "/g".into() }, ..host() };
    let refused = guest.choose_for_checkpoints(DriverChoice::Auto).unwrap_err();
    assert!(refused.message.contains("driver process") && refused.hint.unwrap().contains("driver qemu"));
}

#[test]
fn the_configuration_decides_for_auto() {
    let host = Host { setting: DriverSetting::Vmm(DriverKind::Qemu), ..host() };
    assert_eq!(picked(&host, DriverChoice::Auto), (DriverKind::Qemu, Accel::Kvm));
    let guest = DriverSetting::Process { guest: "/bin/guest".into() };
    let host = Host { setting: guest, ..host };
    assert_eq!(host.choose(DriverChoice::Auto).unwrap().driver, DriverKind::Process);
}

#[test]
fn without_any_vmm_the_report_says_what_to_install() {
    let host = Host {
        kvm: Kvm::SoftwareOnly,
        vmms: vmms(Program::Missing, Program::Missing),
        mmdebstrap: None,
        ..host()
    };
    let report = host.report();
    assert!(!report.ok);
    insta::assert_json_snapshot!("nothing_installed", report);
    assert!(
        host.choose(DriverChoice::Auto).unwrap_err().to_string().contains("apt-get install qemu-system-x86")
    );
}

#[test]
fn the_report_of_software_emulation() {
    let host = Host { kvm: Kvm::SoftwareOnly, ..host_with_firecracker(Program::Missing) };
    insta::assert_json_snapshot!("software_emulation", host.report());
}

#[test]
fn a_program_that_is_no_vmm_is_not_taken() {
    let vmms = [(DriverKind::Qemu, "/bin/false"), (DriverKind::Firecracker, "/nowhere/f")];
    let config =
        Config { vmms: vmms.map(|(kind, path)| (kind, path.into())).into_iter().collect(), ..config() };
    let host = examine(&config);
    let error = host.choose(DriverChoice::Qemu).unwrap_err();
    assert!(error.message.contains("does not run from /bin/false"), "{error}");
    assert!(!host.report().ok);
}

#[test]
fn this_host_is_examined_quickly() {
    let started = std::time::Instant::now();
    let host = examine(&config());
    assert!(started.elapsed() < std::time::Duration::from_secs(40));
    // This workspace's tests need QEMU.
    assert!(host.report().ok, "{:#?}", host.report());
}

#[test]
fn a_network_of_an_ordinary_user_is_reported_with_what_it_lacks() {
    let check = |nat| {
        let host = Host { nat, is_root: false, ..host() };
        let check = host.report().checks.into_iter().find(|check| check.name == "nat").unwrap();
        (host.check_nat(), check)
    };
    let found = FoundNat { found: Some("by slirp4netns".into()), lack: None };
    let (usable, shown) = check(Ok(found.clone()));
    assert_eq!(
        (usable, shown.status, shown.found.as_str()),
        (Ok(()), DoctorStatus::Ok, "VMs can have network nat, by slirp4netns")
    );
    let complaint = Complaint { why: "no pings".into(), fix: "as root: sysctl".into() };
    let (usable, shown) = check(Ok(FoundNat { lack: Some(complaint.clone()), ..found }));
    assert_eq!(
        (usable, shown.status, shown.fix.as_deref()),
        (Ok(()), DoctorStatus::Note, Some("as root: sysctl"))
    );
    assert!(shown.found.ends_with("; no pings"), "{}", shown.found);
    let (usable, shown) = check(Err(complaint));
    let refused = usable.unwrap_err();
    assert_eq!(refused.code, ErrorCode::HostUnsuitable);
    assert!(refused.message.ends_with("no pings") && refused.hint.unwrap().starts_with("as root: sysctl"));
    assert_eq!(shown.fix.as_deref(), Some("as root: sysctl"));
}

#[test]
fn what_a_host_forbids_its_users_is_reported_with_the_fix() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("nexus-net");
    let lack = r#"{"unusable":{"why":"this host does not let its users make network namespaces","fix":"as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"}}"#;
    std::fs::write(&program, format!("#!/bin/sh\necho a warning >&2\necho '{lack}'\n")).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let host = Host { nat: probe::own_nat(&program), is_root: false, ..host() };
    let check = host.report().checks.into_iter().find(|check| check.name == "nat").unwrap();
    assert_eq!(
        (check.status, check.found.as_str(), check.fix.as_deref()),
        (
            DoctorStatus::Note,
            "VMs cannot have network nat: this host does not let its users make network namespaces; network proxy works",
            Some("as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0")
        )
    );
    assert!(host.check_nat().unwrap_err().hint.unwrap().ends_with("=0, or use network proxy"));
    assert!(host.report().ok, "VMs run all the same");
}

#[test]
fn ids_matter_to_ordinary_users_only() {
    let lacking = Lacking { user: "me".into(), file: "etc/subuid" };
    let check = |is_root, ids| {
        let report = Host { is_root, ids, ..host() }.report();
        assert!(report.ok);
        report.checks.into_iter().find(|check| check.name == "subids")
    };
    assert!(check(true, Err(lacking.clone())).is_none());
    assert_eq!(check(false, Ok(())).unwrap().status, DoctorStatus::Ok);
    let found = check(false, Err(lacking)).unwrap();
    assert_eq!(found.status, DoctorStatus::Warn);
    assert!(found.found.contains("me has no range of 65536 subordinate ids"), "{}", found.found);
    assert!(found.fix.unwrap().starts_with("as root: usermod --add-subuids"));
}

#[test]
fn the_owner_of_a_host_may_insist_on_kvm_that_opens() {
    let host = Host { kvm: Kvm::SoftwareOnly, force_kvm: true, ..host() };
    assert_eq!(picked(&host, DriverChoice::Auto), (DriverKind::Firecracker, Accel::Kvm));
    assert_eq!(picked(&host, DriverChoice::Qemu), (DriverKind::Qemu, Accel::Kvm));
    let check = host.report().checks.into_iter().find(|check| check.name == "kvm").unwrap();
    assert_eq!(check.status, DoctorStatus::Warn);
    assert!(check.found.contains("`force_kvm`") && check.found.contains("kvm_pvm"), "{}", check.found);
    let without = Host { kvm: Kvm::NoDevice, ..host };
    assert_eq!(picked(&without, DriverChoice::Auto), (DriverKind::Qemu, Accel::Tcg));
}

#[test]
fn a_vmm_that_cannot_be_put_in_its_jail_is_not_used() {
    let mut vmms = host().vmms;
    let why = "needs the loader /lib64/ld-linux-x86-64.so.2, which is not in its jail";
    vmms[0].closer.unjailable = Some((why.into(), "install another".into()));
    let dynamic = Host { vmms, ..host() };
    assert_eq!(picked(&dynamic, DriverChoice::Auto), (DriverKind::Qemu, Accel::Kvm));
    assert_eq!(dynamic.report().why, format!("hardware KVM works; firecracker {why}"));
    let refused = dynamic.choose(DriverChoice::Firecracker).unwrap_err();
    assert!(refused.message.contains("/lib64/ld-linux-x86-64.so.2"), "{}", refused.message);
    let check = dynamic.report().checks.into_iter().find(|check| check.name == "firecracker").unwrap();
    assert_eq!(check.status, DoctorStatus::Warn);
    let unjailed = Host { is_root: false, ..dynamic };
    assert_eq!(picked(&unjailed, DriverChoice::Auto), (DriverKind::Firecracker, Accel::Kvm));
}
