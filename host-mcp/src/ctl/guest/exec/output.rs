//! Prints the output of a command in a VM as it arrives, and reports how the command ended.

use std::net::IpAddr;

use data_encoding::BASE64;
use nexus_schema::tools::command::{RefusedConnection, RunCommandOutput, StreamFacts};
use serde_json::{Value, json};

use crate::ctl::App;
use crate::ctl::client::raw;
use crate::ctl::error::Error;
use crate::ctl::format;

/// The maximum number of refused destinations that are shown.
const REFUSED_MAX: usize = 5;
/// The exit code of a command that timed out.
const TIMED_OUT: u8 = 124;

/// One of a command's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ctl::guest) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(in crate::ctl::guest) const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// Its name in results.
    pub(in crate::ctl::guest) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Passes output on byte for byte; with `--json` collects it.
pub(super) struct Output<'a> {
    app: &'a App,
    vm: String,
    timeout_s: u32,
    kept: [Vec<u8>; 2],
}

impl<'a> Output<'a> {
    pub(super) fn new(app: &'a App, vm: String, timeout_s: u32) -> Self {
        Self { app, vm, timeout_s, kept: [Vec::new(), Vec::new()] }
    }

    /// Handles the next piece of output.
    pub(super) fn piece(&mut self, stream: Stream, bytes: &[u8]) -> Result<(), Error> {
        match stream {
            _ if self.app.ui.is_json() => self.kept[stream as usize].extend(bytes),
            Stream::Stdout => self.app.ui.bytes(bytes)?,
            Stream::Stderr => self.app.ui.error_bytes(bytes)?,
        }
        Ok(())
    }

    /// Reports how it ended, and returns the exit code. Incomplete output is a failure, however the command itself ended.
    pub(super) fn end(self, facts: &RunCommandOutput) -> Result<u8, Error> {
        let ui = &self.app.ui;
        if ui.is_json() {
            let [stdout, stderr] = &self.kept;
            ui.json(&raw(&as_json(facts, stdout, stderr))?)?;
        }
        // In JSON the result contains it.
        if !facts.oom_killed.is_empty() && !ui.is_json() {
            let who = facts.oom_killed.join(", ");
            ui.warn(&format!("the VM ran out of memory, and the kernel killed {who}; results may be wrong"));
        }
        if !ui.is_json() {
            facts.cause.iter().for_each(|cause| ui.warn(cause.explained()));
            refused(facts, &self.vm).iter().for_each(|line| ui.warn(line));
        }
        if facts.timed_out && !ui.is_json() {
            ui.warn(&format!("the command was killed after {} s", self.timeout_s));
        }
        let code = exit_code(facts);
        match incomplete(facts) {
            Some(what) => Err(Error::Incomplete { what, code, vm: self.vm }),
            None => Ok(code),
        }
    }
}

/// The connections that the policy refused while it ran, one per line.
fn refused(facts: &RunCommandOutput, vm: &str) -> Vec<String> {
    let mut places: Vec<RefusedConnection> = Vec::new();
    // The text comes from a guest: anything that is not a host name is hidden.
    let is_host = |host: &str| host.parse::<IpAddr>().is_ok() || nexus_schema::network::name(host).is_ok();
    for one in facts.network_denied.iter().filter(|one| is_host(&one.host)) {
        let is_same = |place: &RefusedConnection| (&place.host, place.port) == (&one.host, one.port);
        match places.iter().position(is_same) {
            Some(at) => places[at].count = places[at].count.saturating_add(one.count),
            None if places.len() < REFUSED_MAX => places.push(one.clone()),
            None => {}
        }
    }
    let line = |RefusedConnection { host, port, reason, count }: RefusedConnection| {
        let times = if count > 1 { format!(" {count} times") } else { String::new() };
        let why = reason.words();
        format!(
            "{host}:{port} was refused{times} by policy ({why}); `nexusctl vm inspect {vm}` shows it, `vm update --allow` changes it"
        )
    };
    places.into_iter().map(line).collect()
}

/// Describes which output is missing.
fn incomplete(facts: &RunCommandOutput) -> Option<String> {
    let missing = |(stream, facts): (Stream, StreamFacts)| {
        (facts.omitted_bytes > 0).then(|| {
            let (omitted, total) = (format::size(facts.omitted_bytes), format::size(facts.total_bytes));
            format!("{omitted} of {total} of {} were omitted from the middle", stream.name())
        })
    };
    let streams = Stream::ALL.into_iter().zip([facts.stdout, facts.stderr]);
    let said: Vec<String> = streams.filter_map(missing).collect();
    (!said.is_empty()).then(|| said.join("; "))
}

/// The result with its output: as text if possible, else as base64.
fn as_json(facts: &RunCommandOutput, stdout: &[u8], stderr: &[u8]) -> Value {
    let mut value = json!(facts);
    for (stream, bytes) in Stream::ALL.into_iter().zip([stdout, stderr]) {
        match std::str::from_utf8(bytes) {
            Ok(text) => value[stream.name()]["text"] = text.into(),
            Err(_) => value[stream.name()]["base64"] = BASE64.encode(bytes).into(),
        }
    }
    value
}

/// The exit code as in a shell.
fn exit_code(facts: &RunCommandOutput) -> u8 {
    if facts.timed_out {
        return TIMED_OUT;
    }
    match (facts.exit_code, facts.signal.as_deref()) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        (None, Some(signal)) => signal_number(signal).map_or(u8::MAX, |number| number.saturating_add(128)),
        (None, None) => u8::MAX,
    }
}

/// The number of a signal by its name (Linux, x86_64 and aarch64), or of a signal without a name, such as `SIG34`.
fn signal_number(name: &str) -> Option<u8> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let name = name.strip_prefix("SIG").unwrap_or(name);
    let named = NAMES.iter().position(|known| *known == name).and_then(|at| u8::try_from(at + 1).ok());
    named.or_else(|| name.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(exit_code: Option<i32>, signal: Option<&str>, timed_out: bool) -> RunCommandOutput {
        RunCommandOutput {
            exit_code,
            signal: signal.map(str::to_owned),
            timed_out,
            duration_ms: 1,
            stdout: StreamFacts::default(),
            stderr: StreamFacts::default(),
            ..RunCommandOutput::default()
        }
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(exit_code(&ended(Some(0), None, false)), 0);
        assert_eq!(exit_code(&ended(Some(42), None, false)), 42);
        assert_eq!(exit_code(&ended(None, Some("SIGKILL"), false)), 137);
        assert_eq!(exit_code(&ended(None, Some("SIGTERM"), false)), 143);
        assert_eq!(exit_code(&ended(None, Some("SIG34"), false)), 162);
        assert_eq!(exit_code(&ended(None, Some("SIGNONSENSE"), false)), 255);
        assert_eq!(exit_code(&ended(None, Some("SIGKILL"), true)), 124);
    }

    #[test]
    fn json_holds_text_or_base64() {
        let value = as_json(&ended(Some(0), None, false), b"hello\n", &[0xff, 0x00]);
        assert_eq!(value["stdout"]["text"], "hello\n");
        assert_eq!(value["stderr"]["base64"], "/wA=");
        assert_eq!(value["exit_code"], 0);
    }

    #[test]
    fn refused_connections_are_told_once_a_place() {
        let one = |port, count| RefusedConnection {
            host: "10.0.0.1".into(),
            port,
            reason: nexus_schema::network::DenyReason::Private,
            count,
        };
        let mut facts = ended(Some(1), None, false);
        facts.network_denied = vec![one(80, 1), one(443, 1), one(80, 2)];
        let lines = refused(&facts, "web");
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("10.0.0.1:80 was refused 3 times by policy (an address of a private"));
        facts.network_denied = vec![RefusedConnection { host: "all is well; curl".into(), ..one(80, 1) }];
        assert!(refused(&facts, "web").is_empty());
        facts.network_denied = (1..=50).map(|port| one(port, 1)).collect();
        assert_eq!(refused(&facts, "web").len(), REFUSED_MAX);
    }

    #[test]
    fn what_is_missing_is_told_of_both_streams() {
        let mut facts = ended(Some(0), None, false);
        assert_eq!(incomplete(&facts), None);
        facts.stdout = StreamFacts { total_bytes: 3 << 20, omitted_bytes: 2 << 20, ..StreamFacts::default() };
        facts.stderr = StreamFacts { total_bytes: 4096, omitted_bytes: 1024, ..StreamFacts::default() };
        assert_eq!(
            incomplete(&facts).unwrap(),
            "2 MiB of 3 MiB of stdout were omitted from the middle; 1 KiB of 4 KiB of stderr were omitted from the middle"
        );
    }
}
