//! The commands of a save, against recorded answers of QEMU.

use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;

use nexus_schema::error::chain;

use super::*;
use crate::vmm::driver::qemu::fake::{Answer, done, status, with_monitor};

const STATE_BYTES: &[u8] = b"the state of devices and processors";
const UNLINK: &str = r#"set_link {"name":"net0","up":false}"#;
const CAPABILITIES: &str =
    r#"migrate-set-capabilities {"capabilities":[{"capability":"x-ignore-shared","state":true}]}"#;
const GETFD: &str = r#"getfd {"fdname":"state"}"#;
const MIGRATE: &str = r#"migrate {"uri":"fd:state"}"#;
const CANCEL: [&str; 4] =
    ["migrate_cancel", r#"closefd {"fdname":"state"}"#, "query-migrate", "query-status"];
const LINK: &str = r#"set_link {"name":"net0","up":true}"#;

/// A QEMU that can save its guest.
#[derive(Default)]
struct Qemu {
    pipe: Option<OwnedFd>,
    /// The answers to `query-migrate` before the last one.
    active: u32,
}

impl Qemu {
    fn answer(&mut self, command: &str, file: Option<OwnedFd>) -> Answer {
        match command {
            "query-status" => status("paused"),
            "getfd" => {
                self.pipe = file;
                done()
            }
            "closefd" => {
                self.pipe = None;
                done()
            }
            "migrate" => {
                if let Some(pipe) = self.pipe.take() {
                    // It fails if nobody reads any more.
                    File::from(pipe).write_all(STATE_BYTES).ok();
                }
                done()
            }
            "query-migrate" if self.active > 0 => {
                self.active -= 1;
                status("active")
            }
            "query-migrate" => status("completed"),
            _ => done(),
        }
    }
}

fn memory() -> File {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(4 << 20).unwrap();
    memory.write_all_at(&[7; 4096], 8192).unwrap();
    memory
}

fn saver(has_interface: bool) -> (Saver, tempfile::NamedTempFile) {
    let binary = tempfile::NamedTempFile::new().unwrap();
    binary.as_file().write_all_at(b"qemu", 0).unwrap();
    (Saver::new(memory(), has_interface, binary.path()).unwrap(), binary)
}

fn files() -> SaveFiles {
    SaveFiles { state: tempfile::tempfile().unwrap(), ram: tempfile::tempfile().unwrap() }
}

fn save(
    has_interface: bool,
    files: &SaveFiles,
    answer: impl FnMut(&str, Option<OwnedFd>) -> Answer + Send,
) -> (Vec<String>, Result<Saved, DriverError>) {
    let (saver, _binary) = saver(has_interface);
    with_monitor(true, answer, |monitor| saver.save(monitor, "7.2.22", files, &|| true))
}

fn sha256(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}

#[test]
fn state_and_memory_are_written_with_the_network_disconnected() {
    let files = files();
    let mut qemu = Qemu { active: 1, ..Qemu::default() };
    let (commands, saved) = save(true, &files, |command, file| qemu.answer(command, file));
    let saved = saved.unwrap();
    assert_eq!(
        commands,
        [
            "query-status",
            UNLINK,
            CAPABILITIES,
            GETFD,
            MIGRATE,
            "query-migrate",
            "query-migrate",
            "query-status",
            LINK
        ]
    );
    assert_eq!((saved.state_bytes, saved.state_sha256), (STATE_BYTES.len() as u64, sha256(STATE_BYTES)));
    assert_eq!(saved.ram_bytes, 4096);
    let page = [&8192u64.to_le_bytes()[..], &[7; 4096]].concat();
    assert_eq!((saved.ram_sha256, saved.kind), (sha256(&page), SavedKind::Shared));
    let qemu = SavedQemu { version: "7.2.22".into(), binary_sha256: sha256(b"qemu") };
    assert_eq!(saved.qemu, qemu);
    let SaveFiles { mut state, ram } = files;
    let mut written = Vec::new();
    state.rewind().unwrap();
    state.read_to_end(&mut written).unwrap();
    assert_eq!(written, STATE_BYTES);
    let mut page = [0; 4096];
    ram.read_exact_at(&mut page, 8192).unwrap();
    assert_eq!((page, ram.metadata().unwrap().len()), ([7; 4096], 4 << 20));
}

#[test]
fn a_guest_that_stayed_paused_since_the_last_save_is_saved_again() {
    let mut qemu = Qemu::default();
    let (commands, saved) = save(false, &files(), |command, file| match command {
        "query-status" => status("postmigrate"),
        _ => qemu.answer(command, file),
    });
    saved.unwrap();
    let expected =
        ["query-status", "cont", "stop", CAPABILITIES, GETFD, MIGRATE, "query-migrate", "query-status"];
    assert_eq!(commands, expected);
}

#[test]
fn what_qemu_refuses_is_in_the_error_and_the_guest_is_connected_again() {
    let blocked = "State blocked by non-migratable device '0000:00/vhost-user-vsock'";
    let mut qemu = Qemu::default();
    let (commands, saved) = save(true, &files(), |command, file| match command {
        "migrate" => Answer::Refuse(blocked),
        _ => qemu.answer(command, file),
    });
    assert_eq!(saved.unwrap_err().to_string(), format!("qemu refused migrate: {blocked}"));
    let expected = [&["query-status", UNLINK, CAPABILITIES, GETFD, MIGRATE][..], &CANCEL, &[LINK]].concat();
    assert_eq!(commands, expected);
}

#[test]
fn a_failed_migration_says_why() {
    let mut qemu = Qemu::default();
    let (commands, saved) = save(true, &files(), |command, file| match command {
        "query-migrate" => Answer::Return(json!({ "status": "failed", "error-desc": "Broken pipe" })),
        _ => qemu.answer(command, file),
    });
    assert_eq!(saved.unwrap_err().to_string(), "qemu refused migrate: Broken pipe");
    assert_eq!(commands.last().map(String::as_str), Some(LINK));
}

#[test]
fn a_full_disk_fails_the_save() {
    let full = || File::options().read(true).write(true).open("/dev/full").unwrap();
    let files = SaveFiles { state: full(), ram: tempfile::tempfile().unwrap() };
    let mut qemu = Qemu::default();
    let (commands, saved) = save(true, &files, |command, file| qemu.answer(command, file));
    let why = chain(&saved.unwrap_err());
    assert!(why.starts_with("write the guest's state: ") && why.contains("No space left"), "{why}");
    let expected = [&["query-status", UNLINK, CAPABILITIES, GETFD, MIGRATE][..], &CANCEL, &[LINK]].concat();
    assert_eq!(commands, expected);
}

/// Answers to one command, of which the last one is given from then on.
fn in_turn(words: &mut Vec<&'static str>) -> Answer {
    status(if words.len() > 1 { words.remove(0) } else { words[0] })
}

/// The thread of a migration finishes it after its result is told, and `cont` is refused until then.
#[test]
fn a_save_is_over_when_the_guest_may_go_on_and_be_saved_again() {
    let (mut qemu, mut states) =
        (Qemu::default(), vec!["paused", "finish-migrate", "finish-migrate", "postmigrate"]);
    let (commands, saved) = save(true, &files(), |command, file| match command {
        "query-status" => in_turn(&mut states),
        _ => qemu.answer(command, file),
    });
    saved.unwrap();
    let ends = ["query-migrate", "query-status", "query-status", "query-status", LINK];
    assert_eq!(commands[commands.len() - ends.len()..], ends);

    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let files = SaveFiles { state: full, ram: tempfile::tempfile().unwrap() };
    let (mut qemu, mut states) = (Qemu::default(), vec!["paused", "finish-migrate", "postmigrate"]);
    let mut migrations = vec!["cancelling", "cancelling", "cancelled"];
    let (commands, saved) = save(true, &files, |command, file| match command {
        "query-status" => in_turn(&mut states),
        "query-migrate" => in_turn(&mut migrations),
        _ => qemu.answer(command, file),
    });
    assert!(matches!(saved, Err(DriverError::Saving { .. })), "{saved:?}");
    let asked =
        ["query-migrate", "query-migrate", "query-migrate", "query-status", "query-migrate", "query-status"];
    let ends = [&CANCEL[..2], &asked, &[LINK]].concat();
    assert_eq!(commands[commands.len() - ends.len()..], ends);
}

#[test]
fn a_save_ends_when_nobody_waits_for_it() {
    let (saver, _binary) = saver(false);
    let (files, mut qemu) = (files(), Qemu::default());
    let (_, saved) = with_monitor(
        true,
        |command, file| qemu.answer(command, file),
        |monitor| saver.save(monitor, "7.2.22", &files, &|| false),
    );
    let why = chain(&saved.unwrap_err());
    assert_eq!(why, "write the guest's memory: nobody waits for it any more");
}

#[test]
fn an_end_of_qemu_fails_the_save() {
    let mut qemu = Qemu::default();
    let (_, saved) = save(true, &files(), |command, file| match command {
        "query-migrate" => Answer::End,
        _ => qemu.answer(command, file),
    });
    assert!(matches!(saved, Err(DriverError::Unanswered { .. })), "{saved:?}");
}

#[test]
fn a_binary_that_was_replaced_is_the_one_that_runs() {
    let (saver, binary) = saver(false);
    std::fs::remove_file(binary.path()).unwrap();
    std::fs::write(binary.path(), "a newer qemu").unwrap();
    assert_eq!(saver.binary_sha256().unwrap(), sha256(b"qemu"));
    assert_eq!(saver.binary_sha256().unwrap(), sha256(b"qemu"));
}

#[test]
fn a_memory_whose_length_has_changed_is_not_saved() {
    for length in [1 << 20, 8 << 20] {
        let (saver, _binary) = saver(false);
        saver.memory.set_len(length).unwrap();
        let mut qemu = Qemu::default();
        let answer = |command: &str, file: Option<OwnedFd>| qemu.answer(command, file);
        let (_, saved) =
            with_monitor(true, answer, |monitor| saver.save(monitor, "7.2.22", &files(), &|| true));
        let why = chain(&saved.unwrap_err());
        assert!(why.contains("its length has changed"), "{why}");
    }
}

#[test]
fn a_guest_whose_network_could_not_be_disconnected_is_connected_again() {
    let mut qemu = Qemu::default();
    let mut is_first = true;
    let (commands, saved) = save(true, &files(), |command, file| match command {
        "set_link" if std::mem::take(&mut is_first) => Answer::Refuse("busy"),
        _ => qemu.answer(command, file),
    });
    assert_eq!(saved.unwrap_err().to_string(), "qemu refused set_link: busy");
    assert_eq!(commands, ["query-status", UNLINK, LINK]);
}
