//! The state of the image's own init while it starts the system. Only systemd and OpenRC can be asked.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nexus_schema::tools::os::{SystemState, SystemStatus};
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::commands::{PATH, descriptors_of_commands};
use crate::os::read_small;
use crate::sys;

/// Timeout of systemd's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The interval of checks while an init is starting.
const STEP: Duration = Duration::from_millis(500);
/// The maximum number of failed units that are reported.
const FAILED_MAX: usize = 32;
/// The maximum length of a unit's name, in characters.
const NAME_MAX: usize = 200;
/// The directory of OpenRC's state.
const OPENRC: &str = "/run/openrc";

/// The supported inits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Systemd,
    OpenRc,
    Other,
}

impl Init {
    fn running() -> Self {
        let program = std::fs::read_link("/proc/1/exe").unwrap_or_default();
        if program.file_name().is_some_and(|name| name == "systemd") {
            Self::Systemd
        } else if Path::new("/sbin/openrc").exists() {
            Self::OpenRc
        } else {
            Self::Other
        }
    }
}

/// Returns the state of the init.
pub(crate) async fn status() -> SystemStatus {
    match Init::running() {
        Init::Systemd => systemd(false, ANSWER_TIMEOUT).await,
        Init::OpenRc => openrc(),
        Init::Other => SystemStatus { state: SystemState::Unknown, failed: Vec::new() },
    }
}

/// Waits until the init has started the system, at most for `most`; returns its state then.
pub(crate) async fn wait(most: Duration) -> SystemStatus {
    let deadline = Instant::now() + most;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let status = match Init::running() {
            Init::Systemd if !left.is_zero() => systemd(true, left).await,
            _ => status().await,
        };
        if status.state != SystemState::Starting || left.is_zero() {
            return status;
        }
        sleep(STEP.min(left)).await;
    }
}

/// Asks systemd; with `wait`, systemd answers once everything has started.
async fn systemd(wait: bool, most: Duration) -> SystemStatus {
    let arguments: &[&str] = if wait { &["is-system-running", "--wait"] } else { &["is-system-running"] };
    let said = systemctl(arguments, most).await.unwrap_or_default();
    let state = systemd_state(&said);
    let failed = match state {
        SystemState::Degraded => {
            let list = ["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager", "--full"];
            first_words(&systemctl(&list, ANSWER_TIMEOUT).await.unwrap_or_default())
        }
        _ => Vec::new(),
    };
    SystemStatus { state, failed }
}

async fn systemctl(arguments: &[&str], most: Duration) -> Option<String> {
    let mut command = Command::new("systemctl");
    command.args(arguments).env_clear().env("PATH", PATH).env("LANG", "C.UTF-8");
    command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    sys::limit_descriptors(command.as_std_mut(), descriptors_of_commands());
    let output = timeout(most, command.output()).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Parses the states of systemctl(1). If systemd is not running yet, it prints `offline`, or nothing.
fn systemd_state(said: &str) -> SystemState {
    match said.trim() {
        "running" => SystemState::Running,
        "degraded" | "maintenance" => SystemState::Degraded,
        "stopping" => SystemState::Stopping,
        _ => SystemState::Starting,
    }
}

fn first_words(list: &str) -> Vec<String> {
    let words = list.lines().filter_map(|line| line.split_whitespace().next());
    words.take(FAILED_MAX).map(|word| word.chars().take(NAME_MAX).collect()).collect()
}

/// Reads OpenRC's state: the current run level, whether it is being entered, and links to failed services.
fn openrc() -> SystemStatus {
    let keeps = Path::new(OPENRC);
    let level = read_small(keeps.join("softlevel"), 64).unwrap_or_default();
    let failed = std::fs::read_dir(keeps.join("failed")).into_iter().flatten().flatten();
    let failed = failed.map(|entry| entry.file_name().to_string_lossy().chars().take(NAME_MAX).collect());
    let mut failed: Vec<String> = failed.take(FAILED_MAX).collect();
    failed.sort_unstable();
    let state = match level.trim() {
        "shutdown" | "reboot" => SystemState::Stopping,
        "" | "sysinit" | "boot" => SystemState::Starting,
        _ if keeps.join("rc.starting").exists() => SystemState::Starting,
        _ if !failed.is_empty() => SystemState::Degraded,
        _ => SystemState::Running,
    };
    SystemStatus { state, failed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_systemd_are_states() {
        for (said, state) in [
            ("running\n", SystemState::Running),
            ("degraded\n", SystemState::Degraded),
            ("maintenance\n", SystemState::Degraded),
            ("initializing\n", SystemState::Starting),
            ("starting\n", SystemState::Starting),
            ("offline\n", SystemState::Starting),
            ("", SystemState::Starting),
            ("stopping\n", SystemState::Stopping),
        ] {
            assert_eq!(systemd_state(said), state, "{said:?}");
        }
    }

    #[test]
    fn failed_units_are_named() {
        let list = "kmod-static-nodes.service loaded failed failed Create List of Static Device Nodes\nx.mount loaded failed failed /x\n";
        assert_eq!(first_words(list), ["kmod-static-nodes.service", "x.mount"]);
        assert_eq!(first_words(&"u\n".repeat(100)).len(), FAILED_MAX);
    }
}
