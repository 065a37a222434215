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
        // The shell and its grandchild both hold the FIFO open for writing; its reader sees the end when all are gone.
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
    // Only in this thread; it contains programs and their libraries.
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        nix::unistd::chroot("/usr").unwrap();
        std::env::set_current_dir("/").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // There is no /dev/null for its stdin.
        let call = Tool::find("sh").unwrap().call().args(["-c", "exit 0"]).input(b"").own_mounts();
        runtime.block_on(call.run(&never())).unwrap()
    });
    assert_eq!(thread.join().unwrap().code, 0);
}

/// An ext4 filesystem in a file that only its owner may read.
fn filesystem(disk: &Path, mebibytes: u64) {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(disk).unwrap();
    file.set_len(mebibytes << 20).unwrap();
    crate::os::mounted::run(
        std::process::Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4", "-b", "4096"]).arg(disk),
    );
}

/// Whether a program's loader opens this file before the program itself runs.
fn is_of_the_loader(path: &Path) -> bool {
    path == Path::new("/etc/ld.so.cache")
        || ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
            .iter()
            .any(|of| path.starts_with(of))
}

#[tokio::test]
async fn a_program_on_a_disk_is_nobody_with_nothing_else() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    filesystem(&disk, 64 << 10);
    let call = Tool::find("e2fsck").unwrap().call().arg("-fp").disk(&disk);
    let running = call.start().unwrap();
    let pid = running.child.id().unwrap();
    let signal = |signal| {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    signal(rustix::process::Signal::STOP);
    let of = |pid: &str, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let status = of(&pid.to_string(), "status");
    for line in [
        "Name:\te2fsck",
        "Uid:\t65534\t65534\t65534\t65534",
        "Groups:\t \n",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let link = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    for name in ["net", "ipc", "uts"] {
        assert_ne!(link(&pid.to_string(), name), link("self", name), "{name}");
    }
    assert!(of(&pid.to_string(), "limits").contains(&format!("Max file size             {}", 64_u64 << 30)));
    assert_eq!(std::fs::metadata(&disk).unwrap().uid(), 65534);
    let open: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
        .filter(|path| path.starts_with("/") && !path.starts_with("/proc") && path != Path::new("/dev/null"))
        // It was stopped at any point: the loader may have a library open, or still the list of them.
        .filter(|path| !is_of_the_loader(path))
        .collect();
    assert!(open.iter().all(|path| *path == disk), "{open:?}");
    signal(rustix::process::Signal::CONT);
    let finished = running.wait(&never(), |_| {}).await.unwrap();
    assert_eq!(finished.code, 0);
    assert_eq!(std::fs::metadata(&disk).unwrap().uid(), 0, "the disk stays with nobody");
}

#[tokio::test]
async fn programs_of_e2fsprogs_do_their_work_confined_and_read_nothing_else() {
    on_a_disk().await;
}

#[test]
fn programs_of_an_ordinary_user_do_their_work_confined_and_read_nothing_else() {
    crate::os::mounted::as_user(on_a_disk());
}

async fn on_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("it's a disk");
    filesystem(&place, 40);
    let other = directory.path().join("other");
    std::fs::write(&other, "another file").unwrap();
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o644)).unwrap();
    let call = |name| Tool::find(name).unwrap().call();

    let disk = std::fs::OpenOptions::new().write(true).open(&place).unwrap();
    disk.set_len(500 << 20).unwrap();
    call("e2fsck").arg("-fp").disk(&place).run(&never()).await.unwrap();
    call("resize2fs").disk(&place).run(&never()).await.unwrap();
    call("tune2fs").args(["-L", "named"]).disk(&place).run(&never()).await.unwrap();
    let mut said = String::new();
    let show = call("dumpe2fs").arg("-h").disk_to_read(&place);
    show.run_lines(&never(), |line| said.push_str(&String::from_utf8_lossy(line))).await.unwrap();
    assert!(said.contains("named") && said.contains("Block count:              128000"), "{said}");

    // It cannot read or write other files, even if told to; messages name the disk by its real path.
    for command in [format!("write {} x", other.display()), "write /etc/passwd x".to_owned()] {
        let told = call("debugfs").args(["-w", "-R", &command]).disk(&place).run(&never()).await.unwrap();
        assert!(told.stderr.contains("Permission denied"), "{command}: {}", told.stderr);
    }
    let out = directory.path().join("out");
    let command = format!("dump lost+found {}", out.display());
    call("debugfs").args(["-R", &command]).disk(&place).run(&never()).await.unwrap();
    assert!(!out.exists());
    let error = call("e2fsck").args(["-fn", "-b", "7"]).disk(&place).run(&never()).await.unwrap_err();
    assert!(error.to_string().contains(place.to_str().unwrap()), "{error}");
    // A script is read from the working directory.
    std::fs::write(directory.path().join("script"), "write other copy\n").unwrap();
    for file in [directory.path(), &directory.path().join("script")] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let script = call("debugfs").args(["-w", "-f", "script"]).disk(&place).directory(directory.path());
    script.run(&never()).await.unwrap();
    let (_, copy) =
        call("debugfs").args(["-R", "cat copy"]).disk_to_read(&place).output(100, &never()).await.unwrap();
    assert_eq!(copy, b"another file");
}

#[tokio::test]
async fn links_and_devices_are_no_disks() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    for path in [&link, Path::new("/dev/null"), directory.path()] {
        let error =
            Tool::find("e2fsck").unwrap().call().arg("-fn").disk(path).run(&never()).await.unwrap_err();
        assert!(matches!(error, ProgramError::Confine { .. }), "{error}");
    }
}
