//! The parameters of a call of a guest's tool, parsed only as deep as needed.

use std::borrow::Cow;
use std::sync::Arc;

use nexus_core::host::rpc::Envelope;
use nexus_core::link::scan;
use nexus_core::link::wire::{Members, write_string};
use nexus_schema::id::VmKind;
use nexus_schema::tool::VM_ARGUMENT;
use nexus_schema::{Reference, ToolError, TraceContext};
use serde_json::value::RawValue;

use crate::host::View;

/// The extension for tasks.
const TASKS: &str = rmcp::model::TASKS_EXTENSION_ID;

/// The form of a reply, which depends on the MCP revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// Up to 2025-11-25.
    Session,
    /// From 2026-07-28: results state their type.
    Stateless,
}

/// The arguments of a call, parsed one level deep.
#[derive(Debug)]
pub(crate) struct Arguments<'a> {
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
    vm: Option<Reference<VmKind>>,
}

impl<'a> Arguments<'a> {
    /// Parses arguments. In the whole view they name a VM, in a VM's own view they do not.
    pub(crate) fn parse(raw: Option<&'a RawValue>, view: View) -> Result<Self, ToolError> {
        let mut members = members(raw)?;
        let vm = match view {
            View::Vm(_) | View::Own(_) => None,
            View::Whole(_) => {
                let mut named = members.iter().filter(|(key, _)| key == VM_ARGUMENT).map(|(_, value)| *value);
                let (first, second) = (named.next(), named.next());
                let Some(first) = first.filter(|value| !matches!(value.get(), "null" | r#""""#)) else {
                    return Err(ToolError::invalid("missing argument `vm` (the VM to work in)")
                        .hint("give its name or id; vm_list shows them"));
                };
                if second.is_some() {
                    return Err(ToolError::invalid("`vm` is given twice"));
                }
                let text: Cow<'_, str> = serde_json::from_str(first.get()).map_err(|_| {
                    let shown: String = first.get().chars().take(60).collect();
                    ToolError::invalid(format!("vm: must be a string, got {shown}"))
                        .hint("give the VM's name or id; vm_list shows them")
                })?;
                let vm = text.parse().map_err(|e: nexus_schema::name::NameError| {
                    ToolError::invalid(format!("vm: {e}")).hint("vm_list shows the names and ids of all VMs")
                })?;
                members.retain(|(key, _)| key != VM_ARGUMENT);
                Some(vm)
            }
        };
        Ok(Self { members, vm })
    }

    /// The VM that is meant.
    pub(crate) fn vm(&self, view: View) -> Option<Reference<VmKind>> {
        match view {
            View::Vm(id) | View::Own(id) => Some(Reference::Id(id)),
            View::Whole(_) => self.vm.clone(),
        }
    }

    /// A numeric argument.
    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        let (_, value) = self.members.iter().find(|(key, _)| key == name)?;
        value.get().trim_matches('"').trim().parse().ok()
    }

    /// Gives a switch the value true, unless the caller says something about it.
    pub(crate) fn switch_on(&mut self, name: &'static str) {
        if !self.members.iter().any(|(key, _)| key == name) {
            self.members.push((name.into(), RawValue::TRUE));
        }
    }

    /// Takes a switch that is for the host and not for the guest.
    pub(crate) fn take_switch(&mut self, name: &str) -> Result<bool, ToolError> {
        let mut is_on = None;
        for (_, value) in self.members.extract_if(.., |member| member.0 == name) {
            let value = match value.get() {
                "true" | r#""true""# => true,
                "false" | r#""false""# | "null" => false,
                other => {
                    let shown: String = other.chars().take(60).collect();
                    return Err(ToolError::invalid(format!("{name}: must be true or false, got {shown}")));
                }
            };
            if is_on.replace(value).is_some() {
                return Err(ToolError::invalid(format!("`{name}` is given twice")));
            }
        }
        Ok(is_on.unwrap_or(false))
    }

    /// Appends them in the form for the guest.
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
}

/// Parses arguments; an error names the argument that JSON readers cannot read.
fn members(raw: Option<&RawValue>) -> Result<Vec<(Cow<'_, str>, &RawValue)>, ToolError> {
    let Some(raw) = raw else { return Ok(Vec::new()) };
    let Some(Members(members)) = Members::parse(raw) else {
        let what = match scan::check(raw) {
            Err(flaw) if raw.get().starts_with('{') => format!("the name of an argument has {flaw}"),
            Ok(()) | Err(_) => "arguments must be an object".into(),
        };
        return Err(ToolError::invalid(what));
    };
    for (name, value) in &members {
        scan::check(value).map_err(|flaw| ToolError::invalid(format!("{name}: it has {flaw}")))?;
    }
    Ok(members)
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
    /// Fields that are left to rmcp.
    #[serde(borrow, default)]
    task: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input_responses: Option<&'a RawValue>,
    #[serde(borrow, default)]
    request_state: Option<&'a RawValue>,
}

/// The fields of a call's `_meta` that matter here.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct CallMeta<'a> {
    #[serde(borrow, default)]
    #[serde(rename = "progressToken")]
    pub(crate) progress_token: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "io.modelcontextprotocol/protocolVersion")]
    version: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "io.modelcontextprotocol/clientCapabilities")]
    capabilities: Option<&'a RawValue>,
    #[serde(borrow, default)]
    traceparent: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tracestate: Option<&'a RawValue>,
}

impl<'a> CallParams<'a> {
    /// Parses the parameters; `None` unless they are plain.
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

    /// The progress token, as JSON.
    pub(crate) fn progress_token(&self) -> Option<&'a str> {
        self.meta.as_ref()?.progress_token.map(RawValue::get)
    }

    /// The trace that the call belongs to.
    pub(crate) fn trace(&self) -> Option<Arc<TraceContext>> {
        let text = |raw: &'a RawValue| serde_json::from_str::<Cow<'a, str>>(raw.get()).ok();
        let meta = self.meta.as_ref()?;
        let (parent, state) = (text(meta.traceparent?)?, meta.tracestate.and_then(text));
        TraceContext::checked(&parent, state.as_deref()).map(Arc::new)
    }

    /// Whether the client can deal with tasks: as the request says, or else as its session does.
    pub(crate) fn declares_tasks(&self, of_session: bool) -> bool {
        let Some(raw) = self.meta.as_ref().and_then(|meta| meta.capabilities) else { return of_session };
        // Only what may say so is decoded.
        let raw = Some(raw).filter(|raw| raw.get().contains(TASKS));
        let can = raw.and_then(|raw| serde_json::from_str::<rmcp::model::ClientCapabilities>(raw.get()).ok());
        can.is_some_and(|can| can.supports_tasks())
    }

    /// The revision named by the request itself.
    pub(crate) fn version(&self) -> Option<&str> {
        self.meta.as_ref()?.version.as_deref()
    }

    /// The form of the reply; `None` if it is not clear that the request may be served.
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

/// Whether the line may be a tool call: a cheap check before it is parsed.
pub(crate) fn may_be_call(message: &Envelope<'_>) -> bool {
    message.method.as_deref() == Some("tools/call") && message.id.is_some() && message.is_well_formed()
}

/// For a tool call that rmcp cannot decode: the error with the argument at fault, and the form of the reply. `None` for anything else.
pub(crate) fn flaw_of_call(message: &Envelope<'_>) -> Option<(ToolError, Era)> {
    if !may_be_call(message) {
        return None;
    }
    let params = CallParams::parse(message.params?)?;
    let era = if params.version().is_some() { Era::Stateless } else { Era::Session };
    members(params.arguments).err().map(|error| (error, era))
}

#[cfg(test)]
mod tests {
    use nexus_schema::id::VmId;

    use super::*;
    use crate::tools::Toolset;

    fn raw(text: &str) -> &RawValue {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn arguments_pass_raw_without_the_vm() {
        let text = r#"{"command":"é\n","vm":"web-1","timeout_s":7,"n":1.50}"#;
        let arguments = Arguments::parse(Some(raw(text)), View::Whole(Toolset::ALL)).unwrap();
        assert_eq!(arguments.vm(View::Whole(Toolset::ALL)).unwrap().to_string(), "web-1");
        let mut out = Vec::new();
        arguments.write(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"command":"é\n","timeout_s":7,"n":1.50}"#);
        assert_eq!(arguments.number("timeout_s"), Some(7.0));
        assert_eq!((arguments.number("command"), arguments.number("x")), (None, None));
    }

    #[test]
    fn a_switch_of_the_host_does_not_reach_the_guest() {
        for (text, is_on) in [("true", true), (r#""true""#, true), ("false", false), ("null", false)] {
            let text = format!(r#"{{"a":1,"checkpoint":{text},"b":2}}"#);
            let mut arguments =
                Arguments::parse(Some(raw(&text)), View::Vm(VmId::from_i64(9).unwrap())).unwrap();
            assert_eq!(arguments.take_switch("checkpoint"), Ok(is_on), "{text}");
            let mut out = Vec::new();
            arguments.write(&mut out);
            assert_eq!(out, br#"{"a":1,"b":2}"#);
        }
        for text in [r#"{"checkpoint":1}"#, r#"{"checkpoint":true,"checkpoint":true}"#] {
            let mut arguments =
                Arguments::parse(Some(raw(text)), View::Vm(VmId::from_i64(9).unwrap())).unwrap();
            assert!(arguments.take_switch("checkpoint").is_err(), "{text}");
        }
        assert_eq!(
            Arguments::parse(None, View::Vm(VmId::from_i64(9).unwrap())).unwrap().take_switch("x"),
            Ok(false)
        );
    }

    #[test]
    fn a_vm_is_named_once_and_well() {
        for (text, says) in [
            ("{}", "missing argument `vm`"),
            (r#"{"vm":null}"#, "missing argument `vm`"),
            (r#"{"vm":""}"#, "missing argument `vm`"),
            (r#"{"vm":1}"#, "vm: must be a string, got 1"),
            (r#"{"vm":"A b"}"#, "not a name"),
            (r#"{"vm":"a","vm":"b"}"#, "given twice"),
        ] {
            let error = Arguments::parse(Some(raw(text)), View::Whole(Toolset::ALL)).unwrap_err();
            assert!(error.message.contains(says), "{error}");
        }
        let scoped = View::Vm(VmId::from_i64(9).unwrap());
        let arguments = Arguments::parse(Some(raw(r#"{"vm":"x"}"#)), scoped).unwrap();
        let mut out = Vec::new();
        arguments.write(&mut out);
        assert_eq!(out, br#"{"vm":"x"}"#, "the guest says that it knows no such argument");
    }

    #[test]
    fn an_argument_that_readers_fail_on_is_named() {
        for (text, says) in [
            (r#"{"vm":"a","content":"\ud800"}"#, "content: it has a lone surrogate"),
            (r#"{"vm":"\udc00"}"#, "vm: it has a lone surrogate"),
            (r#"{"vm":"a","offset":1e999}"#, "offset: it has a number that is too large"),
            (r#"{"vm":"a","\ud800":1}"#, "the name of an argument has a lone surrogate"),
        ] {
            let error = Arguments::parse(Some(raw(text)), View::Whole(Toolset::ALL)).unwrap_err();
            assert!(
                error.to_string().starts_with("invalid_argument: ") && error.message.contains(says),
                "{error}"
            );
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
        assert!(!CallParams::parse(raw(&text)).unwrap().declares_tasks(true), "what the request says counts");
        assert!(plain.declares_tasks(true) && !plain.declares_tasks(false));
        for (capabilities, declares) in [
            (r#"{"extensions":{"io.modelcontextprotocol/tasks":{}}}"#, true),
            (r#"{"experimental":{"x":{"y":"io.modelcontextprotocol/tasks"}}}"#, false),
        ] {
            let text = text.replace(r#"Capabilities":{}"#, &format!(r#"Capabilities":{capabilities}"#));
            assert_eq!(CallParams::parse(raw(&text)).unwrap().declares_tasks(false), declares, "{text}");
        }
        let text = meta("2030-01-01");
        assert_eq!(CallParams::parse(raw(&text)).unwrap().era(true), None);
    }
}
