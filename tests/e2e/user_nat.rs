//! Machines with a network card under a daemon of an ordinary user: their network is in a namespace of its own, connected by
//! slirp4netns. The user's host is a network namespace of this test, and the internet behind it is another.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::{Daemon, UsersHost, kill_process};
use nexus_tests::netns::{HOST, Internet, PRIVATE, ROUTER, SITE};
use nexus_tests::wait::until;
use serde_json::{Value, json};

use crate::nat::{get, network, run, until_it_comes};

/// An ordinary user.
const USER: u32 = 54_777;
/// The timeout for things that happen by themselves.
const SOON: Duration = Duration::from_secs(30);
/// A second address that the host gets.
const LATER: &str = "198.51.100.77";

/// A daemon of the user on a host of a world, with the world's name server.
fn daemon(world: &Internet) -> Daemon {
    let resolv = format!("nameserver {ROUTER}\nsearch corp.example\n");
    let network = world.host.path();
    Daemon::start_on(
        USER,
        UsersHost {
            files: &[("resolv.conf", &resolv)],
            settings: &[("NEXUS_DRIVER", "qemu")],
            network: Some(&network),
            ..UsersHost::default()
        },
    )
}

fn check(client: &mut Client, name: &str) -> Value {
    let checks = client.must("system_info", json!({}))["doctor"]["checks"].clone();
    let found = checks.as_array().into_iter().flatten().find(|check| check["name"] == name).cloned();
    found.unwrap_or_else(|| panic!("no check {name} in {checks}"))
}

/// The process of a record of nexus-net: `holder` or `uplink`.
fn recorded(daemon: &Daemon, name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(daemon.state().join("network").join(name)).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The process of nexus-net.
fn keeper(client: &mut Client) -> Option<u32> {
    let pid = client.must("network_inspect", json!({}))["nat"]["pid"].as_u64()?;
    u32::try_from(pid).ok()
}

fn namespace(pid: u32, kind: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// The names of the programs that run as the user.
fn programs() -> Vec<String> {
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    let name = |place: &Path| {
        let status = std::fs::read_to_string(place.join("status")).ok()?;
        let is_theirs = status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t")));
        let is_zombie = status.contains("State:\tZ");
        let name = status.lines().next()?.trim_start_matches("Name:").trim().to_owned();
        (is_theirs && !is_zombie).then_some(name)
    };
    all.filter_map(|entry| name(&entry.path())).collect()
}

#[test]
fn machines_of_an_ordinary_user_have_a_network_that_leaves_nothing() {
    let world = Internet::new();
    let mut daemon = daemon(&world);
    let mut client = daemon.client();
    let nat = check(&mut client, "nat");
    assert!(nat["found"].to_string().contains("slirp4netns"), "{nat}");
    assert_eq!(client.must("network_inspect", json!({}))["nat"]["available"], true);

    // --- its address, the gateway, names, the way out; the host's own network has nothing of it
    let web = client.create(json!({ "name": "web", "from": "busybox", "network": "nat" }));
    let interface = &web["network"]["interface"];
    let text = |key: &str| interface[key].as_str().unwrap_or_else(|| panic!("no {key}: {web}")).to_owned();
    let (own, gateway) = (text("ipv4"), text("gateway"));
    assert_eq!(world.host.links(), ["up0"]);
    let (_, addresses, _) = run(&mut client, "web", "ip address show eth0; cat /etc/resolv.conf");
    let resolv = format!("nameserver {gateway}\nsearch nexus.internal corp.example\n");
    for part in [&format!("{own}/32"), &text("mac"), &resolv] {
        assert!(addresses.contains(part), "{part} in {addresses}");
    }
    let (code, _, said) = run(&mut client, "web", &format!("ping -c 1 -W 5 {gateway}"));
    assert_eq!(code, 0, "{said}");
    let (code, page, said) = get(&mut client, "web", "http://site.example/");
    assert_eq!((code, page.as_str()), (0, format!("you are {HOST}\n").as_str()), "{said}");

    // --- its VMM has no part in that network
    let pid =
        |key: &str| web["process"][key].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a pid");
    let inside = keeper(&mut client).expect("nexus-net runs");
    for which in ["pid", "shim_pid"] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid(which))).expect("it runs");
        for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.contains(line), "{which}: {line} is not in {status}");
        }
        for kind in ["net", "user"] {
            assert_eq!(namespace(pid(which), kind), namespace(daemon.pid(), kind), "{which} {kind}");
            assert_ne!(namespace(pid(which), kind), namespace(inside, kind), "{which} {kind}");
        }
    }

    // --- refusals, also of the host's own addresses, which are not in that namespace
    let (code, _, said) = get(&mut client, "web", &format!("http://{PRIVATE}/"));
    let note =
        format!("refused by policy: {PRIVATE}:80 (an address of a private network); ask for vm_update");
    assert!(code != 0 && said.contains(&note), "{said}");
    let (code, _, said) = get(&mut client, "web", &format!("http://{HOST}:22/"));
    assert!(code != 0 && said.contains("(an address of the host)"), "{said}");
    world.host.ip(&format!("address add {LATER}/32 dev lo"));
    let closed = until(SOON, || {
        let (_, _, said) = get(&mut client, "web", &format!("http://{LATER}:22/"));
        said.contains(&format!("{LATER}:22 (an address of the host)")).then_some(())
    });
    assert!(closed.is_some(), "a new address of the host is closed");
    // What slirp4netns answers itself is for nexus-net alone, whatever the policy names.
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["*", "240.0.2.0/24"] } }));
    let (code, _, said) = get(&mut client, "web", "http://240.0.2.3:53/");
    assert!(code != 0 && said.contains("240.0.2.3:53 (an address of the host)"), "{said}");
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": [] } }));
    let counted = network(&mut client, "web");
    assert!(counted["counts"]["denied"].as_u64() >= Some(3), "{counted}");

    // --- another daemon beside it has a network of its own
    let other = self::daemon(&world);
    let mut its_client = other.client();
    its_client.create(json!({ "name": "web", "from": "busybox", "network": "nat" }));
    until_it_comes(&mut its_client, "web", "http://site.example/");
    its_client.must("vm_delete", json!({ "vm": "web", "force": true }));
    assert_eq!(its_client.must("network_cleanup", json!({}))["removed"], true);
    drop(its_client);
    drop(other);
    assert_eq!(get(&mut client, "web", "http://site.example/").0, 0, "the first one goes on");

    // --- the uplink is killed: it is started again
    let uplink = recorded(&daemon, "uplink").expect("slirp4netns is recorded");
    kill_process(uplink);
    let again = until(SOON, || recorded(&daemon, "uplink").filter(|pid| *pid != uplink));
    assert!(again.is_some(), "slirp4netns is started again\n{}", daemon.log());
    until_it_comes(&mut client, "web", "http://site.example/");

    // --- nexus-net is killed: the next one is in the same namespace, with the same uplink
    let before = until(SOON, || keeper(&mut client)).expect("nexus-net runs");
    let (place, uplink) = (namespace(before, "net"), recorded(&daemon, "uplink"));
    kill_process(before);
    let after = until(SOON, || keeper(&mut client).filter(|pid| *pid != before));
    let after = after.unwrap_or_else(|| panic!("nexus-net is started again\n{}", daemon.log()));
    assert_eq!((namespace(after, "net"), recorded(&daemon, "uplink")), (place.clone(), uplink));
    until_it_comes(&mut client, "web", "http://site.example/");

    // --- the holder is killed, and then nexus-net: the namespace is still the same
    let holder = recorded(&daemon, "holder").expect("the holder is recorded");
    kill_process(holder);
    let again = until(SOON, || recorded(&daemon, "holder").filter(|pid| *pid != holder));
    assert!(again.is_some_and(|pid| namespace(pid, "net") == place), "another holder of the same namespace");
    kill_process(after);
    let last = until(SOON, || keeper(&mut client).filter(|pid| *pid != after)).expect("nexus-net runs");
    assert_eq!(namespace(last, "net"), place);
    until_it_comes(&mut client, "web", "http://site.example/");

    // --- the daemon is killed: the network goes on without it
    daemon.kill();
    daemon.restart();
    client = daemon.client();
    client.wait_for_state("web", "ready");
    assert_eq!(get(&mut client, "web", &format!("http://{SITE}/")).0, 0);
    assert_eq!(keeper(&mut client), Some(last));

    // --- another start of the machine, which gets its TAP anew
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "ready");
    assert_eq!(get(&mut client, "web", "http://site.example/").0, 0);

    // --- nothing is left
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], true);
    let left = until(SOON, || programs().iter().all(|name| name == "nexusd").then_some(()));
    assert!(left.is_some(), "{:?}", programs());
    let files = std::fs::read_dir(daemon.state().join("network")).expect("its directory").flatten();
    let mut files: Vec<_> = files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    files.retain(|name| !name.ends_with(".jsonl") && !name.ends_with(".log"));
    files.sort();
    assert_eq!(files, ["net.sock.lock"]);
    assert_eq!(world.host.links(), ["up0"]);
}

#[test]
fn a_host_that_lacks_something_refuses_a_network_before_anything_changes() {
    let world = Internet::new();
    let network = world.host.path();
    let settings = &[("NEXUS_DRIVER", "qemu")];
    let host =
        UsersHost { settings, network: Some(&network), without: &["slirp4netns"], ..Default::default() };
    let daemon = Daemon::start_on(USER + 1, host);
    let mut client = daemon.client();
    let nat = check(&mut client, "nat");
    assert!(nat["found"].to_string().contains("slirp4netns is not installed; network proxy works"), "{nat}");
    assert_eq!(nat["fix"], "apt-get install slirp4netns");
    let asked = json!({ "name": "web", "from": "busybox", "network": "nat", "start": false });
    let refused = client.call("vm_create", asked).expect_err("it cannot have a network card");
    assert_eq!(refused.code, "host_unsuitable");
    assert!(refused.text.contains("slirp4netns is not installed"), "{}", refused.text);
    assert!(refused.text.contains("apt-get install slirp4netns, or use network proxy"), "{}", refused.text);
    let set = client.call("settings_set", json!({ "values": { "default.network": "nat" } }));
    assert!(set.expect_err("it cannot be the default").text.contains("slirp4netns"));
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    assert_eq!(recorded(&daemon, "holder"), None);
    let web =
        client.to_the_end("vm_create", json!({ "name": "web", "from": "busybox", "start": false }), SOON);
    assert_eq!(web["network"]["mode"], "proxy", "{web}");
    let changed = client.call("vm_update", json!({ "vm": "web", "network": "nat" }));
    assert!(changed.expect_err("it cannot have one later").text.contains("slirp4netns"));
    assert_eq!(network_mode(&mut client), "proxy");
}

fn network_mode(client: &mut Client) -> String {
    network(client, "web")["mode"].as_str().unwrap_or_default().to_owned()
}
