//! Errors come with hints.

use std::os::unix::fs::PermissionsExt;

use nexus_net_wire::{ClientError, ErrorCode, NetError, Request, Vm};

use crate::world::{Net, World, instance, vm};

#[track_caller]
fn refused(net: &mut Net, request: Request) -> NetError {
    match net.call(request.clone()) {
        Err(ClientError::Failed { source }) => source,
        other => panic!("{request:?}: {other:?}"),
    }
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let world = World::new();
    let mut net = world.start(instance("0a1b2c3d", "10.77"), None);
    let good = vm(&net.instance, 2);
    let error = refused(&mut net, Request::Attach { vm: good.clone() });
    assert_eq!(error.code, ErrorCode::NotConfigured);
    assert!(net.state().instance.is_none());
    let mut taken = net.instance.clone();
    taken.v4.subnet = "198.51.0.0/16".parse().unwrap();
    taken.v4.gateway = "198.51.0.1".parse().unwrap();
    let error = refused(&mut net, Request::Configure { instance: taken });
    assert_eq!(error.code, ErrorCode::InUse);
    assert!(error.message.contains("up0 has 198.51.100.1"), "{error}");
    let mut outside = net.instance.clone();
    outside.v4.gateway = "10.78.0.1".parse().unwrap();
    assert_eq!(refused(&mut net, Request::Configure { instance: outside }).code, ErrorCode::Invalid);
    net.configure();
    net.attach(&good);
    let other = vm(&net.instance, 3);
    for (vm, code) in [
        (Vm { ipv4: "10.78.0.3".parse().unwrap(), ..other.clone() }, ErrorCode::Invalid),
        (Vm { ipv4: good.ipv4, ..other.clone() }, ErrorCode::InUse),
        (Vm { ipv6: good.ipv6, ..other.clone() }, ErrorCode::InUse),
        (Vm { ipv4: net.instance.v4.gateway, ..other.clone() }, ErrorCode::InUse),
        (Vm { mac: good.mac, ..other.clone() }, ErrorCode::InUse),
        (Vm { mac: "ff:ff:ff:ff:ff:ff".parse().unwrap(), ..other.clone() }, ErrorCode::Invalid),
    ] {
        assert_eq!(refused(&mut net, Request::Attach { vm: vm.clone() }).code, code, "{vm:?}");
    }
    assert_eq!(refused(&mut net, Request::Update { vm: other }).code, ErrorCode::NoSuchVm);
    assert_eq!(net.state().vms.len(), 1);
}

#[test]
fn a_kernel_without_tap_devices_is_told() {
    let world = World::new();
    // A mount that hides the device, for this process only.
    let script = world.directory.join("without-tun");
    let program = env!("CARGO_BIN_EXE_nexus-net");
    let text = format!("#!/bin/sh\nmount -t tmpfs none /dev/net && exec {program} \"$@\"\n");
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let mut net =
        world.start_by(&["unshare", "--mount", script.to_str().unwrap()], instance("0a1b2c3d", "10.77"));
    net.configure();
    let vm = vm(&net.instance, 2);
    let error = refused(&mut net, Request::Attach { vm });
    assert_eq!(error.code, ErrorCode::NoTun);
    assert!(error.hint.unwrap().contains("modprobe tun"));
    assert!(error.message.contains("create a TAP for VM"), "{}", error.message);
}

#[test]
fn a_kernel_without_nf_tables_is_told() {
    let world = World::new();
    // A seccomp filter answers as a kernel without nf_tables would: there is no such netlink protocol.
    let python = "import ctypes,os,struct,sys\n\
        libc=ctypes.CDLL(None,use_errno=True)\n\
        def op(code,jt,jf,k): return struct.pack('HBBI',code,jt,jf,k)\n\
        SOCKET=41 if os.uname().machine=='x86_64' else 198\n\
        program=op(0x20,0,0,0)+op(0x15,0,3,SOCKET)+op(0x20,0,0,32)+op(0x15,0,1,12)+op(6,0,0,0x50000|93)+op(6,0,0,0x7fff0000)\n\
        code=ctypes.create_string_buffer(program)\n\
        fprog=struct.pack('HxxxxxxP',len(program)//8,ctypes.addressof(code))\n\
        assert libc.prctl(38,1,0,0,0)==0 and libc.prctl(22,2,fprog,0,0)==0\n\
        os.execv(sys.argv[1],sys.argv[1:])\n";
    let script = world.directory.join("without-nf-tables.py");
    std::fs::write(&script, python).unwrap();
    let program = env!("CARGO_BIN_EXE_nexus-net");
    let command = ["python3", script.to_str().unwrap(), program];
    let mut net = world.start_by(&command, instance("0a1b2c3d", "10.77"));
    let request = Request::Configure { instance: net.instance.clone() };
    let error = refused(&mut net, request);
    assert_eq!(error.code, ErrorCode::NoNfTables, "{error}");
    assert!(error.hint.unwrap().contains("modprobe nf_tables"));
    assert!(!world.host.ip("-o link show").contains("nxb"), "nothing is made");
}

#[test]
fn without_privileges_it_is_told() {
    let world = World::new();
    let program = env!("CARGO_BIN_EXE_nexus-net");
    let command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", program];
    let mut net = world.start_by(&command, instance("0a1b2c3d", "10.77"));
    let request = Request::Configure { instance: net.instance.clone() };
    let error = refused(&mut net, request);
    assert_eq!(error.code, ErrorCode::NotPermitted, "{error}");
    assert!(error.hint.unwrap().contains("CAP_NET_ADMIN"));
}

#[test]
fn it_holds_three_privileges_and_no_others() {
    let world = World::new();
    let mut net = world.net();
    let status = std::fs::read_to_string(format!("/proc/{}/status", net.child.id())).unwrap();
    let value = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN 12, CAP_NET_RAW 13.
    let kept = format!("{:016x}", 1 << 10 | 1 << 12 | 1 << 13);
    for (name, expected) in [
        ("CapEff:", kept.as_str()),
        ("CapPrm:", &kept),
        ("CapBnd:", &kept),
        ("CapInh:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let mode = std::fs::metadata(world.directory.join("0a1b2c3d.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A second process for the same socket does not start.
    let (program, socket) = (env!("CARGO_BIN_EXE_nexus-net"), world.directory.join("0a1b2c3d.sock"));
    let mut second = std::process::Command::new(program);
    second.arg(socket).env("RUST_LOG", "error");
    let second = world.host.run(move || second.output()).unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another nexus-net is already serving"));
    net.state();
}
