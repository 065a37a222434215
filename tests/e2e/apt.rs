//! A package of the host's own archive is installed in a machine by its apt: through the proxy, and through a network card.
//!
//! The daemon is moved to a host that is a network namespace of the test; the internet behind it serves what this host's apt uses.

use std::net::TcpListener;

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::Daemon;
use nexus_tests::mirror::Archive;
use nexus_tests::netns::{Internet, SITE};
use serde_json::{Value, json};

/// The port of the archive.
const PORT: u16 = 8080;
/// apt, as quiet and as thrifty as it can be. Each answer of the archive closes its connection.
const APT: &str = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Languages=none \
    -o Acquire::http::Pipeline-Depth=0 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0";

/// Runs a line in a machine, which must succeed; returns its stdout.
#[track_caller]
fn must(client: &mut Client, vm: &str, line: &str) -> String {
    let ran = client.run(vm, line);
    assert_eq!(ran.exit_code, Some(0), "{line}: {ran:?}");
    ran.stdout
}

/// Changes the network of a machine that is stopped, and starts it; returns its network.
fn start_with(client: &mut Client, vm: &str, network: &str) -> Value {
    client.must("vm_update", json!({ "vm": vm, "network": network }));
    client.to_the_end("vm_start", json!({ "vm": vm }), BOOT);
    let network = client.wait_for_state(vm, "ready")["network"].take();
    assert_eq!(network["until_next_start"], Value::Null, "{network}");
    network
}

/// Has a running Debian install a package in both ways. It is stopped in the end.
pub(crate) fn installs_through_proxy_and_nat(daemon: &mut Daemon, vm: &str) {
    let world = Internet::new();
    let listener = world.outside.within(|| TcpListener::bind((SITE, PORT)).expect("the port is free"));
    let archive = Archive::serve(listener);
    let packages = || archive.asked().iter().filter(|asked| asked.path.contains("/hello_")).count();
    let stop = json!({ "vm": vm, "wait_s": 45 });

    daemon.client().must("vm_stop", stop.clone());
    daemon.stop();
    daemon.move_to(&world.host.path());
    daemon.restart();
    let mut client = daemon.client();

    let network = start_with(&mut client, vm, "proxy");
    assert_eq!(network["interface"], Value::Null, "{network}");
    let sources = format!(
        "rm -f /etc/apt/sources.list.d/*; grep -m 1 '^deb ' /etc/apt/sources.list | \
         sed -E 's,(https?)://,http://{SITE}:{PORT}/\\1/,' > /root/sources && mv /root/sources /etc/apt/sources.list"
    );
    must(&mut client, vm, &sources);
    must(&mut client, vm, &format!("{APT} update"));
    assert_eq!(packages(), 0);
    must(&mut client, vm, &format!("{APT} install hello"));
    assert_eq!(must(&mut client, vm, "hello"), "Hello, world!\n");
    let before = packages();
    assert!(before > 0, "{:?}", archive.asked());
    let counts = client.inspect(vm)["network"]["counts"].take();
    assert!(counts["allowed"].as_u64() >= Some(2), "all of it came through the proxy: {counts}");

    client.must("vm_stop", stop.clone());
    let network = start_with(&mut client, vm, "nat");
    assert!(network["interface"]["tap"].is_string(), "{network}");
    assert_eq!(must(&mut client, vm, "env | grep -ci _proxy= || true"), "0\n");
    must(&mut client, vm, &format!("apt-get clean && {APT} --reinstall install hello"));
    assert_eq!(must(&mut client, vm, "hello"), "Hello, world!\n");
    assert!(packages() > before, "it came anew: {:?}", archive.asked());

    client.must("vm_stop", stop);
    assert_eq!(client.must("network_cleanup", json!({}))["removed"], true);
    assert_eq!(world.host.links(), ["up0"]);
}
