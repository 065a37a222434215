//! The life of a shim, with a script in place of a VMM.

use std::path::Path;
use std::time::Duration;

use nexus_core::internals::{ShimClient, ShimIdentity, VmmError, console, read_exit};
use nix::sys::signal::Signal;

use crate::support::{SHIM, Vm, ended, eventually, in_time, is_alive, own_memory, signal};

const UP: &str = "echo up; : > v.sock";

/// Comes up, does `script` once the test says so, and ends.
fn then(script: &str) -> Vm {
    Vm::script(&format!("{UP}; until [ -e go ]; do sleep 0.02; done; {script}"))
}

async fn launch_and_go(vm: &Vm) -> ShimClient {
    let shim = vm.launch().await;
    std::fs::write(vm.directory().join("go"), "").unwrap();
    shim
}

fn forever() -> Vm {
    Vm::script(&format!("{UP}; exec sleep 1000"))
}

#[tokio::test]
async fn a_vm_that_is_killed_is_gone_and_says_so() {
    let vm = forever();
    let shim = vm.launch().await;
    let vmm = shim.vmm().unwrap().pid;
    assert!(is_alive(vmm) && is_alive(shim.identity().pid));
    assert!(read_exit(vm.directory()).is_none());
    in_time(shim.kill()).await.unwrap();
    let exit = ended(&shim).await;
    assert_eq!((exit.code, exit.signal, exit.by_request, exit.shim_lost), (None, Some(9), true, false));
    assert_eq!(exit.message, "the guest process was killed by SIGKILL");
    assert!(!is_alive(vmm) && !is_alive(shim.identity().pid));
    assert_eq!(ended(&shim).await, exit);
    assert_eq!(read_exit(vm.directory()), Some(exit));
    assert_eq!(vm.leftovers(), [""; 0]);
    in_time(shim.kill()).await.unwrap();
}

#[tokio::test]
async fn the_vmm_dies_with_its_shim() {
    let vm = forever();
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGKILL);
    let exit = ended(&shim).await;
    assert!(exit.shim_lost);
    assert!(!is_alive(shim.vmm().unwrap().pid));
    assert!(in_time(ShimClient::adopt(vm.directory(), shim.identity())).await.unwrap().is_none());
    // What it left behind does not get in the way.
    let shim = vm.launch().await;
    assert!(in_time(ShimClient::adopt(vm.directory(), shim.identity())).await.unwrap().is_some());
    in_time(shim.kill()).await.unwrap();
    assert!(!ended(&shim).await.shim_lost);
}

#[tokio::test]
async fn a_shim_that_hangs_is_killed_all_the_same() {
    let vm = forever();
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGSTOP);
    in_time(shim.kill()).await.unwrap();
    let exit = ended(&shim).await;
    assert!(exit.shim_lost, "{exit:?}");
    assert!(!is_alive(shim.vmm().unwrap().pid) && !is_alive(shim.identity().pid));
}

#[tokio::test]
async fn a_vmm_that_hangs_is_killed() {
    let vm = forever();
    let shim = vm.launch().await;
    signal(shim.vmm().unwrap().pid, Signal::SIGSTOP);
    in_time(shim.kill()).await.unwrap();
    assert_eq!(ended(&shim).await.signal, Some(9));
}

#[tokio::test]
async fn a_vmm_that_exits_at_once_is_reported_with_its_last_words() {
    let vm = Vm::script("echo first >&2; echo 'no such machine: x' >&2; echo on the console; exit 3");
    let VmmError::Launch { driver, exit, vmm_log, console } = vm.fails_to_launch().await else {
        panic!("another error")
    };
    assert_eq!((driver, exit.code, exit.by_request), ("process", Some(3), false));
    assert_eq!(exit.message, "it exited with status 3 at once: no such machine: x");
    assert_eq!(vmm_log, "first\nno such machine: x");
    assert_eq!(console, "on the console");
    assert_eq!(read_exit(vm.directory()), Some(exit));
    assert_eq!(vm.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_vmm_that_floods_stderr_and_exits_is_reported_too() {
    let vm = Vm::script("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2; exit 1");
    let error = vm.fails_to_launch().await.to_string();
    assert!(
        error.starts_with("the VMM process did not start: it exited with status 1 at once: last"),
        "{error}"
    );
    assert!(error.len() < 8 << 10, "{}", error.len());
    let size: u64 =
        std::fs::read_dir(vm.directory()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(size < 1 << 20, "{size}");
}

#[tokio::test]
async fn a_binary_that_is_not_there_is_reported() {
    let mut vm = forever();
    vm.plan.binary = "/nowhere/vmm".into();
    let error = vm.fails_to_launch().await.to_string();
    assert_eq!(
        error,
        "the VMM process did not start: start /nowhere/vmm: No such file or directory (os error 2)"
    );
    let gone = ShimClient::launch(Path::new("/nowhere/nexusd"), &vm.plan).await.unwrap_err();
    assert!(matches!(gone, VmmError::Spawn { .. }), "{gone}");
}

#[tokio::test]
async fn the_end_of_a_vmm_ends_its_shim_after_the_console_is_kept() {
    let vm = then("head -c 50000 /dev/zero | tr '\\0' y; printf 'no newline'; exit 5");
    let shim = launch_and_go(&vm).await;
    let exit = ended(&shim).await;
    assert_eq!((exit.code, exit.by_request), (Some(5), false));
    assert_eq!(exit.message, "the guest process exited with status 5");
    let tail = console::tail(vm.directory(), 16);
    assert_eq!(tail, b"yyyyyyno newline");
    let all = console::read(vm.directory(), Some("0"), 1 << 20).unwrap();
    assert_eq!((all.text_bytes.len(), all.lost_bytes), (3 + 50_000 + 10, 0));
}

#[tokio::test]
async fn a_fast_console_is_rotated_and_never_makes_the_guest_wait() {
    let vm = Vm::script(&format!("{UP}; seq 1 2000000; exec sleep 1000"));
    let shim = vm.launch().await;
    let text = eventually("the last line", || {
        let tail = String::from_utf8(console::tail(vm.directory(), 4096)).unwrap();
        tail.ends_with("\n2000000\n").then_some(tail)
    })
    .await;
    assert!(text.contains("\n1999999\n2000000\n"));
    let chunk = console::read(vm.directory(), Some("0"), 1 << 20).unwrap();
    let total = 3 + (1..=2_000_000u64).map(|n| n.to_string().len() as u64 + 1).sum::<u64>();
    assert_eq!(chunk.lost_bytes + chunk.text_bytes.len() as u64, total);
    assert!((64 << 10..=128 << 10).contains(&chunk.text_bytes.len()), "{}", chunk.text_bytes.len());
    let read = String::from_utf8(chunk.text_bytes).unwrap();
    let numbers: Vec<u32> = read.lines().skip(1).map(|line| line.parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn consoles_of_two_boots_follow_one_another() {
    let mut vm = then("rm go");
    for boot in 1..=2 {
        vm.plan.boot_id = nexus_schema::id::BootId::from_i64(boot).unwrap();
        ended(&launch_and_go(&vm).await).await;
    }
    assert_eq!(console::tail(vm.directory(), 1000), b"up\n");
    let both = console::read(vm.directory(), None, 1000).unwrap();
    let text = String::from_utf8(both.text_bytes).unwrap();
    assert_eq!(text, format!("up\n\n--- boot {} ---\nup\n", vm.plan.boot_id));
}

#[tokio::test]
async fn only_the_very_same_shim_is_adopted() {
    let vm = forever();
    let shim = vm.launch().await;
    let identity = shim.identity();
    assert_eq!(ShimClient::discover(vm.directory()).unwrap(), Some(identity));

    let adopted = in_time(ShimClient::adopt(vm.directory(), identity)).await.unwrap().unwrap();
    assert_eq!(
        (adopted.identity(), adopted.vmm(), adopted.boot_id()),
        (identity, shim.vmm(), shim.boot_id())
    );
    // The pid is used again, by a process that was started at another time; or it is no process at all.
    let later = ShimIdentity { start_time: identity.start_time + 1, ..identity };
    assert!(in_time(ShimClient::adopt(vm.directory(), later)).await.unwrap().is_none());
    let nobody = ShimIdentity { pid: 0x3f_ffff, ..identity };
    assert!(in_time(ShimClient::adopt(vm.directory(), nobody)).await.unwrap().is_none());
    assert!(is_alive(shim.vmm().unwrap().pid));

    let again = ShimClient::launch(Path::new(SHIM), &vm.plan).await.unwrap_err();
    assert!(matches!(again, VmmError::AlreadyRunning { .. }), "{again}");

    in_time(adopted.kill()).await.unwrap();
    assert!(ended(&adopted).await.by_request);
    assert_eq!(ended(&shim).await, ended(&adopted).await);
    assert_eq!(ShimClient::discover(vm.directory()).unwrap(), None);
    assert!(in_time(ShimClient::adopt(vm.directory(), identity)).await.unwrap().is_none());
}

#[tokio::test]
async fn a_shim_that_does_not_answer_is_held_until_it_does() {
    let vm = forever();
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGSTOP);
    let slow = in_time(ShimClient::adopt(vm.directory(), shim.identity())).await.unwrap().unwrap();
    let silence = slow.silence().unwrap();
    assert!(silence.contains("has not answered"), "{silence}");
    assert_eq!((slow.vmm(), slow.boot_id(), slow.identity()), (None, None, shim.identity()));
    // Longer than any patience with it.
    let waited = tokio::time::timeout(Duration::from_secs(13), slow.answered()).await;
    assert!(waited.is_err() && is_alive(shim.vmm().unwrap().pid));
    signal(shim.identity().pid, Signal::SIGCONT);
    in_time(slow.answered()).await;
    assert_eq!((slow.silence(), slow.vmm(), slow.boot_id()), (None, shim.vmm(), shim.boot_id()));
    in_time(slow.kill()).await.unwrap();
    assert!(ended(&slow).await.by_request);
}

#[tokio::test]
async fn a_shim_that_never_answers_can_be_ended_with_its_vmm() {
    let vm = forever();
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGSTOP);
    let slow = in_time(ShimClient::adopt(vm.directory(), shim.identity())).await.unwrap().unwrap();
    in_time(slow.kill()).await.unwrap();
    assert!(ended(&slow).await.shim_lost);
    assert!(!is_alive(shim.vmm().unwrap().pid) && !is_alive(shim.identity().pid));
}

#[tokio::test]
async fn a_launch_that_is_given_up_leaves_nothing() {
    let vm = Vm::script("[ -e fail ] && exit 4; echo $$ > pid; exec sleep 1000");
    let pid = {
        let launch = ShimClient::launch(Path::new(SHIM), &vm.plan);
        let pid = eventually("the VMM's pid", || {
            std::fs::read_to_string(vm.directory().join("pid")).ok()?.trim().parse::<u32>().ok()
        });
        tokio::select! {
            launched = launch => panic!("{launched:?}"),
            pid = in_time(pid) => pid,
        }
    };
    // The next try does not find it in its way.
    let exit = {
        std::fs::write(vm.directory().join("fail"), "").unwrap();
        vm.fails_to_launch().await
    };
    assert!(exit.to_string().contains("status 4"), "{exit}");
    eventually("the VMM is gone", || (!is_alive(pid)).then_some(())).await;
}

#[tokio::test]
async fn sigterm_lets_the_vmm_end_by_itself() {
    let vm = Vm::script(&format!("trap 'echo bye; exit 0' TERM; {UP}; while :; do read x < v.sock; done"));
    let shim = vm.launch().await;
    signal(shim.identity().pid, Signal::SIGTERM);
    let exit = ended(&shim).await;
    assert_eq!((exit.code, exit.by_request), (Some(0), true));
    assert_eq!(console::tail(vm.directory(), 100), b"up\nbye\n");
}

#[tokio::test]
async fn what_a_vmm_leaves_behind_is_ended() {
    let vm = then("sleep 1000 & echo $! > pid; exit 0");
    let exit = ended(&launch_and_go(&vm).await).await;
    assert_eq!(exit.code, Some(0));
    let pid: u32 = std::fs::read_to_string(vm.directory().join("pid")).unwrap().trim().parse().unwrap();
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn a_shim_is_on_its_own_and_small() {
    let _leaked = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let vm = forever();
    let shim = vm.launch().await;
    let pid = shim.identity().pid;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // Field 6: the session is its own.
    assert_eq!(fields[3], pid.to_string());
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), vm.directory());
    let of = |name: &str| std::fs::read_link(format!("/proc/{pid}/fd/{name}")).unwrap();
    assert_eq!(of("0"), Path::new("/dev/null"));
    assert_eq!(of("1"), Path::new("/dev/null"));
    assert_eq!(of("2"), vm.directory().join("shim.log"));
    let sockets = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count();
    assert_eq!(sockets, 1, "its control socket only");

    assert!(own_memory(pid) < 6 << 20, "{}", own_memory(pid));
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn what_a_driver_cannot_do_is_refused() {
    let vm = forever();
    let shim = vm.launch().await;
    let refused = in_time(shim.resize_drive(0, 1 << 20)).await.unwrap_err();
    assert_eq!(refused.to_string(), "the VMM refused to resize a drive: the guest process cannot do that");
    in_time(shim.kill()).await.unwrap();
    ended(&shim).await;
}

#[tokio::test]
async fn a_damaged_plan_is_reported() {
    let vm = forever();
    let mut plan = vm.plan.clone();
    plan.directory = vm.scratch().join("nowhere");
    let error = ShimClient::launch(Path::new(SHIM), &plan).await.unwrap_err();
    assert!(matches!(error, VmmError::File { .. }), "{error}");
}
