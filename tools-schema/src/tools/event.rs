//! Events: what happened, for whoever waits for it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, CommandId, OpId, VmId, VmKind};
use crate::name::{Name, Reference};
use crate::time::Timestamp;
use crate::tool::{Effect, Tool};

/// The kind of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A VM was created or deleted, changed its state, or something was noted in its history.
    Vm,
    /// An operation began or ended.
    Op,
    /// A command ended that no call was waiting for.
    Command,
    /// A connection of a VM was refused by policy.
    Denied,
    /// Disk or memory became scarce, or is no longer.
    Pressure,
    /// The daemon started or stopped.
    Daemon,
    /// Events of a VM were dropped because there were too many.
    Dropped,
}

impl EventKind {
    /// All kinds.
    pub const ALL: [Self; 7] =
        [Self::Vm, Self::Op, Self::Command, Self::Denied, Self::Pressure, Self::Daemon, Self::Dropped];

    /// The kind as it is on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Op => "op",
            Self::Command => "command",
            Self::Denied => "denied",
            Self::Pressure => "pressure",
            Self::Daemon => "daemon",
            Self::Dropped => "dropped",
        }
    }
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A word that is not a kind of event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown kind `{word}`; valid: vm, op, command, denied, pressure, daemon, dropped")]
pub struct UnknownEventKind {
    word: String,
}

impl std::str::FromStr for EventKind {
    type Err = UnknownEventKind;

    fn from_str(word: &str) -> Result<Self, UnknownEventKind> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == word);
        known.ok_or_else(|| UnknownEventKind { word: word.chars().take(40).collect() })
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Its number: later events have higher ones, also after a restart of the daemon.
    pub seq: u64,
    /// When it happened.
    pub at: Timestamp,
    /// What kind of thing happened.
    pub kind: EventKind,
    /// The VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// The VM's name at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_name: Option<Name>,
    /// The VM's boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// The new state: of a VM (`deleted` at its end), of an operation, `ended` for a command, `low` or `enough` for pressure, `started`
    /// or `stopped` for the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// The VM's state before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op_id: Option<OpId>,
    /// The tool that began the operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// The code of the operation's error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<CommandId>,
    /// The command's exit status, as a shell reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u8>,
    /// How many events were dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<u64>,
    /// What happened, in a line.
    pub text: String,
}

impl Event {
    /// An event without details; its number and time are set when it is added.
    pub fn new(kind: EventKind, text: impl Into<String>) -> Self {
        Self {
            seq: 0,
            at: Timestamp::from_millis(0),
            kind,
            vm: None,
            vm_name: None,
            boot_id: None,
            state: None,
            from: None,
            op_id: None,
            tool: None,
            error: None,
            command_id: None,
            status: None,
            dropped: None,
            text: text.into(),
        }
    }
}

/// Waits for events.
pub enum EventsWait {}

/// Arguments of `events_wait`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventsWaitParams {
    /// Only events after this point: `cursor` of an earlier reply. Without it, the newest events that are kept, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Only events of this VM; the id of a deleted one, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Reference<VmKind>>,
    /// Only events of these kinds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<EventKind>,
    /// With cursor: how long to wait for an event if there is none, in seconds (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 45))]
    pub wait_s: Option<u32>,
    /// How many events at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
}

/// Result of `events_wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventsWaitOutput {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// Where the next call goes on. It stays valid when the daemon restarts.
    pub cursor: String,
    /// Whether there are more events already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Why events after the given cursor are missing, if some are or may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<String>,
}

impl Tool for EventsWait {
    const NAME: &'static str = "events_wait";
    const TITLE: &'static str = "Wait for events";
    const DESCRIPTION: &'static str = "Returns events, and waits if there are none yet: changes of VMs' states, operations that begin or end, commands \
        that end in the background, connections that policy refused, and scarce disk or memory; use it instead of polling. Call it once \
        without `cursor` for the newest events and a cursor, then again and again with the cursor of the last reply.";
    const EFFECT: Effect = Effect::ReadOnly;
    type Params = EventsWaitParams;
    type Output = EventsWaitOutput;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_the_same_words_everywhere() {
        for kind in EventKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        assert!(
            "vms".parse::<EventKind>().unwrap_err().to_string().contains("unknown kind `vms`; valid: vm, op")
        );
    }
}
