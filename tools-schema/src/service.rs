//! Services: commands that a VM starts by itself at each boot. Each is a file `/etc/nexus/services.d/NAME.json` of the image that contains a
//! [`Service`]. The agent starts them before the VM is ready, if Nexus's own init is PID 1.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The default timeout for a service to become ready, in seconds.
pub const READY_DEFAULT_S: u32 = 15;
/// The maximum timeout for a service to become ready, in seconds; the VM is not ready before.
pub const READY_MAX_S: u32 = 40;

/// A command that runs as long as its VM does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// A line for `sh -c`; or give argv.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// The program and its arguments, without a shell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// Where it starts (default: as for commands).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Environment variables besides the VM's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// As whom it runs (default root).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// When it is started again (default on_failure).
    #[serde(default, skip_serializing_if = "is_default")]
    pub restart: Restart,
    /// When it is ready: the VM waits for that, and is ready all the same if it takes too long (default: once it is started).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<ReadyCheck>,
}

fn is_default(restart: &Restart) -> bool {
    *restart == Restart::default()
}

/// When an ended service is restarted. After a signal by `command_signal` it stays stopped until the next boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// However it ended.
    Always,
    /// If it was ended by a signal, or with a non-zero status.
    #[default]
    OnFailure,
    /// Never.
    No,
}

/// How to detect that a service is ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadyCheck {
    /// Something listens on this TCP port of the VM's loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
    /// This line of `sh -c` ends with status 0, run as the service's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// How long it may take, in seconds (default 15, at most 40).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 40))]
    pub timeout_s: Option<u32>,
}

impl Service {
    /// Checks it; the error is a message.
    pub fn check(&self) -> Result<(), String> {
        match (&self.command, &self.argv) {
            (None, None) => return Err("it has neither command nor argv".to_owned()),
            (Some(_), Some(_)) => return Err("it has both command and argv: give only one".to_owned()),
            (Some(command), None) if command.trim().is_empty() => {
                return Err("its command is empty".to_owned());
            }
            (None, Some(argv)) if argv.first().is_none_or(String::is_empty) => {
                return Err("its argv has no program".to_owned());
            }
            (Some(_), None) | (None, Some(_)) => {}
        }
        if self.cwd.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
            return Err("its cwd is not an absolute path".to_owned());
        }
        let Some(ready) = &self.ready else { return Ok(()) };
        match (ready.port, &ready.command) {
            (Some(0), _) => Err("its ready check has the port 0".to_owned()),
            (Some(_), None) | (None, Some(_)) => match ready.timeout_s {
                Some(0) => Err("its ready check has a timeout of 0".to_owned()),
                Some(seconds) if seconds > READY_MAX_S => {
                    Err(format!("its ready check takes up to {seconds} s, more than {READY_MAX_S}"))
                }
                Some(_) | None => Ok(()),
            },
            (None, None) => Err("its ready check has neither port nor command".to_owned()),
            (Some(_), Some(_)) => Err("its ready check has both port and command: give only one".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_and_checked() {
        let read = |text: &str| match serde_json::from_str::<Service>(text) {
            Ok(service) => service.check().map(|()| service),
            Err(error) => Err(error.to_string()),
        };
        let whole = read(
            r#"{"argv":["nginx","-g","daemon off;"],"user":"www-data","cwd":"/srv","env":{"A":"1"},"restart":"always",
                "ready":{"port":80,"timeout_s":5}}"#,
        )
        .unwrap();
        assert_eq!((whole.restart, whole.ready.unwrap().port), (Restart::Always, Some(80)));
        assert_eq!(read(r#"{"command":"x"}"#).unwrap().restart, Restart::OnFailure);
        for (text, words) in [
            ("{}", "neither command nor argv"),
            (r#"{"command":"x","argv":["x"]}"#, "command and argv"),
            (r#"{"command":" "}"#, "is empty"),
            (r#"{"argv":[]}"#, "has no program"),
            (r#"{"command":"x","cwd":"srv"}"#, "absolute"),
            (r#"{"command":"x","ready":{}}"#, "neither port nor command"),
            (r#"{"command":"x","ready":{"port":1,"command":"y"}}"#, "port and command"),
            (r#"{"command":"x","ready":{"port":0}}"#, "port 0"),
            (r#"{"command":"x","ready":{"port":1,"timeout_s":0}}"#, "a timeout of 0"),
            (r#"{"command":"x","ready":{"port":1,"timeout_s":60}}"#, "more than 40"),
            (r#"{"command":"x","restart":"sometimes"}"#, "unknown variant"),
            (r#"{"command":"x","runs":true}"#, "unknown field"),
        ] {
            assert!(read(text).unwrap_err().contains(words), "{text}");
        }
    }
}
