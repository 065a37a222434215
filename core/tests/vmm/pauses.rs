//! Pauses, with a script in place of a VMM: those that last, and those that end by themselves.

use std::time::Duration;

use nexus_core::internals::ShimClient;

use crate::support::{Vm, ended, eventually, in_time};

fn forever() -> Vm {
    Vm::script("echo up; : > v.sock; exec sleep 1000")
}

/// Whether a process is stopped.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

/// Whether the VMM is stopped, or soon is.
async fn until(shim: &ShimClient, stopped: bool) {
    let vmm = shim.vmm().unwrap().pid;
    eventually("the VMM is stopped or goes on", || (is_stopped(vmm) == stopped).then_some(())).await;
}

#[tokio::test]
async fn a_pause_lasts_until_it_is_resumed_whatever_becomes_of_the_daemon() {
    let vm = forever();
    let shim = vm.launch().await;
    for _ in 0..50 {
        in_time(shim.pause()).await.unwrap();
        until(&shim, true).await;
        in_time(shim.resume()).await.unwrap();
        until(&shim, false).await;
    }
    in_time(shim.pause()).await.unwrap();
    in_time(shim.pause()).await.unwrap();
    let identity = shim.identity();
    drop(shim);
    let shim = in_time(ShimClient::adopt(vm.directory(), identity)).await.unwrap().unwrap();
    // A step of the daemon neither ends it nor begins another one.
    in_time(shim.hold_guest(Duration::from_millis(50))).await.unwrap();
    in_time(shim.release_guest()).await.unwrap();
    in_time(shim.hold_guest(Duration::from_millis(1))).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    until(&shim, true).await;
    in_time(shim.resume()).await.unwrap();
    until(&shim, false).await;
    in_time(shim.pause()).await.unwrap();
    in_time(shim.kill()).await.unwrap();
    assert_eq!(ended(&shim).await.signal, Some(9));
}

#[tokio::test]
async fn a_guest_that_a_lost_daemon_holds_is_resumed_by_its_shim() {
    let vm = forever();
    let shim = vm.launch().await;
    in_time(shim.hold_guest(Duration::from_secs(60))).await.unwrap();
    until(&shim, true).await;
    in_time(shim.release_guest()).await.unwrap();
    until(&shim, false).await;
    // Nobody releases this one.
    in_time(shim.hold_guest(Duration::from_millis(400))).await.unwrap();
    until(&shim, false).await;
    // It can be renewed, and a request of the user that comes meanwhile outlasts it.
    in_time(shim.hold_guest(Duration::from_millis(400))).await.unwrap();
    in_time(shim.hold_guest(Duration::from_secs(60))).await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    until(&shim, true).await;
    in_time(shim.pause()).await.unwrap();
    in_time(shim.release_guest()).await.unwrap();
    until(&shim, true).await;
    in_time(shim.kill()).await.unwrap();
}
