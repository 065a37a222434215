//! Boots of a VM on a host that stops its VMM again and again, as a crowded host does. Run by `make e2e-boots`.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::{Daemon, signal};
use rustix::process::Signal;
use serde_json::json;

const BOOTS: usize = 50;
/// How long the VMM is stopped, and how long it then runs.
const STOPPED: Duration = Duration::from_millis(200);
const RUNNING: Duration = Duration::from_millis(300);
/// More than a boot and a second one after a lost timer take.
const LONGEST: Duration = Duration::from_secs(150);

#[test]
fn every_boot_with_stops_comes_up() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.create(json!({ "name": "stopped", "from": "busybox" }));
    let mut slowest = Duration::ZERO;
    for boot in 1..=BOOTS {
        client.to_the_end("vm_stop", json!({ "vm": "stopped", "force": true }), LONGEST);
        let begin = Instant::now();
        client.call_whole("vm_start", json!({ "vm": "stopped", "wait_s": 0 })).expect("a boot begins");
        while !is_ready(&mut client) {
            assert!(
                begin.elapsed() < LONGEST,
                "boot {boot}: {}",
                client.must("vm_history", json!({ "vm": "stopped" }))
            );
            stop_for_a_moment(&mut client);
        }
        slowest = slowest.max(begin.elapsed());
    }
    let history = client.must("vm_history", json!({ "vm": "stopped", "limit": 500 })).to_string();
    let again = history.matches("lost its timer").count();
    println!(
        "{BOOTS} boots with stops of {STOPPED:?} came up; {again} lost their timer and were started again; slowest {slowest:?}"
    );
}

fn is_ready(client: &mut Client) -> bool {
    let vm = client.must("vm_inspect", json!({ "vm": "stopped" }));
    assert!(vm["state"] != "failed" && vm["state"] != "crashed", "{vm}");
    vm["state"] == "ready"
}

/// Stops the VMM, if there is one, and lets it go on.
#[expect(clippy::disallowed_methods, reason = "the pauses are what is tested")]
fn stop_for_a_moment(client: &mut Client) {
    let vm = client.must("vm_inspect", json!({ "vm": "stopped" }));
    if let Some(pid) = vm["process"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()) {
        signal(pid, Signal::STOP);
        sleep(STOPPED);
        signal(pid, Signal::CONT);
    }
    sleep(RUNNING);
}
