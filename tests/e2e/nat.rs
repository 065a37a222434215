//! Machines with a network interface, behind a host that is a network namespace of this test: nexusd, nexus-net and the VMMs
//! run in it. The internet behind it is another namespace.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client, stream};
use nexus_tests::daemon::{Daemon, kill_process};
use nexus_tests::netns::{HOST, Internet, PRIVATE, ROUTER, SITE};
use nexus_tests::saved::{checkpoint, delete_all, roll_back};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// The timeout for things that happen by themselves.
const SOON: Duration = Duration::from_secs(30);

/// Runs a line in a machine; returns its exit code, stdout, and the whole result.
pub(crate) fn run(client: &mut Client, vm: &str, line: &str) -> (i64, String, String) {
    let result =
        client.call_whole("guest_run_command", json!({ "vm": vm, "command": line })).expect("it runs");
    let blocks = result["content"].as_array().expect("a result has content").iter();
    let said = blocks.map(|block| block["text"].as_str().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let code = result["_meta"]["dev.nexus/result"]["exit_code"].as_i64().unwrap_or(-1);
    (code, stream(&result, "stdout"), said)
}

pub(crate) fn get(client: &mut Client, vm: &str, url: &str) -> (i64, String, String) {
    // Of BusyBox: some of its other options crash in static builds.
    run(client, vm, &format!("wget -O - {url} 2>/dev/null"))
}

/// Waits until a page is served.
pub(crate) fn until_it_comes(client: &mut Client, vm: &str, url: &str) {
    let came = until(SOON, || (get(client, vm, url).0 == 0).then_some(()));
    assert!(came.is_some(), "{url} never comes: {}", get(client, vm, url).2);
}

pub(crate) fn network(client: &mut Client, vm: &str) -> Value {
    client.inspect(vm)["network"].clone()
}

/// The devices of VMs on the host, by their names in the VMs' details.
fn taps(world: &Internet) -> usize {
    let own = world.host.links();
    // The bridge and the host's own uplink exist as well.
    own.iter().filter(|name| *name != "up0").count().saturating_sub(1)
}

#[test]
fn a_machine_has_a_network_of_its_own_within_its_policy_and_leaves_nothing() {
    let world = Internet::new();
    let mut daemon = Daemon::start_in_namespace(&world.host.path());
    let mut client = daemon.client();
    let settings = json!({ "network.dns": ROUTER.to_string(), "network.search": "lab.example" });
    client.must("settings_set", json!({ "values": settings }));

    // --- one machine: its address, names, the way out
    let web = client.create(json!({ "name": "web", "from": "busybox", "network": "nat" }));
    let interface = web["network"]["interface"].clone();
    let text = |key: &str| interface[key].as_str().unwrap_or_else(|| panic!("no {key}: {web}")).to_owned();
    let (own, gateway, tap) = (text("ipv4"), text("gateway"), text("tap"));
    assert!(world.host.links().contains(&tap), "{tap} is none of {:?}", world.host.links());
    assert_eq!(web["guest"]["problems"], Value::Null, "{web}");
    let walls = client.inspect("web")["process"]["walls"].clone();
    assert!(
        walls["own_root"] == true && walls["capabilities"] == false && walls["seccomp"] == true,
        "{walls}"
    );
    assert!(walls["namespaces"].to_string().contains("net"), "the VMM is in a network of its own: {walls}");

    let (_, addresses, _) = run(&mut client, "web", "ip address show eth0; cat /etc/resolv.conf; hostname");
    for part in [
        &format!("{own}/32"),
        &format!("{}/128", text("ipv6")),
        &text("mac"),
        &format!("nameserver {gateway}\nsearch nexus.internal lab.example\n"),
        "web",
    ] {
        assert!(addresses.contains(part), "{part} in {addresses}");
    }
    let (code, _, said) =
        run(&mut client, "web", &format!("ping -c 1 -W 5 {gateway} && ping -c 1 -W 5 {SITE}"));
    assert_eq!(code, 0, "{said}");
    let (code, page, said) = get(&mut client, "web", "http://site.example/");
    assert_eq!((code, page.as_str()), (0, format!("you are {HOST}\n").as_str()), "{said}");

    // --- a refusal is answered, and the result says why
    let begun = Instant::now();
    let (code, _, said) = get(&mut client, "web", &format!("http://{PRIVATE}/"));
    assert!(code != 0 && begun.elapsed() < Duration::from_secs(4), "after {:?}: {said}", begun.elapsed());
    let note = format!(
        "refused by policy: {PRIVATE}:80 (an address of a private network); ask for vm_update network.allow="
    );
    assert!(said.contains(&note), "{said}");
    let (code, _, said) = get(&mut client, "web", &format!("http://{HOST}:22/"));
    assert!(code != 0 && said.contains("(an address of the host)"), "{said}");
    let (_, _, said) = run(&mut client, "web", "false");
    assert!(!said.contains("refused"), "a later command met none: {said}");
    let counted = network(&mut client, "web");
    assert!(
        counted["counts"]["denied"].as_u64() >= Some(2) && counted["counts"]["sent_bytes"].as_u64() > Some(0),
        "{counted}"
    );
    assert_eq!(counted["denied"][0]["reason"], "host", "{counted}");
    let logged = until(SOON, || {
        let log = client.must("network_log", json!({ "vm": "web", "limit": 1 }));
        (log["connections"][0]["reason"] == "host").then_some(())
    });
    assert!(logged.is_some(), "{}", client.must("network_log", json!({ "vm": "web" })));

    // --- the host's firewall drops its packets, and is opened
    assert!(counted["counts"]["received_packets"].as_u64() > Some(0), "{counted}");
    world.host.nft("add table inet mine");
    world.host.nft("add chain inet mine forward { type filter hook forward priority 0 ; policy drop ; }");
    let warned = until(SOON, || {
        let nat = client.must("network_inspect", json!({}))["nat"].clone();
        nat["warnings"].to_string().contains("chain forward of table inet mine").then_some(nat)
    });
    let bridge = warned.expect("network_inspect warns")["bridge"].clone();
    let doctor = client.must("system_info", json!({}))["doctor"]["checks"].to_string();
    assert!(doctor.contains("inet mine forward") && doctor.contains("setup-firewall"), "{doctor}");
    let planned = client.must("network_firewall", json!({ "dry_run": true }));
    assert!(planned["enabled"] == false && planned["chains"][0]["open"] == false, "{planned}");
    let opened = client.must("network_firewall", json!({}));
    assert!(opened["enabled"] == true && opened["chains"][0]["open"] == true, "{opened}");
    assert_eq!(opened["bridge"], bridge);
    assert_eq!(get(&mut client, "web", "http://site.example/").0, 0);
    let closed = client.must("network_firewall", json!({ "undo": true }));
    assert!(closed["enabled"] == false && closed["chains"][0]["open"] == false, "{closed}");
    world.host.nft("delete table inet mine");

    // --- changes take effect at once
    let limited = json!({ "vm": "web", "network": { "bandwidth": { "rx": "1MiB" } } });
    assert_eq!(client.must("vm_update", limited)["network"]["bandwidth"]["rx"], "1MiB");
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["other.example"] } }));
    let (code, _, said) = get(&mut client, "web", "http://site.example/");
    assert!(code != 0 && said.contains("site.example (name not allowed)"), "{said}");
    let (code, _, said) = get(&mut client, "web", "http://other.example/");
    assert_eq!(code, 0, "{said}");
    // The preset of package registries is a list of names, too: here the setting has one.
    client.must("settings_set", json!({ "values": { "network.packages": "site.example" } }));
    let packages = json!({ "vm": "web", "network": { "preset": "packages", "allow": [] } });
    assert!(client.must("vm_update", packages)["network"]["packages"].to_string().contains("site.example"));
    let (code, _, said) = get(&mut client, "web", "http://other.example/");
    assert!(code != 0 && said.contains("other.example (name not allowed)"), "{said}");
    assert!(said.contains("allow=[\"*\",\"other.example"), "{said}");
    let (code, _, said) = get(&mut client, "web", "http://site.example/");
    assert_eq!(code, 0, "{said}");
    client.must("vm_update", json!({ "vm": "web", "network": "internet" }));
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["*", PRIVATE.to_string()] } }));
    assert_eq!(get(&mut client, "web", &format!("http://{PRIVATE}/")).0, 0, "the hint helps");
    client.must("vm_update", json!({ "vm": "web", "network": "none" }));
    let (code, _, said) = get(&mut client, "web", &format!("http://{SITE}/"));
    assert!(code != 0, "{said}");
    let again = client.must("vm_update", json!({ "vm": "web", "network": "nat" }));
    assert_eq!(again["network"]["until_next_start"], Value::Null, "it has its interface still: {again}");
    until_it_comes(&mut client, "web", "http://site.example/");

    // --- another machine, which gets its interface at its next start
    client.create(json!({ "name": "db", "from": "busybox", "network": "proxy" }));
    let changed = client.must("vm_update", json!({ "vm": "db", "network": "nat" }));
    assert_eq!(changed["network"]["until_next_start"], "proxy", "{changed}");
    assert!(changed["network_note"].as_str().is_some_and(|note| note.contains("next start")), "{changed}");
    client.must("vm_stop", json!({ "vm": "db", "wait_s": 45 }));
    client.must("vm_start", json!({ "vm": "db", "wait_s": 45 }));
    let db = client.wait_for_state("db", "ready");
    assert_eq!(db["network"]["until_next_start"], Value::Null, "{db}");
    let other = db["network"]["interface"]["ipv4"].as_str().expect("it has an address").to_owned();
    assert!(other != own && taps(&world) == 2, "{other} {own} {:?}", world.host.links());
    run(&mut client, "db", "mkdir -p /srv && echo rows > /srv/index.html && httpd -p 80 -h /srv");
    let (code, _, said) = get(&mut client, "web", &format!("http://{other}/"));
    assert!(code != 0 && said.contains("(another VM without a common group)"), "{said}");
    for vm in ["web", "db"] {
        client.must("vm_update", json!({ "vm": vm, "network": { "groups": ["app"] } }));
    }
    let (code, page, said) = get(&mut client, "web", "http://db.nexus.internal/");
    assert_eq!((code, page.as_str()), (0, "rows\n"), "{said}");

    // --- the network outlives the daemon, and its process is started again
    let pid = |client: &mut Client| client.must("network_inspect", json!({}))["nat"]["pid"].as_u64();
    let before = pid(&mut client).expect("nexus-net runs");
    daemon.kill();
    daemon.restart();
    client = daemon.client();
    client.wait_for_state("web", "ready");
    assert_eq!(get(&mut client, "web", "http://site.example/").0, 0);
    assert_eq!(pid(&mut client), Some(before));
    kill_process(u32::try_from(before).expect("a process id"));
    let after = until(SOON, || pid(&mut client).filter(|pid| *pid != before));
    assert!(after.is_some(), "nexus-net is started again\n{}", daemon.log());
    until_it_comes(&mut client, "web", "http://site.example/");

    // --- nothing is left
    client.must("vm_stop", json!({ "vm": "db", "wait_s": 45 }));
    assert_eq!(taps(&world), 1, "{:?}", world.host.links());
    let refused = client.call("network_cleanup", json!({})).expect_err("web runs with it");
    assert!(refused.code == "in_use" && refused.text.contains("web"), "{}", refused.text);
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    assert_eq!(taps(&world), 0, "{:?}", world.host.links());
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], true);
    assert_eq!(world.host.links(), ["up0"]);
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], false);
}

#[test]
fn what_a_daemon_leaves_that_is_killed_while_it_connects_a_machine_is_removed() {
    let world = Internet::new();
    let mut daemon = Daemon::start_in_namespace(&world.host.path());
    let mut client = daemon.client();
    let made = json!({ "name": "web", "from": "busybox", "network": "nat", "start": false });
    let address = client.to_the_end("vm_create", made, SOON)["network"]["interface"]["ipv4"].clone();
    daemon.kill();
    daemon.set("NEXUS_FAILPOINT", Some("start-connected"));
    daemon.restart();
    // The daemon ends before it answers.
    let mut starting = daemon.client();
    let call = json!({ "name": "vm_start", "arguments": { "vm": "web", "wait_s": 45 } });
    starting.request("tools/call", &call).expect_err("the daemon is killed meanwhile");
    daemon.wait_until_ended();
    assert_eq!(taps(&world), 1, "it had got so far: {:?}", world.host.links());

    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    client = daemon.client();
    let web = client.wait_for_state("web", "failed");
    assert_eq!(taps(&world), 0, "{:?}", world.host.links());
    let interface = &web["network"]["interface"];
    assert_eq!(
        (&interface["ipv4"], &interface["tap"]),
        (&address, &Value::Null),
        "its addresses stay its own"
    );

    // --- the same after the shim was killed, and after a stop that the daemon does not see the end of
    let none_is_left = |what: &str| {
        let gone = until(SOON, || (taps(&world) == 0).then_some(()));
        assert!(gone.is_some(), "{what}: {:?}", world.host.links());
    };
    let kill_shim = |client: &mut Client| {
        let shim = until(SOON, || client.inspect("web")["process"]["shim_pid"].as_u64());
        kill_process(shim.and_then(|pid| u32::try_from(pid).ok()).expect("a shim"));
        client.wait_for("web", "its end", |vm| vm["state"] == "crashed" || vm["state"] == "failed");
    };
    client.must("vm_start", json!({ "vm": "web", "wait_s": 0 }));
    kill_shim(&mut client);
    none_is_left("its shim is killed while it boots");
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    assert_eq!(taps(&world), 1, "{:?}", world.host.links());
    kill_shim(&mut client);
    none_is_left("its shim is killed");
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    client = daemon.kill_at("stop-asked", |client| {
        client.request("tools/call", &json!({ "name": "vm_stop", "arguments": { "vm": "web" } })).ok();
    });
    client.wait_for_state("web", "stopped");
    none_is_left("the daemon is killed within a stop");
    client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
    client = daemon.kill_at("net-detached", |client| {
        client.request("tools/call", &json!({ "name": "vm_stop", "arguments": { "vm": "web" } })).ok();
    });
    let web = client.wait_for_state("web", "stopped");
    assert_eq!(web["network"]["interface"]["tap"], Value::Null, "{web}");
    none_is_left("the daemon is killed before it records that the interface is gone");
    // No row knows of the interface, and no process does.
    let keeper = client.must("network_inspect", json!({}))["nat"]["pid"].as_u64();
    daemon.kill();
    daemon.set("NEXUS_FAILPOINT", Some("net-attached"));
    daemon.restart();
    daemon.client().request("tools/call", &call).expect_err("the daemon is killed meanwhile");
    daemon.wait_until_ended();
    assert_eq!(taps(&world), 1, "it had got so far: {:?}", world.host.links());
    kill_process(keeper.and_then(|pid| u32::try_from(pid).ok()).expect("nexus-net runs"));
    daemon.set("NEXUS_FAILPOINT", None);
    daemon.restart();
    client = daemon.client();
    client.wait_for_state("web", "failed");
    none_is_left("daemon and nexus-net are killed before a row knows of the interface");
    client.must("vm_delete", json!({ "vm": "web" }));
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], true);
    assert_eq!(world.host.links(), ["up0"]);

    // --- all addresses of a small subnet are in use: the next machine is refused, and a deletion makes room
    client.must("settings_set", json!({ "values": { "network.subnet": "10.99.88.0/29" } }));
    let machine = |name: &str| json!({ "name": name, "from": "busybox", "network": "nat", "start": false });
    for number in 2..7 {
        let made = client.to_the_end("vm_create", machine(&format!("vm-{number}")), SOON);
        assert_eq!(made["network"]["interface"]["ipv4"], format!("10.99.88.{number}"), "{made}");
    }
    let refused = client.call("vm_create", machine("one-more")).expect_err("no address is left");
    assert_eq!(refused.code, "busy", "{}", refused.text);
    assert!(refused.text.contains("network.subnet to a larger one"), "{}", refused.text);
    assert_eq!(
        client.call("vm_inspect", json!({ "vm": "one-more" })).expect_err("it is not made").code,
        "vm_not_found"
    );
    client.must("vm_delete", json!({ "vm": "vm-4" }));
    let made = client.to_the_end("vm_create", machine("one-more"), SOON);
    assert_eq!(made["network"]["interface"]["ipv4"], "10.99.88.4", "{made}");
}

/// Checks that a machine has the addresses that the host knows of it, and no others; returns them.
#[track_caller]
fn own_addresses(client: &mut Client, vm: &str) -> [String; 3] {
    let interface = network(client, vm)["interface"].clone();
    let own = ["mac", "ipv4", "ipv6"].map(|key| interface[key].as_str().unwrap_or_default().to_owned());
    let (_, shown, _) = run(client, vm, "ip address show eth0");
    let [mac, ipv4, ipv6] = &own;
    for part in [mac.clone(), format!("{ipv4}/32"), format!("{ipv6}/128")] {
        assert!(shown.contains(&part), "{vm} has not {part}: {shown}");
    }
    assert_eq!(shown.matches("inet ").count(), 1, "{vm} has addresses of another: {shown}");
    own
}

#[test]
fn machines_that_go_on_from_one_moment_have_addresses_of_their_own() {
    const PAGE: &str = "http://site.example/";
    let world = Internet::new();
    let daemon = Daemon::start_in_namespace(&world.host.path());
    let mut client = daemon.client();
    client.must("settings_set", json!({ "values": { "network.dns": ROUTER.to_string() } }));
    client.create(json!({
        "name": "base", "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "192MiB",
        "network": "nat", "wait_s": 45
    }));
    until_it_comes(&mut client, "base", PAGE);
    let before = own_addresses(&mut client, "base");
    checkpoint(&mut client, "base", "ready");
    let fork = json!({ "checkpoint": "ready", "names": ["one", "two"], "wait_s": 45 });
    client.to_the_end("vm_fork", fork, BOOT);
    let mut seen = BTreeSet::new();
    for vm in ["base", "one", "two"] {
        seen.extend(own_addresses(&mut client, vm));
        until_it_comes(&mut client, vm, PAGE);
    }
    assert_eq!(seen.len(), 9, "each has three of its own: {seen:?}");
    assert_eq!(taps(&world), 3, "{:?}", world.host.links());

    // One that goes back keeps them, and so does one that sleeps, though its interface is gone meanwhile.
    roll_back(&mut client, "base", "ready");
    assert_eq!(own_addresses(&mut client, "base"), before);
    until_it_comes(&mut client, "base", PAGE);
    let slept = client.must("vm_pause", json!({ "vm": "base", "suspend": true }));
    assert_eq!(slept["state"], "suspended", "{slept}");
    let gone = until(SOON, || (taps(&world) == 2).then_some(()));
    assert!(gone.is_some(), "{:?}", world.host.links());
    until_it_comes(&mut client, "base", PAGE);
    assert_eq!(own_addresses(&mut client, "base"), before);
    for vm in ["base", "one", "two"] {
        client.must_confirmed("vm_delete", json!({ "vm": vm, "force": true }));
    }
    assert_eq!(taps(&world), 0, "{:?}", world.host.links());
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], true);
    delete_all(&daemon, &mut client);
}
