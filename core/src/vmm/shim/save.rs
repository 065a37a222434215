//! Saves of a guest: it is held while its state and memory are written, and goes on if that fails or if nobody waits for it any more.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::pause::{Guest, Order};
use super::say;
use super::serve::{is_open, send};
use crate::vmm::control::{Reply, Saved};
use crate::vmm::driver::{DriverError, SaveFiles};

/// A save to make.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) files: SaveFiles,
    /// How long the guest is held from the answer on.
    pub(super) hold: Duration,
    pub(super) caller: UnixStream,
}

/// Makes a save and answers its caller.
pub(super) fn serve(guest: &mut Guest<'_>, save: &Save) {
    let reply = match make(guest, save) {
        Ok(saved) => Reply::Saved(saved),
        Err(error) => {
            let why = nexus_schema::error::chain(&error);
            say(&format!("cannot save the guest: {why}"));
            Reply::Refused(why)
        }
    };
    send(&save.caller, &reply);
}

fn make(guest: &mut Guest<'_>, save: &Save) -> Result<Saved, DriverError> {
    guest.machine.prepare_save()?;
    let held = guest.obey(Order::Hold(save.hold));
    let saved = held.and_then(|()| guest.machine.save(&save.files, &|| is_open(&save.caller)));
    if saved.is_ok() {
        guest.extend(save.hold);
    } else {
        if !is_open(&save.caller) {
            // The daemon that stopped the guest's commands is gone.
            guest.lease.end_after(Duration::ZERO);
        }
        // A failure to resume is tried again by itself, and is in the shim's log.
        guest.obey(Order::Release).ok();
    }
    saved
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::process::ExitStatus;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use nexus_schema::link::{LEASE_PORT, LeaseRequest};

    use super::*;
    use crate::vmm::control::SavedQemu;
    use crate::vmm::driver::Machine;
    use crate::vmm::plan::SavedKind;
    use crate::vmm::plan::tests::plan;
    use crate::vmm::shim::pause::Pauses;

    const LONG: Duration = Duration::from_secs(20);

    /// A machine that tells what is asked of it.
    struct Told {
        calls: Sender<&'static str>,
        fails: bool,
    }

    impl Machine for Told {
        fn version(&self) -> &str {
            "1"
        }

        fn shutdown(&self) -> Result<(), DriverError> {
            Ok(())
        }

        fn set_paused(&self, paused: bool) -> Result<(), DriverError> {
            self.calls.send(if paused { "pause" } else { "resume" }).unwrap();
            Ok(())
        }

        fn resize_drive(&self, _: usize, _: u64) -> Result<(), DriverError> {
            Ok(())
        }

        fn prepare_save(&self) -> Result<(), DriverError> {
            self.calls.send("prepare").unwrap();
            Ok(())
        }

        fn save(&self, _: &SaveFiles, is_wanted: &dyn Fn() -> bool) -> Result<Saved, DriverError> {
            self.calls.send(if is_wanted() { "save" } else { "unwanted" }).unwrap();
            if self.fails || !is_wanted() {
                return Err(DriverError::Unsupported { what: "it" });
            }
            Ok(saved())
        }

        fn ending(&self, _: ExitStatus) -> String {
            String::new()
        }
    }

    fn saved() -> Saved {
        Saved {
            state_sha256: String::new(),
            state_bytes: 1,
            ram_sha256: String::new(),
            ram_bytes: 2,
            state_ms: 3,
            ram_ms: 4,
            kind: SavedKind::Shared,
            qemu: SavedQemu { version: String::new(), binary_sha256: String::new() },
        }
    }

    fn start(fails: bool) -> (Pauses, Receiver<&'static str>) {
        let (calls, told) = channel();
        let machine: Arc<dyn Machine> = Arc::new(Told { calls, fails });
        (Pauses::start(&machine, &plan()).unwrap(), told)
    }

    /// An agent that knows every secret; also returns what it is asked.
    fn agent() -> (tempfile::TempDir, PathBuf, Receiver<LeaseRequest>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (tell, asked) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
                assert_eq!(lines.next().unwrap(), format!("CONNECT {LEASE_PORT}"));
                let request = serde_json::from_str(&lines.next().unwrap()).unwrap();
                stream.write_all(b"OK 1\n{\"known\":true}\n").unwrap();
                if tell.send(request).is_err() {
                    return;
                }
            }
        });
        (directory, path, asked)
    }

    /// The secret of a guest that is about to be held.
    fn secret(asked: &Receiver<LeaseRequest>) -> String {
        match asked.recv_timeout(LONG).unwrap() {
            LeaseRequest::Hold { secret } => secret,
            other => panic!("{other:?}"),
        }
    }

    fn goes_on(asked: &Receiver<LeaseRequest>) -> String {
        match asked.recv_timeout(LONG).unwrap() {
            LeaseRequest::GoOn { secret, .. } => secret,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn commands_go_on_by_the_shims_secret_once_their_guest_does_without_a_daemon() {
        let (_directory, socket, asked) = agent();
        let (calls, told) = channel();
        let machine: Arc<dyn Machine> = Arc::new(Told { calls, fails: false });
        let pauses = Pauses::start_at(socket, &machine, &plan()).unwrap();
        // Its daemon does not renew the hold.
        let caller = save(&pauses, Duration::from_millis(50));
        let first = secret(&asked);
        expect(&told, &["prepare", "pause", "save", "resume"]);
        assert_eq!(goes_on(&asked), first);
        drop(caller);
        // Its daemon ends while it is saved. Each hold has a secret of its own.
        let (_, caller) = UnixStream::pair().unwrap();
        let files = SaveFiles { state: tempfile::tempfile().unwrap(), ram: tempfile::tempfile().unwrap() };
        pauses.save(Save { files, hold: LONG, caller });
        let second = secret(&asked);
        assert_ne!(second, first);
        assert_eq!(goes_on(&asked), second);
        expect(&told, &["prepare", "pause", "unwanted", "resume"]);
        // While a user has it paused, it hears nothing, and is told once it runs.
        let _caller = save(&pauses, Duration::from_secs(2));
        let third = secret(&asked);
        pauses.order(Order::Pause, None);
        expect(&told, &["prepare", "pause", "save", "pause"]);
        // The end of the hold.
        expect(&told, &["pause"]);
        asked.try_recv().unwrap_err();
        pauses.order(Order::Resume, None);
        assert_eq!(goes_on(&asked), third);
    }

    #[test]
    fn a_daemon_that_releases_a_guest_lets_its_commands_go_on_itself() {
        let (_directory, socket, asked) = agent();
        let (calls, told) = channel();
        let machine: Arc<dyn Machine> = Arc::new(Told { calls, fails: false });
        let pauses = Pauses::start_at(socket, &machine, &plan()).unwrap();
        let caller = save(&pauses, LONG);
        assert_eq!(reply(&caller), Reply::Saved(saved()));
        secret(&asked);
        pauses.order(Order::Release, None);
        expect(&told, &["prepare", "pause", "save", "resume"]);
        asked.recv_timeout(Duration::from_millis(300)).unwrap_err();
    }

    fn save(pauses: &Pauses, hold: Duration) -> UnixStream {
        let (ours, caller) = UnixStream::pair().unwrap();
        let files = SaveFiles { state: tempfile::tempfile().unwrap(), ram: tempfile::tempfile().unwrap() };
        pauses.save(Save { files, hold, caller });
        ours
    }

    fn reply(stream: &UnixStream) -> Reply {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Waits for these calls.
    fn expect(told: &Receiver<&'static str>, calls: &[&str]) {
        let received: Vec<&str> = calls.iter().map(|_| told.recv_timeout(LONG).unwrap()).collect();
        assert_eq!(received, calls);
    }

    #[test]
    fn a_saved_guest_is_held_until_it_is_released() {
        let (pauses, told) = start(false);
        assert_eq!(reply(&save(&pauses, LONG)), Reply::Saved(saved()));
        expect(&told, &["prepare", "pause", "save"]);
        for (order, call) in [(Order::Hold(LONG), "pause"), (Order::Release, "resume")] {
            let (ours, caller) = UnixStream::pair().unwrap();
            pauses.order(order, Some(caller));
            assert_eq!(reply(&ours), Reply::Done);
            expect(&told, &[call]);
        }
    }

    #[test]
    fn a_saved_guest_goes_on_by_itself_if_the_daemon_does_not_go_on_with_it() {
        let (pauses, told) = start(false);
        let caller = save(&pauses, Duration::from_millis(50));
        expect(&told, &["prepare", "pause", "save", "resume"]);
        assert_eq!(reply(&caller), Reply::Saved(saved()));
    }

    #[test]
    fn a_guest_that_could_not_be_saved_goes_on_at_once() {
        let (pauses, told) = start(true);
        assert_eq!(reply(&save(&pauses, LONG)), Reply::Refused("it cannot do that".to_owned()));
        expect(&told, &["prepare", "pause", "save", "resume"]);
    }

    #[test]
    fn a_guest_that_was_paused_by_request_stays_so() {
        let (pauses, told) = start(true);
        pauses.order(Order::Pause, None);
        assert!(matches!(reply(&save(&pauses, LONG)), Reply::Refused(_)));
        expect(&told, &["pause", "prepare", "pause", "save", "pause"]);
        pauses.order(Order::Resume, None);
        expect(&told, &["resume"]);
    }

    #[test]
    fn a_save_that_nobody_waits_for_ends() {
        let (pauses, told) = start(false);
        let (_, caller) = UnixStream::pair().unwrap();
        let files = SaveFiles { state: tempfile::tempfile().unwrap(), ram: tempfile::tempfile().unwrap() };
        pauses.save(Save { files, hold: LONG, caller });
        expect(&told, &["prepare", "pause", "unwanted", "resume"]);
    }
}
