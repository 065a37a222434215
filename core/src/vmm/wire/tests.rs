//! Reads and writes the recorded messages of each generation.

use nexus_schema::ByteSize;
use serde::de::DeserializeOwned;

use super::*;
use crate::vmm::control::{Launched, Reply, Saved, SavedQemu, Stall, Status};
use crate::vmm::exit::{self, Exit};
use crate::vmm::plan::tests::plan;
use crate::vmm::plan::{LaunchPlan, Restore, SavedKind};

/// The files of one generation.
struct Recording {
    protocol: u32,
    requests: &'static str,
    replies: &'static str,
    launched: &'static str,
    plan: &'static str,
    exit: &'static str,
}

macro_rules! recording {
    ($generation:literal) => {
        Recording {
            protocol: $generation,
            requests: include_str!(concat!("../../../tests/fixtures/shim/", $generation, "/requests.jsonl")),
            replies: include_str!(concat!("../../../tests/fixtures/shim/", $generation, "/replies.jsonl")),
            launched: include_str!(concat!("../../../tests/fixtures/shim/", $generation, "/launched.jsonl")),
            plan: include_str!(concat!("../../../tests/fixtures/shim/", $generation, "/plan.json")),
            exit: include_str!(concat!("../../../tests/fixtures/shim/", $generation, "/exit.json")),
        }
    };
}

/// Fixtures of each generation that this build supports.
const RECORDINGS: [Recording; 4] = [recording!(1), recording!(2), recording!(3), recording!(4)];

fn newest() -> Recording {
    let [.., newest] = RECORDINGS;
    newest
}

fn lines<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

fn requests() -> Vec<Request> {
    let mut requests =
        vec![Request::Status, Request::Shutdown, Request::Kill, Request::Pause, Request::Resume];
    requests.extend([Request::ResizeDrive { index: 1, bytes: 1 << 30 }, Request::Wait, Request::Watch]);
    requests.extend([Request::Hold { ms: 10_000 }, Request::Release]);
    requests.extend([
        Request::Limit { rx: Some(ByteSize::mib(10)), tx: None },
        Request::Limit { rx: None, tx: None },
    ]);
    requests.extend([Request::Save { hold_ms: 10_000 }, Request::SetLink { up: true }]);
    requests
}

/// The generation that a request is in since.
fn since(request: Request) -> u32 {
    match request {
        Request::Watch => 2,
        Request::Hold { .. } | Request::Release => 3,
        Request::Limit { .. } | Request::Save { .. } | Request::SetLink { .. } => 4,
        _ => 1,
    }
}

#[test]
fn every_generation_that_is_spoken_is_recorded() {
    let recorded: Vec<u32> = RECORDINGS.iter().map(|recording| recording.protocol).collect();
    assert_eq!(recorded, (PROTOCOL_MIN..=PROTOCOL).collect::<Vec<_>>());
}

#[test]
fn requests_are_written_as_each_generation_takes_them() {
    for Recording { protocol, requests: recorded, .. } in RECORDINGS {
        let known = requests().into_iter().filter(|request| protocol >= since(*request));
        let recorded: Vec<serde_json::Value> = lines(recorded);
        assert_eq!(recorded.len(), known.clone().count());
        for (recorded, request) in recorded.iter().zip(known) {
            let line = request_line(request, protocol).unwrap();
            let (end, line) = line.split_last().unwrap();
            assert_eq!(
                (*end, &serde_json::from_slice::<serde_json::Value>(line).unwrap()),
                (b'\n', recorded)
            );
            // A shim of this build accepts them from a daemon of either generation.
            assert_eq!(read_request(recorded.to_string().as_bytes()).unwrap(), request);
        }
    }
    let unknown = request_line(Request::Watch, 1).unwrap_err();
    assert!(matches!(unknown, WireError::Unknown { protocol: 1 }), "{unknown}");
    let unknown = request_line(Request::Release, 2).unwrap_err();
    assert!(matches!(unknown, WireError::Unknown { protocol: 2 }), "{unknown}");
    let unknown = request_line(Request::Limit { rx: None, tx: None }, 3).unwrap_err();
    assert!(matches!(unknown, WireError::Unknown { protocol: 3 }), "{unknown}");
}

#[test]
fn answers_of_each_generation_are_understood() {
    for Recording { protocol, replies, launched, .. } in RECORDINGS {
        let replies: Vec<Reply> = lines(replies);
        let Reply::Status(Status { protocol: said, pid, .. }) = &replies[0] else { panic!("no status") };
        assert_eq!((*said, *pid), (protocol, 24249));
        assert_eq!(replies[1], Reply::Done);
        assert!(matches!(&replies[2], Reply::Refused(why) if why.ends_with("cannot do that")));
        assert!(replies[3..5].iter().all(|reply| matches!(reply, Reply::Ended(_))));
        if protocol >= 2 {
            assert_eq!(replies[5..7], [None, Some(Stall::DiskFull { drive: 1 })].map(Reply::Stalled));
        }
        if protocol >= 4 {
            assert_eq!(replies[7..], [Reply::Saved(saved())]);
        }
        let launched: Vec<Launched> = lines(launched);
        assert!(matches!(&launched[0], Launched::Running(status) if status.protocol == protocol));
        assert!(matches!(&launched[1], Launched::Failed(exit) if exit.message.starts_with("start /nowhere")));
    }
}

/// The answer to a save that is recorded.
fn saved() -> Saved {
    Saved {
        state_sha256: "5".repeat(64),
        state_bytes: 55_234,
        ram_sha256: "a".repeat(64),
        ram_bytes: 93_323_264,
        state_ms: 6,
        ram_ms: 71,
        kind: SavedKind::Shared,
        qemu: SavedQemu { version: "7.2.22".into(), binary_sha256: "b".repeat(64) },
    }
}

#[test]
fn plans_of_each_generation_are_understood() {
    for Recording { plan: recorded, .. } in RECORDINGS {
        let job = read_job(recorded.as_bytes()).unwrap();
        assert_eq!(job, Job { plan: plan(), tsc_khz: Some(2_445_432) });
        assert_eq!(job.plan.memory, ByteSize::mib(512));
    }
    let written = write_numbered(&Job { plan: plan(), tsc_khz: Some(2_445_432) }).unwrap();
    let newest: serde_json::Value = serde_json::from_str(newest().plan).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&written).unwrap(), newest);
}

#[test]
fn a_plan_says_what_it_restores() {
    let restore = Restore {
        state: "/var/lib/nexus/checkpoints/c/state".into(),
        ram: "/var/lib/nexus/checkpoints/c/ram".into(),
        kind: SavedKind::Shared,
        nonce: "00ff".into(),
    };
    let plan = LaunchPlan { restore: Some(restore), ..plan() };
    let job = Job { plan, tsc_khz: None };
    let written = write_numbered(&job).unwrap();
    let text = String::from_utf8(written.clone()).unwrap();
    assert!(text.contains(r#""kind":"shared""#) && text.contains(r#""nonce":"00ff""#), "{text}");
    assert_eq!(read_job(&written).unwrap(), job);
}

#[test]
fn exits_of_each_generation_are_understood() {
    let expected = Exit {
        code: None,
        signal: Some(9),
        by_request: true,
        shim_lost: false,
        machine: None,
        message: "the guest process was killed by SIGKILL".into(),
    };
    let directory = tempfile::tempdir().unwrap();
    for Recording { exit: recorded, .. } in RECORDINGS {
        std::fs::write(directory.path().join("exit.json"), recorded).unwrap();
        assert_eq!(exit::read_exit(directory.path()).as_ref(), Some(&expected));
    }
    exit::write_exit(directory.path(), &expected).unwrap();
    let written = std::fs::read(directory.path().join("exit.json")).unwrap();
    let newest: serde_json::Value = serde_json::from_str(newest().exit).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&written).unwrap(), newest);
}

#[test]
fn what_is_newer_is_refused_by_its_number() {
    let newer = read_request(br#"{"op":"fly","protocol":5}"#).unwrap_err();
    assert_eq!(newer.to_string(), "written for protocol 5; this build supports 1 to 4");
    for garbled in ["{}", "[]", r#"{"op":"fly"}"#, r#"{"op":"kill","protocol":"x"}"#] {
        let error = read_request(garbled.as_bytes()).unwrap_err();
        assert!(matches!(error, WireError::Garbled { .. }), "{garbled}: {error}");
    }
}
