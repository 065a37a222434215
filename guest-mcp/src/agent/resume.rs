//! Checkpoints from the guest's side: commands stand still while one is taken, and a restored guest renews what it shares with its parent before any of
//! its commands runs again.
//!
//! ```text
//! quiesce ─> frozen, synced ─┬─ thaw: the guest that goes on sets its clock ───────────────────────────────────────────────> commands run
//!                            └─ relinked: a restored guest says hello ─> random numbers ─> clock ─> addresses ─> token, hostname
//!                                 ─> machine id, boot id, SSH host keys ─> hooks ─> all of it worked ─> welcome ────────────> commands run
//! ```
//! A restored guest in which one of these steps failed says so, and its commands never run. A guest that hears nothing after it was quiesced cannot know
//! whether it was restored. So it says hello: only a host that knows this boot, or after a restore one that saw what was renewed, welcomes it, and only
//! then its commands run. If there is no daemon, the shim of a guest that was not restored lets them go on, by what only that shim knows ([`lease`](super::lease)).

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use data_encoding::BASE64;
use nexus_schema::link::{Configure, GuestProcess, QUIET_MAX, Quiesced, Resume, ResumeKind, Resumed};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{Agent, Place, clock, configure, hello, network};
use crate::commands::{descriptors_of_commands, freeze};
use crate::console::say;
use crate::os::{read_small, reason};
use crate::sys;

/// Timeout for all filesystems to be synced before a checkpoint.
const SYNC_MAX: Duration = Duration::from_secs(2);
/// Timeout for the processes to be listed.
const LIST_MAX: Duration = Duration::from_secs(1);
/// The turns of both: a disk may hang, and a process can make whoever reads its command line wait.
static SYNCING: Semaphore = Semaphore::const_new(1);
static LISTING: Semaphore = Semaphore::const_new(1);
/// Timeout of new SSH host keys, and of all hooks together.
const PROGRAM_MAX: Duration = Duration::from_secs(10);
/// The image's hooks: programs that renew what only they know of.
const HOOKS: &str = "/etc/nexus/fork.d";
/// The id of the machine, and the copy that D-Bus has.
const MACHINE_ID: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];
/// The kernel's id of its boot, and the file that covers it in a fork.
const BOOT_ID: [&str; 2] = ["/proc/sys/kernel/random/boot_id", "/run/nexus/boot_id"];
/// The directory of SSH host keys.
const SSH: &str = "/etc/ssh";
/// What these are called in a contract.
const SSH_KEYS: &str = "SSH host keys";
/// What of the rest of the configuration must have worked in a restored guest: the beginnings of its problems.
const NEEDED: [&str; 4] = ["keep the token", "set the clock", "set the hostname", "bring up the interface"];

/// The time for which commands stand still before the host is asked whether they may go on.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    lease: Mutex<Option<AbortOnDropHandle<()>>>,
    /// The nonce of the restore that this guest goes on after.
    nonce: Mutex<Option<String>>,
    /// What the host's shim said before this guest was held, which only that shim says again.
    promised: Mutex<Option<String>>,
}

impl Quiet {
    fn set(&self, lease: Option<AbortOnDropHandle<()>>) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    /// Takes up what the host's shim says before this guest is held; `None` forgets it.
    pub(super) fn promise(&self, secret: Option<String>) {
        *self.promised.lock().unwrap_or_else(PoisonError::into_inner) = secret;
    }

    /// Returns whether the host's shim has said this.
    pub(super) fn is_promised(&self, secret: &str) -> bool {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner).as_deref() == Some(secret)
    }

    /// Returns whether commands stand still for a checkpoint.
    pub(super) fn is_on(&self) -> bool {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Returns the nonce of the restore that this guest goes on after, if it was restored.
    pub(super) fn nonce(&self) -> Option<String> {
        self.nonce.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Stops commands and syncs filesystems for a checkpoint.
pub(super) async fn quiesce(agent: &Arc<Agent>) -> Quiesced {
    let Place::Vm { init } = agent.place else { return Quiesced::default() };
    // What was said for an earlier checkpoint ends none of this one.
    agent.quiet.promise(None);
    let waiting = agent.clone();
    agent.quiet.set(Some(AbortOnDropHandle::new(tokio::spawn(async move {
        tokio::time::sleep(QUIET_MAX).await;
        say(format_args!("the host did not end its checkpoint: asking whether commands may go on"));
        // A welcome lets them go on, and ends this task.
        hello::until_welcome(waiting).await;
    }))));
    let frozen = freeze::freeze(init).await.unwrap_or_else(|error| {
        say(format_args!("stop commands for a checkpoint: {error}"));
        false
    });
    let synced = one_at_a_time(&SYNCING, rustix::fs::sync, SYNC_MAX).await.is_some();
    Quiesced { frozen, synced, processes: processes().await }
}

/// The processes of this VM; none if they cannot be listed in time.
pub(super) async fn processes() -> Vec<GuestProcess> {
    one_at_a_time(&LISTING, super::processes::list, LIST_MAX).await.unwrap_or_default()
}

/// Runs `work` on the thread pool; `None` if it does not get its turn within `within`, or then takes longer than that. Work that hangs keeps its turn: it
/// holds one thread, however often it is asked for.
async fn one_at_a_time<T: Send + 'static>(
    turn: &'static Semaphore,
    work: impl FnOnce() -> T + Send + 'static,
    within: Duration,
) -> Option<T> {
    let turn = tokio::time::timeout(within, turn.acquire()).await.ok()?.ok()?;
    let work = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    tokio::time::timeout(within, work).await.ok()?.ok()
}

/// Lets commands go on, if they stand still.
pub(super) fn thaw(agent: &Arc<Agent>) -> io::Result<()> {
    agent.quiet.set(None);
    agent.quiet.promise(None);
    let Place::Vm { init } = agent.place else { return Ok(()) };
    if freeze::is_quiet() { freeze::thaw(init) } else { Ok(()) }
}

/// Goes on in a restored guest, whose link is made anew: only what it renews lets its commands run from here on.
pub(super) fn relinked(agent: &Arc<Agent>, nonce: String) {
    agent.quiet.set(None);
    agent.quiet.promise(None);
    *agent.quiet.nonce.lock().unwrap_or_else(PoisonError::into_inner) = Some(nonce);
    tokio::spawn(hello::until_welcome(agent.clone()));
}

/// Renews what everything else depends on: random numbers, the clock and hardware addresses.
pub(super) async fn begin(agent: &Agent, resume: &Resume, configure: &Configure) -> Resumed {
    if !agent.is_in_vm() {
        let failed = vec!["this guest is a process of the host".into()];
        return Resumed { failed, ..Resumed::default() };
    }
    let (resume, interfaces, time) =
        (resume.clone(), configure.interfaces.clone(), Duration::from_nanos(configure.time_unix_ns));
    blocking(Resumed::default(), move |mut steps| {
        steps.note("kernel random numbers", reseed(&resume.entropy_base64));
        let now = clock::now();
        let behind = i64::try_from(time.abs_diff(now).as_millis()).unwrap_or(i64::MAX);
        steps.0.clock_behind_ms = if time >= now { behind } else { behind.saturating_neg() };
        steps.note("clock", clock::set(time));
        for interface in &interfaces {
            steps.note("network address", network::take_over(interface));
        }
        steps
    })
    .await
}

/// Renews the rest. Commands go on once the host has recorded that, which its welcome says: a daemon that ends before has the guest ended, and nothing
/// that ran in it would be left. `problems` are those of the configuration.
pub(super) async fn finish(resume: Resume, resumed: Resumed, problems: &[String]) -> Resumed {
    let needed = problems.iter().filter(|problem| NEEDED.iter().any(|start| problem.starts_with(start)));
    let failed: Vec<String> = needed.cloned().collect();
    let (kind, run_hooks) = (resume.kind, resume.run_hooks);
    let resumed = blocking(resumed, move |mut steps| {
        if failed.is_empty() && steps.0.failed.is_empty() {
            steps.0.renewed.extend(["hostname".to_owned(), "token".to_owned()]);
        }
        steps.0.failed.extend(failed);
        if let Some(id) = &resume.machine_id {
            steps.note("machine id", set_machine_id(id));
        }
        if matches!(resume.kind, ResumeKind::Fork | ResumeKind::Warm) {
            steps.note("kernel boot id", cover_boot_id());
        }
        steps
    })
    .await;
    let mut steps = Steps(resumed);
    if kind == ResumeKind::Fork && has_host_keys(Path::new(SSH)) {
        match renew_host_keys(Path::new(SSH), crate::commands::PATH).await {
            Ok(Renewal::Done) => steps.note(SSH_KEYS, Ok(())),
            Ok(Renewal::Not(why)) => steps.0.not_renewed.push(format!("{SSH_KEYS}: {why}")),
            Err(error) => steps.note(SSH_KEYS, Err(error)),
        }
    }
    if run_hooks && steps.0.failed.is_empty() {
        match hooks(Path::new(HOOKS), kind).await {
            Ok(0) => {}
            ran => steps.note("hooks of the image", ran.map(drop)),
        }
    }
    steps.0
}

/// The steps so far.
struct Steps(Resumed);

impl Steps {
    fn note(&mut self, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) if self.0.renewed.iter().any(|known| known == what) => {}
            Ok(()) => self.0.renewed.push(what.to_owned()),
            Err(error) => self.0.failed.push(format!("renew {what}: {}", reason(&error))),
        }
    }
}

async fn blocking(before: Resumed, work: impl FnOnce(Steps) -> Steps + Send + 'static) -> Resumed {
    match tokio::task::spawn_blocking(move || work(Steps(before)).0).await {
        Ok(resumed) => resumed,
        Err(_) => Resumed { failed: vec!["renewing crashed".into()], ..Resumed::default() },
    }
}

fn reseed(entropy_base64: &str) -> io::Result<()> {
    let bytes = BASE64.decode(entropy_base64.as_bytes()).map_err(io::Error::other)?;
    let seed = bytes.try_into().map_err(|_| io::Error::other("not 32 bytes"))?;
    Ok(sys::reseed(File::open("/dev/urandom")?, seed)?)
}

/// Writes the machine id where there is one, and where it belongs.
fn set_machine_id(id: &str) -> io::Result<()> {
    let text = format!("{id}\n");
    for (index, path) in MACHINE_ID.iter().enumerate() {
        let is_file = std::fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
        if is_file || index == 0 {
            configure::replace(path, text.as_bytes(), 0o444)?;
        }
    }
    Ok(())
}

/// Covers the kernel's id of its boot, which no kernel changes, with another one.
fn cover_boot_id() -> io::Result<()> {
    let [kernel, cover] = BOOT_ID;
    let Some(fresh) = read_small("/proc/sys/kernel/random/uuid", 64) else {
        return Err(io::Error::other("the kernel gives no uuid"));
    };
    // A fork of a fork has one already. Nothing can be laid on that one once its file is replaced.
    match rustix::mount::unmount(kernel, rustix::mount::UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    configure::replace(cover, fresh.as_bytes(), 0o444)?;
    Ok(rustix::mount::mount_bind(cover, kernel)?)
}

fn host_keys(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_key = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("ssh_host_") && (name.ends_with("_key") || name.ends_with("_key.pub"))
    };
    entries.map(|entry| entry.path()).filter(is_key).collect()
}

fn has_host_keys(directory: &Path) -> bool {
    !host_keys(directory).is_empty()
}

/// What became of something that is to be renewed.
#[derive(Debug, PartialEq, Eq)]
enum Renewal {
    /// It is new.
    Done,
    /// It is not, for this reason.
    Not(&'static str),
}

/// Removes the host keys and makes new ones with the program `ssh-keygen` of a directory in `path`. Without that the old ones stay, because an SSH server
/// does not start without any.
async fn renew_host_keys(directory: &Path, path: &str) -> io::Result<Renewal> {
    let mut places = path.split(':').map(|place| Path::new(place).join("ssh-keygen"));
    let Some(program) = places.find(|program| program.is_file()) else {
        return Ok(Renewal::Not(
            "the image has no ssh-keygen, so they are those of the VM it was forked from",
        ));
    };
    for key in host_keys(directory) {
        std::fs::remove_file(key)?;
    }
    let mut program = Command::new(program);
    program.arg("-A");
    match run(program, Instant::now() + PROGRAM_MAX).await {
        Ok(()) => Ok(Renewal::Done),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Ok(Renewal::Not("the old ones are removed, and ssh-keygen still makes new ones"))
        }
        Err(error) => Err(error),
    }
}

/// Runs the executable files of a directory in the order of their names; returns how many there are.
async fn hooks(directory: &Path, kind: ResumeKind) -> io::Result<usize> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut hooks: Vec<PathBuf> = entries.collect::<io::Result<Vec<_>>>()?.iter().map(|e| e.path()).collect();
    hooks.retain(|hook| {
        std::fs::metadata(hook).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    });
    hooks.sort_unstable();
    let deadline = Instant::now() + PROGRAM_MAX;
    for hook in &hooks {
        let mut program = Command::new(hook);
        program.env("NEXUS_RESUME", kind.as_str());
        run(program, deadline).await.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {}", hook.display(), reason(&error)))
        })?;
    }
    Ok(hooks.len())
}

/// Runs a program until a deadline, with the limit of descriptors that commands have; one that takes longer is left running, and is an error.
async fn run(mut program: Command, deadline: Instant) -> io::Result<()> {
    program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    program.env("PATH", crate::commands::PATH);
    sys::limit_descriptors(program.as_std_mut(), descriptors_of_commands());
    let mut child = program.spawn()?;
    let status = tokio::time::timeout_at(deadline, child.wait()).await;
    let status = status.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::shown_descriptors;

    fn hook(directory: &Path, name: &str, text: &str, mode: u32) {
        let path = directory.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn hooks_run_in_order_and_a_failure_is_told_by_name() {
        let (own, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let said = out.path().join("said");
        assert_eq!(hooks(&own.path().join("none"), ResumeKind::Fork).await.unwrap(), 0);
        hook(own.path(), "20-b", &format!("echo b $NEXUS_RESUME >> {}", said.display()), 0o755);
        hook(own.path(), "10-a", &format!("echo a >> {}", said.display()), 0o755);
        hook(own.path(), "README", "exit 1", 0o644);
        assert_eq!(hooks(own.path(), ResumeKind::Rollback).await.unwrap(), 2);
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "a\nb rollback\n");
        hook(own.path(), "15-c", "exit 3", 0o755);
        let error = hooks(own.path(), ResumeKind::Fork).await.unwrap_err().to_string();
        assert!(error.contains("15-c") && error.contains('3'), "{error}");
        // Those after it did not run.
        assert_eq!(std::fs::read_to_string(&said).unwrap(), "a\nb rollback\na\n");
    }

    #[tokio::test]
    async fn hooks_have_the_limit_of_descriptors_that_commands_have() {
        let (own, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let said = out.path().join("said");
        hook(own.path(), "10-a", &format!("(ulimit -Sn; ulimit -Hn) > {}", said.display()), 0o755);
        assert_eq!(hooks(own.path(), ResumeKind::Fork).await.unwrap(), 1);
        assert_eq!(std::fs::read_to_string(&said).unwrap(), shown_descriptors());
    }

    #[tokio::test]
    async fn host_keys_are_renewed_only_if_there_is_a_program_for_that() {
        let (keys, programs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = keys.path().join("ssh_host_rsa_key");
        std::fs::write(&key, "old").unwrap();
        let path = format!("/nonexistent:{}", programs.path().display());
        let renewed = renew_host_keys(keys.path(), &path).await.unwrap();
        assert!(matches!(renewed, Renewal::Not(why) if why.contains("no ssh-keygen")));
        assert_eq!(std::fs::read_to_string(&key).unwrap(), "old");
        let make = format!("[ \"$1\" = -A ] && [ ! -e {0} ] && echo new > {0}", key.display());
        hook(programs.path(), "ssh-keygen", &make, 0o755);
        assert_eq!(renew_host_keys(keys.path(), &path).await.unwrap(), Renewal::Done);
        assert_eq!(std::fs::read_to_string(&key).unwrap(), "new\n");
        hook(programs.path(), "ssh-keygen", "exit 1", 0o755);
        renew_host_keys(keys.path(), &path).await.unwrap_err();
    }

    #[tokio::test]
    async fn work_that_hangs_takes_one_thread_only() {
        static TURN: Semaphore = Semaphore::const_new(1);
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let hanging = one_at_a_time(&TURN, move || ended.recv().is_ok(), Duration::from_millis(20));
        assert_eq!(hanging.await, None);
        let (told, hears) = std::sync::mpsc::channel();
        for _ in 0..20 {
            let told = told.clone();
            assert_eq!(
                one_at_a_time(&TURN, move || told.send(()).is_ok(), Duration::from_millis(1)).await,
                None
            );
        }
        end.send(()).unwrap();
        assert_eq!(one_at_a_time(&TURN, || 7, Duration::from_secs(60)).await, Some(7));
        assert!(hears.try_recv().is_err(), "nothing else has run");
    }

    /// On a busy machine each of both may take too long, so there are several tries.
    #[tokio::test]
    async fn the_wait_for_a_turn_leaves_work_all_its_time() {
        static TURN: Semaphore = Semaphore::const_new(1);
        let (within, most_of_it) = (Duration::from_millis(200), Duration::from_millis(150));
        let work = move || {
            let begun = std::time::Instant::now();
            while begun.elapsed() < most_of_it {
                std::thread::park_timeout(most_of_it.saturating_sub(begun.elapsed()));
            }
        };
        for _ in 0..20 {
            let other = TURN.acquire().await.unwrap();
            let waiting = tokio::spawn(one_at_a_time(&TURN, work, within));
            tokio::time::sleep(most_of_it).await;
            drop(other);
            if waiting.await.unwrap().is_some() {
                return;
            }
        }
        panic!("work that was in time is not waited for");
    }

    #[test]
    fn old_host_keys_are_gone() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!has_host_keys(directory.path()));
        for name in ["ssh_host_rsa_key", "ssh_host_rsa_key.pub", "sshd_config"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        assert!(has_host_keys(directory.path()));
        for key in host_keys(directory.path()) {
            std::fs::remove_file(key).unwrap();
        }
        assert!(!has_host_keys(directory.path()) && directory.path().join("sshd_config").exists());
    }

    #[test]
    fn a_failed_step_is_told_and_others_still_count() {
        let mut steps = Steps(Resumed::default());
        steps.note("clock", Ok(()));
        steps.note("clock", Ok(()));
        steps.note("machine id", Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(steps.0.renewed, ["clock"]);
        assert_eq!(steps.0.failed.len(), 1);
        assert!(steps.0.failed[0].starts_with("renew machine id: "), "{:?}", steps.0.failed);
        assert!(reseed("AAAA").is_err() && reseed("?").is_err());
    }
}
