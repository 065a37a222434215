//! `nexus-net` of an ordinary user, in a network namespace of its own: what a host must have for it, and what is left by which kill.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use nexus_net_wire::{Check, Lack, Request, hand};

use crate::world::{Net, PATIENCE, World, instance, vm};

const USER: &str = "54321";
const PROGRAM: &str = env!("CARGO_BIN_EXE_nexus-net");

/// Arranges the host in a mount namespace: `$1` is the mode of `/dev/net/tun`, `$2` a shell command. The rest is executed as the user.
const SCRIPT: &str = r#"
set -e
mode=$1 more=$2 user=$3
shift 3
mount -t tmpfs -o mode=0755 none /dev/net
[ "$mode" = none ] || mknod -m "$mode" /dev/net/tun c 10 200
eval "$more"
exec setpriv --reuid "$user" --regid "$user" --clear-groups "$@"
"#;

fn wrapped<'a>(mode: &'a str, more: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    let wrapper =
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh", mode, more, USER];
    wrapper.into_iter().chain(rest.iter().copied()).collect()
}

/// A copy of the program that the user can execute.
fn copy(world: &World) -> PathBuf {
    let path = world.directory.join("nexus-net");
    // Processes of an earlier start may still execute it.
    if !path.exists() {
        std::fs::copy(PROGRAM, &path).unwrap();
    }
    std::os::unix::fs::chown(&world.directory, USER.parse().ok(), USER.parse().ok()).unwrap();
    path
}

#[track_caller]
fn check(world: &World, mode: &str, more: &str, before: &[&str]) -> Check {
    let program = copy(world);
    let rest: Vec<&str> = before.iter().copied().chain([program.to_str().unwrap(), "--check"]).collect();
    let command = wrapped(mode, more, &rest);
    let (name, arguments) = (command[0].to_owned(), command[1..].iter().map(|word| (*word).to_owned()));
    let arguments: Vec<String> = arguments.collect();
    let output = world.host.run(move || Command::new(name).args(arguments).output().unwrap());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Check::find(&text).unwrap_or_else(|| panic!("no result in {text}{said}"))
}

fn lack(check: Check) -> Lack {
    match check {
        Check::Unusable(lack) => lack,
        usable @ Check::Usable { .. } => panic!("{usable:?}"),
    }
}

#[test]
fn the_check_says_what_a_host_lacks() {
    let world = World::new();
    // A new network namespace lets nobody send pings.
    let usable = check(&world, "0666", "", &[]);
    let Check::Usable { found, lack: Some(ping) } = usable else { panic!("{usable:?}") };
    assert!(found.contains("slirp4netns"), "{found}");
    assert!(ping.fix.contains("net.ipv4.ping_group_range"), "{ping:?}");
    world.host.write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let usable = check(&world, "0666", "", &[]);
    assert!(matches!(usable, Check::Usable { lack: None, .. }), "{usable:?}");
    assert_eq!(world.host.ip("-o link").lines().count(), 2, "lo and up0: the host's network is unchanged");

    let closed = lack(check(&world, "0600", "", &[]));
    assert!(closed.why.contains("/dev/net/tun: Permission denied"), "{closed:?}");
    assert_eq!(closed.fix, "as root: chmod 0666 /dev/net/tun");
    let missing = lack(check(&world, "none", "", &[]));
    assert!(
        missing.why.contains("/dev/net/tun: No such file") && missing.fix.contains("modprobe tun"),
        "{missing:?}"
    );
    let hide = "mount --bind /dev/null \"$(command -v slirp4netns)\"";
    let hidden = lack(check(&world, "0666", hide, &[]));
    assert_eq!(
        (hidden.why.as_str(), hidden.fix.as_str()),
        ("slirp4netns is not installed", "apt-get install slirp4netns")
    );
    let broken =
        "cp /bin/false /dev/net/slirp4netns; mount --bind /dev/net/slirp4netns \"$(command -v slirp4netns)\"";
    let broken = lack(check(&world, "0666", broken, &[]));
    assert!(broken.why.starts_with("slirp4netns ended during its start"), "{broken:?}");

    // A host that allows no user namespaces: the limit is one of a namespace around it.
    let forbid = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let forbidden =
        lack(check(&world, "0666", "", &["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"]));
    assert!(forbidden.why.contains("does not let its users make network namespaces"), "{forbidden:?}");
    assert_eq!(forbidden.fix, "as root: sysctl -w user.max_user_namespaces=15000");

    // One that forbids them by AppArmor: only the settings can be read there.
    let forbid = "echo 0 > /proc/sys/user/max_user_namespaces && mount -t tmpfs none /proc/sys/user && \
                  mount -t tmpfs none /proc/sys/kernel && echo 1 > /proc/sys/kernel/apparmor_restrict_unprivileged_userns && exec \"$@\"";
    let around = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", forbid, "sh"];
    let forbidden = lack(check(&world, "0666", "", &around));
    assert!(forbidden.why.contains("does not let its users make network namespaces"), "{forbidden:?}");
    assert!(forbidden.fix.contains("kernel.apparmor_restrict_unprivileged_userns=0"), "{forbidden:?}");
}

/// Starts one of the user, and configures it.
fn start(world: &World, point: Option<&str>) -> Net {
    let program = copy(world);
    let setting = point.map(|point| format!("NEXUS_NET_FAILPOINT={point}"));
    let mut rest: Vec<&str> = setting.as_deref().map(|setting| vec!["env", setting]).unwrap_or_default();
    rest.extend([program.to_str().unwrap(), "--own"]);
    world.start_by(&wrapped("0666", "", &rest), instance("0a1b2c3d", "10.77"))
}

/// Ends what is recorded when a test ends, also one that fails.
struct Guard<'a>(&'a World);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        for pid in ["uplink", "holder"].iter().filter_map(|name| recorded(self.0, name)) {
            kill(pid);
        }
    }
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    // It may have ended already.
    let _sent = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// The process of a record.
fn recorded(world: &World, name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(world.directory.join(name)).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

fn is_running(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

#[track_caller]
fn until(mut is_it: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !is_it() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    }
}

#[test]
fn taps_are_handed_over_to_one_process_at_a_time() {
    let world = World::new();
    let _guard = Guard(&world);
    let mut net = start(&world, None);
    net.configure();
    let one = nexus_net_wire::Vm { owner_uid: 0, ..vm(&net.instance, 2) };
    let tap = net.attach(&one).tap;
    let take = |name: &str| {
        let stream = UnixStream::connect(world.directory.join(hand::SOCKET)).unwrap();
        hand::take(&stream, name)
    };
    for other in ["slirp0", "lo", "nx7"] {
        assert!(take(other).unwrap_err().to_string().contains("not the TAP of a VM"), "{other}");
    }
    let device = take(&tap).unwrap();
    assert!(take(&tap).unwrap_err().to_string().contains("busy"), "{:?}", take(&tap));
    drop(device);
    drop(take(&tap).unwrap());
    assert!(!world.host.ip("-o link").contains(&tap), "it is not in the host's network namespace");
    net.ask(Request::Cleanup { instance: None });
    net.child.wait().unwrap();
    assert_eq!((recorded(&world, "holder"), recorded(&world, "uplink")), (None, None));
}

/// Connects to a socket, says something and prints the answer; in Python, as the child of a process with this name.
const CALLER: &str = r#"
printf "$1" >/proc/$$/comm
python3 -c 'import socket, sys
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(10)
try:
    caller.connect(sys.argv[1])
    caller.sendall(b"nothing\n")
    print(caller.recv(100))
except (BrokenPipeError, ConnectionResetError):
    print(b"")' "$2"
:
"#;

#[test]
fn vmms_of_the_same_user_govern_no_network_and_get_no_tap() {
    let world = World::new();
    let _guard = Guard(&world);
    let mut net = start(&world, None);
    net.configure();
    let call = |parent: &str, socket: PathBuf| {
        let socket = socket.to_str().unwrap();
        let output = Command::new("sh").args(["-c", CALLER, "sh", parent, socket]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    for name in [hand::SOCKET, "0a1b2c3d.sock"] {
        let socket = world.directory.join(name);
        assert!(call("other", socket.clone()).len() > 10, "{name}: others are answered");
        assert_eq!(call("nexus-shim", socket), "b''", "{name}");
    }
    net.ask(Request::Cleanup { instance: None });
    net.child.wait().unwrap();
}

#[test]
fn what_is_left_by_a_kill_at_each_step_is_used_or_ended() {
    let world = World::new();
    let _guard = Guard(&world);
    for point in [
        "holder-started",
        "uplink-started",
        "entered",
        "bridge-made",
        "tables-made",
        "address-added",
        "tap-made",
        "tap-named",
        "tap-kept",
        "tap-joined",
        "tap-raised",
    ] {
        let program = copy(&world);
        let setting = format!("NEXUS_NET_FAILPOINT={point}");
        let socket = world.directory.join("0a1b2c3d.sock");
        let is_early = ["holder-started", "uplink-started", "entered"].contains(&point);
        if is_early {
            let rest = ["env", &setting, program.to_str().unwrap(), "--own", socket.to_str().unwrap()];
            let command: Vec<String> = wrapped("0666", "", &rest).into_iter().map(str::to_owned).collect();
            let status =
                world.host.run(move || Command::new(&command[0]).args(&command[1..]).status().unwrap());
            assert!(!status.success(), "{point}");
        } else {
            let mut net = start(&world, Some(point));
            let configured = net.call(Request::Configure { instance: net.instance.clone() });
            if configured.is_ok() {
                let vm = nexus_net_wire::Vm { owner_uid: 0, ..vm(&net.instance, 2) };
                net.call(Request::Attach { vm }).expect_err(point);
            }
            net.child.wait().unwrap();
        }
        let holder = recorded(&world, "holder").unwrap_or_else(|| panic!("{point}: no holder"));
        let uplink = recorded(&world, "uplink");
        assert!(is_running(holder), "{point}");
        let mut net = start(&world, None);
        net.configure();
        net.attach(&nexus_net_wire::Vm { owner_uid: 0, ..vm(&net.instance, 2) });
        assert_eq!(recorded(&world, "holder"), Some(holder), "{point}: the same namespace");
        assert!(uplink.is_none() || recorded(&world, "uplink") == uplink, "{point}");
        let uplink = recorded(&world, "uplink").unwrap();
        net.ask(Request::Cleanup { instance: None });
        net.child.wait().unwrap();
        assert!(!is_running(holder) && !is_running(uplink), "{point}");
    }
}

#[test]
fn a_removal_that_is_cut_off_is_finished() {
    let world = World::new();
    let _guard = Guard(&world);
    for (point, request) in [
        ("tap-removed", Request::Detach { id: vm(&instance("0a1b2c3d", "10.77"), 2).id }),
        ("tap-removed", Request::Retain { ids: Vec::new() }),
        ("links-removed", Request::Cleanup { instance: None }),
    ] {
        let mut net = start(&world, Some(point));
        net.configure();
        for number in [2, 3] {
            let vm = nexus_net_wire::Vm { owner_uid: 0, ..vm(&net.instance, number) };
            net.attach(&vm);
        }
        net.call(request).expect_err(point);
        assert!(!net.child.wait().unwrap().success(), "{point}: it is killed there");
        let (holder, uplink) = (recorded(&world, "holder").unwrap(), recorded(&world, "uplink").unwrap());
        let mut net = start(&world, None);
        if point == "tap-removed" {
            net.configure();
            assert_eq!(recorded(&world, "holder"), Some(holder), "{point}: the same namespace");
            net.ask(Request::Retain { ids: Vec::new() });
            assert_eq!(net.state().vms.len(), 0);
        }
        net.ask(Request::Cleanup { instance: Some(net.instance.id) });
        net.child.wait().unwrap();
        assert!(!is_running(holder) && !is_running(uplink), "{point}");
    }
}

#[test]
fn a_lost_namespace_is_made_anew_with_an_uplink_of_its_own() {
    let world = World::new();
    let _guard = Guard(&world);
    let mut net = start(&world, None);
    net.configure();
    let (holder, uplink) = (recorded(&world, "holder").unwrap(), recorded(&world, "uplink").unwrap());
    net.child.kill().unwrap();
    net.child.wait().unwrap();
    kill(holder);
    until(|| !is_running(holder), "a killed process ends");
    drop(net);
    let mut net = start(&world, None);
    net.configure();
    until(|| !is_running(uplink), "the uplink of the lost namespace is ended");
    let (new_holder, new_uplink) = (recorded(&world, "holder").unwrap(), recorded(&world, "uplink").unwrap());
    assert!(new_holder != holder && new_uplink != uplink);
    net.ask(Request::Cleanup { instance: None });
    net.child.wait().unwrap();
}
