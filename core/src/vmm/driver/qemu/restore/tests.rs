//! The commands of a restore, against recorded answers of QEMU.

use std::os::unix::fs::FileExt as _;

use nexus_schema::error::chain;

use super::*;
use crate::vmm::driver::BRING_UP;
use crate::vmm::driver::qemu::fake::{Answer, done, status, with_monitor};

const CAPABILITIES: &str =
    r#"migrate-set-capabilities {"capabilities":[{"capability":"x-ignore-shared","state":true}]}"#;
const INCOMING: &str = r#"migrate-incoming {"uri":"fd:7"}"#;
const BYTES: u64 = 4 << 20;

struct Saved {
    restore: Restore,
    memory: File,
    _directory: tempfile::TempDir,
}

/// A saved guest, and a new memory of this length for it.
fn saved(bytes: u64) -> Saved {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("state"), "the state").unwrap();
    let ram = File::create(path("ram")).unwrap();
    ram.set_len(BYTES).unwrap();
    ram.write_all_at(&[7; 4096], 8192).unwrap();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(bytes).unwrap();
    let restore =
        Restore { state: path("state"), ram: path("ram"), kind: SavedKind::Shared, nonce: "00ff".into() };
    Saved { restore, memory, _directory: directory }
}

fn refused(saved: &Saved) -> String {
    chain(&Incoming::prepare(&saved.restore, &saved.memory, 7).unwrap_err())
}

/// Loads with these answers. Returns the commands, the result, the nonces of relinks, and what came through the pipe.
fn load(
    answer: impl FnMut(&str, Option<OwnedFd>) -> Answer + Send,
) -> (Vec<String>, Result<(), DriverError>, Vec<String>, String) {
    let saved = saved(BYTES);
    let (incoming, pipe) = Incoming::prepare(&saved.restore, &saved.memory, 7).unwrap();
    let mut page = [0; 4096];
    saved.memory.read_exact_at(&mut page, 8192).unwrap();
    assert_eq!(page, [7; 4096]);
    let mut nonces = Vec::new();
    let (commands, result) = with_monitor(false, answer, |monitor| {
        incoming.load(monitor, Instant::now() + BRING_UP, |nonce| {
            nonces.push(nonce.to_owned());
            Ok(())
        })
    });
    let mut state = String::new();
    File::from(pipe).read_to_string(&mut state).unwrap();
    (commands, result, nonces, state)
}

#[test]
fn the_state_is_loaded_then_the_guest_goes_on_and_is_linked() {
    let mut loading = 1;
    let (commands, result, nonces, state) = load(|command, _| match command {
        "query-status" if loading > 0 => {
            loading -= 1;
            status("inmigrate")
        }
        "query-status" => status("paused"),
        _ => done(),
    });
    result.unwrap();
    assert_eq!(commands, [CAPABILITIES, INCOMING, "query-status", "query-status", "cont"]);
    assert_eq!((nonces, state.as_str()), (vec!["00ff".to_owned()], "the state"));
}

#[test]
fn a_state_that_qemu_does_not_take_is_told_and_nobody_is_linked() {
    let (_, result, nonces, _) = load(|command, _| match command {
        "query-status" => Answer::End,
        _ => done(),
    });
    assert!(matches!(result, Err(DriverError::Ended { .. })), "{result:?}");
    assert!(nonces.is_empty());
}

#[test]
fn a_drive_that_another_vmm_uses_is_told() {
    let lock = "Failed to get \"write\" lock";
    let (commands, result, nonces, _) = load(|command, _| match command {
        "query-status" => status("paused"),
        "cont" => Answer::Refuse(lock),
        _ => done(),
    });
    assert_eq!(result.unwrap_err().to_string(), format!("qemu refused cont: {lock}"));
    assert_eq!((commands.last().map(String::as_str), nonces.len()), (Some("cont"), 0));
}

#[test]
fn what_does_not_fit_is_refused_before_qemu_starts() {
    let other_size = saved(2 * BYTES);
    let why = refused(&other_size);
    assert!(why.starts_with("read the memory of the saved guest "), "{why}");
    assert!(why.ends_with("it has 4194304 bytes, but the VM's memory has 8388608"), "{why}");

    let mut private = saved(BYTES);
    private.restore.kind = SavedKind::Private;
    assert!(refused(&private).starts_with("qemu cannot restore this VM: "));

    let mut lost = saved(BYTES);
    lost.restore.state.set_extension("lost");
    let why = refused(&lost);
    assert!(why.starts_with("read the state of the saved guest ") && why.contains("No such file"), "{why}");
}
