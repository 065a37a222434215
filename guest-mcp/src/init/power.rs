//! `poweroff`, `reboot`, `halt` and `shutdown`, for images whose own programs do not support this PID 1.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nexus_schema::link::ByeReason;
use rustix::process::{Pid, Signal, kill_process};

use crate::commands::descriptors_of_commands;
use crate::console::say;
use crate::os::{read_small, reason};
use crate::sys;

/// Where the wrapper records the request, for the bye message in init mode `system`.
pub(crate) const NOTE: &str = "/run/nexus/going-down";
/// Where the image's own programs are.
const DIRECTORIES: [&str; 4] = ["/sbin", "/usr/sbin", "/bin", "/usr/bin"];

/// Runs the program `name` with `arguments`.
pub(crate) fn run(name: &str, arguments: &[String]) -> ExitCode {
    let reason = match asked(name, arguments) {
        Ok(reason) => reason,
        Err(problem) => {
            say(format_args!("{name}: {problem}"));
            return ExitCode::from(2);
        }
    };
    if read_small("/proc/1/comm", 64).is_none_or(|comm| comm.trim() != "nexus-guest") {
        return run_images_own(name, arguments, reason);
    }
    let signal = match reason {
        ByeReason::Poweroff => Signal::USR2,
        ByeReason::Reboot => Signal::TERM,
    };
    match kill_process(Pid::INIT, signal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("{name}: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Returns whether to power off or to reboot.
fn asked(name: &str, arguments: &[String]) -> Result<ByeReason, String> {
    let mut reason = if name == "reboot" { ByeReason::Reboot } else { ByeReason::Poweroff };
    for argument in arguments {
        match argument.as_str() {
            "-r" | "--reboot" => reason = ByeReason::Reboot,
            "-p" | "-P" | "-h" | "-H" | "--poweroff" | "--halt" => reason = ByeReason::Poweroff,
            // It is always the same kind of shutdown: immediate, orderly, without questions.
            "-f" | "--force" | "-ff" | "-n" | "-w" | "-d" | "-i" | "-q" | "--no-wall" | "now" | "+0" => {}
            "-c" => return Err("there is nothing to cancel".into()),
            when if name == "shutdown" && when.starts_with(['+', '0', '1', '2']) => {
                return Err("`now` is the only supported time".into());
            }
            other if other.starts_with('-') => return Err(format!("unknown option {other}")),
            // The message of shutdown for users.
            _ => {}
        }
    }
    Ok(reason)
}

fn run_images_own(name: &str, arguments: &[String], why: ByeReason) -> ExitCode {
    let word = match why {
        ByeReason::Poweroff => "poweroff",
        ByeReason::Reboot => "reboot",
    };
    // Only root can; for other users the image's program reports the error.
    let _ = std::fs::write(NOTE, word);
    for directory in DIRECTORIES {
        let program = Path::new(directory).join(name);
        if program.exists() {
            let error = Command::new(&program).args(arguments).exec();
            say(format_args!("{}: {}", program.display(), reason(&error)));
            return ExitCode::FAILURE;
        }
    }
    say(format_args!("{name}: this image has no such program"));
    ExitCode::FAILURE
}

/// Lets the image's own init restart the machine, which ends the VM.
pub(crate) fn restart_through_image() -> bool {
    let program =
        DIRECTORIES.iter().map(|directory| Path::new(directory).join("reboot")).find(|path| path.exists());
    let started = program.map(|program| program_of_image(&program).status());
    matches!(started, Some(Ok(status)) if status.success()) || kill_process(Pid::INIT, Signal::TERM).is_ok()
}

/// Returns a program of the image, with the limit of descriptors that commands have instead of the agent's own.
fn program_of_image(program: &Path) -> Command {
    let mut command = Command::new(program);
    sys::limit_descriptors(&mut command, descriptors_of_commands());
    command
}

/// Guesses the kind of shutdown if the image's own init only terminates the agent.
pub(crate) fn guess() -> ByeReason {
    let noted = read_small(NOTE, 16).is_some_and(|note| note.trim() == "reboot");
    // systemd turns into `systemd-shutdown reboot`.
    let command = read_small("/proc/1/cmdline", 4 << 10).unwrap_or_default();
    let said = command.split('\0').any(|word| matches!(word, "reboot" | "kexec"));
    if noted || said { ByeReason::Reboot } else { ByeReason::Poweroff }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::shown_descriptors;

    #[test]
    fn programs_of_the_image_have_the_limit_of_descriptors_that_commands_have() {
        let output = program_of_image(Path::new("/bin/sh")).args(["-c", "ulimit -Sn; ulimit -Hn"]).output();
        assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap(), shown_descriptors());
    }

    #[test]
    fn the_usual_ways_to_go_down() {
        let asked = |line: &str| {
            let mut words = line.split_whitespace().map(String::from);
            let name = words.next().unwrap();
            asked(&name, &words.collect::<Vec<_>>()).ok()
        };
        for line in [
            "poweroff",
            "poweroff -f",
            "halt",
            "shutdown -h now",
            "shutdown -P +0",
            "shutdown now bye",
            "reboot -p",
        ] {
            assert_eq!(asked(line), Some(ByeReason::Poweroff), "{line}");
        }
        for line in ["reboot", "reboot -f", "shutdown -r now", "halt --reboot"] {
            assert_eq!(asked(line), Some(ByeReason::Reboot), "{line}");
        }
        for line in ["shutdown -c", "shutdown +5", "shutdown 23:00", "reboot --what"] {
            assert_eq!(asked(line), None, "{line}");
        }
    }
}
