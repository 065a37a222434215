use std::os::unix::process::ExitStatusExt;
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, BufReader};

use super::running::TAIL_BYTES;
use super::*;

fn never() -> CancellationToken {
    CancellationToken::new()
}

#[test]
fn a_missing_program_names_its_package() {
    let error = Tool::find_in([Path::new("/nonexistent")], "mke2fs").unwrap_err();
    assert_eq!(error.to_string(), "mke2fs is not installed");
    assert_eq!(error.hint().as_deref(), Some("install the package e2fsprogs"));
}

#[test]
fn a_user_without_ids_of_its_own_is_told_how_to_get_some() {
    let failed = |name, stderr: &str| ProgramError::Failed {
        name,
        status: ExitStatus::from_raw(25 << 8),
        stderr: stderr.to_owned(),
    };
    let said = "E: failed to parse /etc/subuid and /etc/subgid";
    assert!(failed("mmdebstrap", said).hint().unwrap().contains("usermod --add-subuids"));
    assert_eq!(failed("mmdebstrap", "E: no such suite").hint(), None);
    assert_eq!(failed("mke2fs", said).hint(), None);
}

#[tokio::test]
async fn the_environment_is_clean_and_output_comes_by_line() {
    let mut seen = Vec::new();
    let finished = Tool::find("env")
        .unwrap()
        .call()
        .env("EXTRA", "1")
        .run_lines(&never(), |l| seen.push(String::from_utf8(l.to_vec()).unwrap()))
        .await
        .unwrap();
    seen.sort();
    assert_eq!(finished.code, 0);
    let mark = format!("NEXUS_STARTED_BY={}", leftover::mark());
    assert_eq!(seen, ["EXTRA=1", "LC_ALL=C", &mark, &format!("PATH={}", PROGRAMS.join(":"))]);
}

#[tokio::test]
async fn a_failure_keeps_a_bounded_tail() {
    let script = "i=0; while [ $i -lt 5000 ]; do echo line $i >&2; i=$((i+1)); done; exit 3";
    let error = Tool::find("sh").unwrap().call().args(["-c", script]).run(&never()).await.unwrap_err();
    let ProgramError::Failed { status, stderr, .. } = error else { panic!("{error}") };
    assert_eq!(status.code(), Some(3));
    assert!(stderr.ends_with("line 4999") && stderr.len() <= TAIL_BYTES, "{}", stderr.len());
}

#[tokio::test]
async fn lateness_and_cancellation_end_the_whole_group() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("alive");
    for cancelled in [false, true] {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        // Both the shell and its grandchild hold the FIFO open for writing; its reader sees the end when all are gone.
        let reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&fifo).unwrap();
        let cancel = never();
        let call = Tool::find("sh")
            .unwrap()
            .call()
            .args(["-c", "exec 9>\"$1\"; echo up >&9; sleep 1000 & sleep 1000", "sh"])
            .arg(&fifo)
            .timeout(Duration::from_secs(if cancelled { 100 } else { 5 }));
        let started = Instant::now();
        let run = tokio::spawn({
            let cancel = cancel.clone();
            async move { call.run(&cancel).await }
        });
        let mut lines = BufReader::new(reader).lines();
        assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("up"));
        if cancelled {
            cancel.cancel();
        }
        let error = run.await.unwrap().unwrap_err();
        assert!(
            matches!(error, ProgramError::Cancelled { .. }) == cancelled
                && matches!(error, ProgramError::Late { .. }) != cancelled
        );
        assert_eq!(lines.next_line().await.unwrap(), None);
        assert!(started.elapsed() < Duration::from_secs(30));
        std::fs::remove_file(&fifo).unwrap();
    }
}

#[tokio::test]
async fn what_a_program_mounts_is_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().canonicalize().unwrap();
    let script = "mount -t tmpfs tmpfs \"$1\" && grep -cF \"$1\" /proc/self/mountinfo";
    let mut seen = String::new();
    let call = Tool::find("sh").unwrap().call().args(["-c", script, "sh"]).arg(&place).own_mounts();
    call.run_lines(&never(), |line| seen.push_str(&String::from_utf8_lossy(line))).await.unwrap();
    assert_eq!(seen, "1");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(place.to_str().unwrap()), "{mounts}");
}

#[test]
fn a_root_that_is_no_mount_point_keeps_no_program_from_starting() {
    // Of this thread alone; there are programs and their libraries in it.
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        nix::unistd::chroot("/usr").unwrap();
        std::env::set_current_dir("/").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // There is no /dev/null for its input.
        let call = Tool::find("sh").unwrap().call().args(["-c", "exit 0"]).input(b"").own_mounts();
        runtime.block_on(call.run(&never())).unwrap()
    });
    assert_eq!(thread.join().unwrap().code, 0);
}
