//! The one forwarder of every guest tool: arguments and results pass raw, nothing is decoded.
//!
//! What it does to a call on its way: `vm` is taken out of the arguments and names the guest; the id and the progress token
//! are replaced by those of the link. On the way back: `_meta["dev.nexus/vm"]` says which VM and boot answered. The caps of
//! the link hold, and a guest cannot say anything in the host's name.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nexus_core::guest::wire::{Members, write_string};
use nexus_core::guest::{LinkError, wire};
use nexus_core::{CallRecord, Caller, GuestHandle};
use nexus_schema::error::{ERROR_META, VM_META};
use nexus_schema::id::{BootId, VmId, VmKind};
use nexus_schema::limits::{COMMAND_TIMEOUT_DEFAULT, COMMAND_TIMEOUT_MAX};
use nexus_schema::tool::{Tool, VM_ARGUMENT};
use nexus_schema::tools::command::RunCommand;
use nexus_schema::{Name, Reference, Timestamp, ToolError};
use serde_json::value::RawValue;

use crate::host::{Host, View};

/// How much longer than the guest itself the host waits for a command.
const SLACK: Duration = Duration::from_secs(10);
/// How long a guest has for anything but a command.
const DEADLINE: Duration = Duration::from_secs(60);

/// Which shape of MCP a reply has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// Up to 2025-11-25.
    Session,
    /// From 2026-07-28: results say what type they are.
    Stateless,
}

/// The arguments of a call, taken apart one level deep.
#[derive(Debug)]
pub(crate) struct Arguments<'a> {
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
    vm: Option<Reference<VmKind>>,
    timeout_s: Option<u64>,
}

impl<'a> Arguments<'a> {
    /// Takes arguments apart; those of the whole view name a VM, those of a VM's own view do not.
    pub(crate) fn parse(raw: Option<&'a RawValue>, view: View) -> Result<Self, ToolError> {
        let mut members = match raw {
            None => Vec::new(),
            Some(raw) => {
                Members::parse(raw).ok_or_else(|| ToolError::invalid("arguments must be an object"))?.0
            }
        };
        let timeout_s = members
            .iter()
            .find(|(key, _)| key == "timeout_s")
            .and_then(|(_, value)| value.get().parse().ok());
        let vm = match view {
            View::Vm(_) => None,
            View::Whole => {
                let mut named = members.iter().filter(|(key, _)| key == VM_ARGUMENT).map(|(_, value)| *value);
                let (first, second) = (named.next(), named.next());
                let Some(first) = first else {
                    return Err(ToolError::invalid("missing field `vm`: the VM to work in")
                        .hint("give its name or id; vm_list shows them"));
                };
                if second.is_some() {
                    return Err(ToolError::invalid("`vm` is given twice"));
                }
                let text: Cow<'_, str> = serde_json::from_str(first.get()).map_err(|_| {
                    ToolError::invalid("vm: must be a string")
                        .hint("give the VM's name or id; vm_list shows them")
                })?;
                let vm = text.parse().map_err(|e: nexus_schema::name::NameError| {
                    ToolError::invalid(format!("vm: {e}")).hint("vm_list shows the names and ids of all VMs")
                })?;
                members.retain(|(key, _)| key != VM_ARGUMENT);
                Some(vm)
            }
        };
        Ok(Self { members, vm, timeout_s })
    }

    /// Which VM is meant.
    pub(crate) fn vm(&self, view: View) -> Option<Reference<VmKind>> {
        match view {
            View::Vm(id) => Some(Reference::Id(id)),
            View::Whole => self.vm.clone(),
        }
    }

    /// Appends them as the guest gets them.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        for (at, (key, value)) in self.members.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            write_string(out, key);
            out.push(b':');
            out.extend_from_slice(value.get().as_bytes());
        }
        out.push(b'}');
    }

    /// How long the guest has for the call.
    pub(crate) fn deadline(&self, tool: &str) -> Duration {
        if tool != RunCommand::NAME {
            return DEADLINE;
        }
        let asked = self.timeout_s.map_or(COMMAND_TIMEOUT_DEFAULT, Duration::from_secs);
        asked.min(COMMAND_TIMEOUT_MAX) + SLACK
    }
}

/// Finds the guest that a call goes to.
pub(crate) fn find(
    host: &Host,
    caller: &Caller,
    view: View,
    arguments: &Arguments<'_>,
) -> Result<GuestHandle, ToolError> {
    let vm = arguments.vm(view).ok_or_else(|| ToolError::internal("a call without a VM"))?;
    host.guests().guest(caller, &vm)
}

/// Which VM and boot answer, as every reply says it.
#[derive(Debug)]
pub(crate) struct Origin {
    /// The VM's id.
    pub(crate) vm: VmId,
    /// The VM's name.
    pub(crate) name: Name,
    boot: BootId,
    meta: String,
}

impl Origin {
    pub(crate) fn of(guest: &GuestHandle) -> Self {
        // Ids and names need no escapes.
        let meta =
            format!(r#"{{"id":"{}","name":"{}","boot_id":"{}"}}"#, guest.vm, guest.name, guest.boot_id);
        Self { vm: guest.vm, name: guest.name.clone(), boot: guest.boot_id, meta }
    }

    /// Whether it is what [`Self::of`] would make of this guest.
    pub(crate) fn is_of(&self, guest: &GuestHandle) -> bool {
        (self.vm, self.boot, &self.name) == (guest.vm, guest.boot_id, &guest.name)
    }
}

/// Appends the result of a call: the guest's own with its origin, or an error. Returns how it ended, for the log.
pub(crate) fn write_outcome(
    out: &mut Vec<u8>,
    outcome: Result<&RawValue, LinkError>,
    origin: &Origin,
    era: Era,
) -> &'static str {
    let before = out.len();
    let error = match outcome {
        Ok(result) => match write_result(out, result, origin, era) {
            Ok(false) => return "ok",
            Ok(true) => return "tool_error",
            Err(error) => error,
        },
        Err(error) => error,
    };
    out.truncate(before);
    let error = error.to_tool_error(origin.name.as_str());
    write_error(out, &error, Some(origin), era);
    error.code.as_str()
}

/// Appends a guest's result with its origin; returns whether it says that the tool failed.
fn write_result(out: &mut Vec<u8>, result: &RawValue, origin: &Origin, era: Era) -> Result<bool, LinkError> {
    let members = Members::parse(result).ok_or(LinkError::Misbehaved { what: "not an object" })?;
    let mut is_error = false;
    let mut has_content = false;
    let mut meta = None;
    out.push(b'{');
    for (key, value) in &members.0 {
        match &**key {
            "_meta" => {
                meta = Some(*value);
                continue;
            }
            "resultType" => {
                if value.get() != r#""complete""# {
                    return Err(LinkError::Misbehaved { what: "not a complete result" });
                }
                continue;
            }
            "content" => has_content = value.get().starts_with('['),
            "isError" => {
                is_error = match value.get() {
                    "true" => true,
                    "false" => false,
                    _ => return Err(LinkError::Misbehaved { what: "its isError is neither true nor false" }),
                }
            }
            "structuredContent" if !value.get().starts_with('{') => {
                return Err(LinkError::Misbehaved { what: "its structuredContent is not an object" });
            }
            _ => {}
        }
        write_string(out, key);
        out.push(b':');
        out.extend_from_slice(value.get().as_bytes());
        out.push(b',');
    }
    if !has_content {
        return Err(LinkError::Misbehaved { what: "it has no content" });
    }
    write_type(out, era);
    out.extend_from_slice(br#""_meta":{"#);
    if let Some(meta) = meta {
        let members =
            Members::parse(meta).ok_or(LinkError::Misbehaved { what: "its _meta is not an object" })?;
        for (key, value) in &members.0 {
            // What the host itself says there cannot be said by a guest.
            if key == VM_META || key.starts_with("io.modelcontextprotocol/") {
                continue;
            }
            write_string(out, key);
            out.push(b':');
            out.extend_from_slice(value.get().as_bytes());
            out.push(b',');
        }
    }
    write_origin(out, origin);
    out.extend_from_slice(b"}}");
    Ok(is_error)
}

/// Appends a failed result: text for the reader, the object for programs, no structured content.
pub(crate) fn write_error(out: &mut Vec<u8>, error: &ToolError, origin: Option<&Origin>, era: Era) {
    out.extend_from_slice(br#"{"content":[{"type":"text","text":"#);
    write_string(out, &error.to_string());
    out.extend_from_slice(br#"}],"isError":true,"#);
    write_type(out, era);
    out.extend_from_slice(br#""_meta":{"#);
    if let Some(origin) = origin {
        write_origin(out, origin);
        out.push(b',');
    }
    write_string(out, ERROR_META);
    out.push(b':');
    serde_json::to_writer(&mut *out, error).expect("an error has a JSON form");
    out.extend_from_slice(b"}}");
}

fn write_type(out: &mut Vec<u8>, era: Era) {
    match era {
        Era::Session => {}
        Era::Stateless => out.extend_from_slice(br#""resultType":"complete","#),
    }
}

fn write_origin(out: &mut Vec<u8>, origin: &Origin) {
    write_string(out, VM_META);
    out.push(b':');
    out.extend_from_slice(origin.meta.as_bytes());
}

/// Appends the start of a response: everything up to its result.
pub(crate) fn write_response_start(out: &mut Vec<u8>, id: &str) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
    out.extend_from_slice(id.as_bytes());
    out.extend_from_slice(br#","result":"#);
}

/// A call that is being made, for the log of calls.
#[derive(Debug)]
pub(crate) struct Timed {
    wall: SystemTime,
    start: Instant,
}

impl Timed {
    pub(crate) fn start(host: &Host) -> Self {
        let start = Instant::now();
        host.awake().begins(start);
        Self { wall: SystemTime::now(), start }
    }

    /// The call has ended.
    pub(crate) fn record(
        &self,
        host: &Host,
        owner: &Arc<str>,
        tool: impl Into<Cow<'static, str>>,
        vm: Option<VmId>,
        outcome: &'static str,
    ) {
        if outcome != "ok" {
            host.counters().errors.add();
        }
        let end = Instant::now();
        host.awake().ended(end);
        host.guests().record(CallRecord {
            started: Timestamp::from(self.wall),
            owner: Arc::clone(owner),
            tool: tool.into(),
            vm,
            duration: end - self.start,
            outcome,
        });
    }
}

/// The parameters of `tools/call`, raw.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CallParams<'a> {
    #[serde(borrow)]
    pub(crate) name: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(crate) arguments: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "_meta")]
    pub(crate) meta: Option<CallMeta<'a>>,
    /// Things that rmcp is better at.
    #[serde(borrow, default)]
    task: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input_responses: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request_state: Option<&'a RawValue>,
}

/// What `_meta` of a call may say that matters here.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct CallMeta<'a> {
    #[serde(borrow, default, rename = "progressToken")]
    pub(crate) progress_token: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "io.modelcontextprotocol/protocolVersion")]
    version: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "io.modelcontextprotocol/clientCapabilities")]
    capabilities: Option<&'a RawValue>,
}

impl<'a> CallParams<'a> {
    /// Looks at the parameters; `None` unless everything about them is plain.
    pub(crate) fn parse(params: &'a RawValue) -> Option<Self> {
        if !params.get().starts_with('{') {
            return None;
        }
        let this: Self = serde_json::from_str(params.get()).ok()?;
        let special = this.task.is_some() || this.input_responses.is_some() || this.request_state.is_some();
        let object = this.arguments.is_none_or(|a| a.get().starts_with('{'));
        let token =
            this.progress_token().is_none_or(|t| t.starts_with(|c: char| c == '"' || c.is_ascii_digit()));
        (!special && object && token).then_some(this)
    }

    /// Where progress is to be sent, as JSON.
    pub(crate) fn progress_token(&self) -> Option<&'a str> {
        self.meta.as_ref()?.progress_token.map(RawValue::get)
    }

    /// The revision that the request itself names.
    pub(crate) fn version(&self) -> Option<&str> {
        self.meta.as_ref()?.version.as_deref()
    }

    /// In which shape the request wants its reply; `None` if it is not plain that it may be served.
    pub(crate) fn era(&self, initialized: bool) -> Option<Era> {
        match (self.version(), initialized) {
            (None, true) => Some(Era::Session),
            (Some("2026-07-28"), _) => {
                let capabilities = self.meta.as_ref()?.capabilities?;
                capabilities.get().starts_with('{').then_some(Era::Stateless)
            }
            (None | Some(_), _) => None,
        }
    }
}

/// Whether the line may be a call of a tool: a cheap look before it is taken apart.
pub(crate) fn may_be_call(message: &wire::Envelope<'_>) -> bool {
    message.method.as_deref() == Some("tools/call") && message.id.is_some() && message.is_well_formed()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn raw(text: &str) -> &RawValue {
        serde_json::from_str(text).unwrap()
    }

    fn origin() -> Origin {
        Origin {
            vm: VmId::from_i64(1).unwrap(),
            name: "web-1".parse().unwrap(),
            boot: BootId::from_i64(2).unwrap(),
            meta: r#"{"id":"aaaaaaaaaaaac","name":"web-1","boot_id":"aaaaaaaaaaaae"}"#.into(),
        }
    }

    fn outcome(result: &str, era: Era) -> (Value, &'static str) {
        let mut out = Vec::new();
        let said = write_outcome(&mut out, Ok(raw(result)), &origin(), era);
        (serde_json::from_slice(&out).unwrap(), said)
    }

    #[test]
    fn arguments_pass_raw_without_the_vm() {
        let text = r#"{"command":"é\n","vm":"web-1","timeout_s":7,"n":1.50}"#;
        let arguments = Arguments::parse(Some(raw(text)), View::Whole).unwrap();
        assert_eq!(arguments.vm(View::Whole).unwrap().to_string(), "web-1");
        let mut out = Vec::new();
        arguments.write(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"command":"é\n","timeout_s":7,"n":1.50}"#);
        assert_eq!(arguments.deadline("run_command"), Duration::from_secs(17));
        assert_eq!(arguments.deadline("file_read"), DEADLINE);
        let huge = Arguments::parse(Some(raw(r#"{"vm":"a","timeout_s":18446744073709551615}"#)), View::Whole);
        assert_eq!(huge.unwrap().deadline("run_command"), COMMAND_TIMEOUT_MAX + SLACK);
    }

    #[test]
    fn a_vm_is_named_once_and_well() {
        for (text, says) in [
            ("{}", "missing field `vm`"),
            (r#"{"vm":1}"#, "must be a string"),
            (r#"{"vm":"A b"}"#, "not a name"),
            (r#"{"vm":"a","vm":"b"}"#, "given twice"),
        ] {
            let error = Arguments::parse(Some(raw(text)), View::Whole).unwrap_err();
            assert!(error.message.contains(says), "{error}");
        }
        let scoped = View::Vm(VmId::from_i64(9).unwrap());
        let arguments = Arguments::parse(Some(raw(r#"{"vm":"x"}"#)), scoped).unwrap();
        let mut out = Vec::new();
        arguments.write(&mut out);
        assert_eq!(out, br#"{"vm":"x"}"#, "the guest says that it knows no such argument");
    }

    #[test]
    fn results_get_their_origin_and_keep_the_rest() {
        let (value, said) = outcome(r#"{"content":[],"_meta":{"dev.nexus/result":{"x":1}}}"#, Era::Session);
        assert_eq!(said, "ok");
        assert_eq!(
            value,
            json!({"content": [], "_meta": {"dev.nexus/result": {"x": 1},
                "dev.nexus/vm": {"id": "aaaaaaaaaaaac", "name": "web-1", "boot_id": "aaaaaaaaaaaae"}}})
        );
        let (value, said) = outcome(r#"{"content":[],"isError":true}"#, Era::Stateless);
        assert_eq!((said, &value["resultType"]), ("tool_error", &json!("complete")));
        assert_eq!(value["_meta"]["dev.nexus/vm"]["name"], "web-1");
    }

    #[test]
    fn a_guest_cannot_speak_for_the_host() {
        let forged = r#"{"content":[],"_meta":{"dev.nexus/vm":{"name":"other"},"io.modelcontextprotocol/serverInfo":{}}}"#;
        let (value, _) = outcome(forged, Era::Session);
        assert_eq!(value["_meta"]["dev.nexus/vm"]["name"], "web-1");
        assert_eq!(value["_meta"].as_object().unwrap().len(), 1);
        for bad in [
            r#"{"content":[],"resultType":"input_required"}"#,
            "{}",
            r#"{"content":[],"_meta":3}"#,
            r#"{"content":[],"isError":"no"}"#,
            r#"{"content":[],"structuredContent":[]}"#,
        ] {
            let (value, said) = outcome(bad, Era::Session);
            assert_eq!((said, &value["isError"]), ("guest_misbehaved", &json!(true)), "{bad}");
            assert_eq!(value["_meta"]["dev.nexus/error"]["code"], "guest_misbehaved");
            assert_eq!(value.get("structuredContent"), None);
        }
    }

    #[test]
    fn only_plain_calls_are_taken() {
        let plain =
            CallParams::parse(raw(r#"{"name":"x","arguments":{},"_meta":{"progressToken":1}}"#)).unwrap();
        assert_eq!(
            (plain.progress_token(), plain.era(true), plain.era(false)),
            (Some("1"), Some(Era::Session), None)
        );
        for odd in [r#"{"name":"x","arguments":[]}"#, r#"{"name":"x","task":{}}"#, r#"{"arguments":{}}"#] {
            assert!(CallParams::parse(raw(odd)).is_none(), "{odd}");
        }
        let meta = |version: &str| {
            format!(
                r#"{{"name":"x","_meta":{{"io.modelcontextprotocol/protocolVersion":"{version}","io.modelcontextprotocol/clientCapabilities":{{}}}}}}"#
            )
        };
        let text = meta("2026-07-28");
        assert_eq!(CallParams::parse(raw(&text)).unwrap().era(false), Some(Era::Stateless));
        let text = meta("2030-01-01");
        assert_eq!(CallParams::parse(raw(&text)).unwrap().era(true), None);
    }
}
