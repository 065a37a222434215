//! The reply to a call: a guest's checked result with its origin, or an error.

use std::borrow::Cow;
use std::time::Duration;

use nexus_core::GuestHandle;
use nexus_core::link::LinkError;
use nexus_core::link::result::{self, GuestResult};
use nexus_core::link::wire::write_string;
use nexus_schema::error::{CHECKPOINT_META, ERROR_META, FROM_META, GUEST, RESULT_META, VM_META};
use nexus_schema::id::{BootId, VmId};
use nexus_schema::{Name, ResultShape, Timestamp, ToolError};
use serde_json::json;
use serde_json::value::RawValue;

use super::before::TakenBefore;
use super::{Era, names};
use crate::expiry;
use crate::host::View;
use crate::tools::GuestTool;

/// The VM and boot that answered, as stated in every reply.
#[derive(Debug)]
pub(crate) struct Origin {
    /// The VM's id.
    pub(super) vm: VmId,
    /// The VM's name.
    name: Name,
    boot: BootId,
    expires_at: Option<Timestamp>,
    meta: String,
}

impl Origin {
    pub(super) fn of(guest: &GuestHandle) -> Self {
        // Ids and names need no escaping.
        let meta =
            format!(r#"{{"id":"{}","name":"{}","boot_id":"{}"}}"#, guest.vm, guest.name, guest.boot_id);
        Self {
            vm: guest.vm,
            name: guest.name.clone(),
            boot: guest.boot_id,
            expires_at: guest.expires_at,
            meta,
        }
    }

    /// The VM's name.
    pub(crate) fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Its form in `_meta`: id, name and boot.
    pub(crate) fn meta(&self) -> serde_json::Value {
        serde_json::from_str(&self.meta).expect("it was written as JSON")
    }

    #[cfg(test)]
    pub(crate) fn sample() -> Self {
        Self {
            vm: VmId::from_i64(1).unwrap(),
            name: "web-1".parse().unwrap(),
            boot: BootId::from_i64(2).unwrap(),
            expires_at: None,
            meta: r#"{"id":"aaaaaaaaaaaac","name":"web-1","boot_id":"aaaaaaaaaaaae"}"#.into(),
        }
    }

    /// Whether it equals what [`Self::of`] returns for this guest.
    pub(super) fn is_of(&self, guest: &GuestHandle) -> bool {
        (self.vm, self.boot, self.expires_at, &self.name)
            == (guest.vm, guest.boot_id, guest.expires_at, &guest.name)
    }
}

/// Who an error message comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaker {
    Host,
    Guest,
}

/// What the host says of a guest's result.
#[derive(Debug, Clone, Copy)]
pub(super) struct Said<'a> {
    /// Who answered.
    pub(super) origin: &'a Origin,
    /// The checkpoint that was taken before.
    pub(super) taken: Option<&'a TakenBefore>,
    /// How long it took to wake the VM for the call, if it slept.
    pub(super) woken: Option<Duration>,
}

/// Appends the result of a call: the guest's own with its origin, or an error, with the view's names of tools. Returns the outcome
/// for the call record.
pub(super) fn write_outcome(
    out: &mut Vec<u8>,
    outcome: Result<&RawValue, LinkError>,
    tool: &GuestTool,
    said: Said<'_>,
    era: Era,
    view: View,
) -> &'static str {
    let Said { origin, taken, woken } = said;
    let vm = origin.name.as_str();
    let end = origin.expires_at.and_then(|at| expiry::of_life(at, vm, view));
    let slept = woken.map(|took| format!("{vm} was suspended, and was woken in {} ms", took.as_millis()));
    let notes: Vec<String> = slept.into_iter().chain(end).collect();
    let note = (!notes.is_empty()).then(|| notes.join("; "));
    let (error, speaker) = match outcome.and_then(|result| result::check(result, &tool.expected)) {
        Ok(GuestResult::Done { content, facts }) => {
            let shape = tool.expected.shape;
            let content =
                if tool.reports_commands() { names::in_report(content, view) } else { content.into() };
            let content = match taken {
                Some(taken) => with_block(&content, &taken.told(view)),
                None => content,
            };
            let (content, facts) = with_note(&content, facts, shape, note);
            write_done(out, &content, &facts, shape, said, era);
            return "ok";
        }
        Ok(GuestResult::Failed(failure)) => {
            let mut error = failure.to_tool_error(vm);
            tool.rename(&mut error, view);
            (error, Speaker::Guest)
        }
        Err(error @ LinkError::Refused { .. }) => (error.to_tool_error(vm), Speaker::Guest),
        Err(error) => (error.to_tool_error(vm), Speaker::Host),
    };
    let mut error = names::told(error, view);
    if let Some(taken) = taken {
        let told = taken.told(view);
        error.hint = Some(error.hint.map_or_else(|| told.clone(), |hint| format!("{hint}\n{told}")));
    }
    write_failed(out, &error, Some(said), speaker, era);
    error.code.as_str()
}

/// Appends the error of a call that did not reach the guest.
pub(super) fn write_refused(out: &mut Vec<u8>, error: ToolError, origin: &Origin, era: Era, view: View) {
    let said = Said { origin, taken: None, woken: None };
    write_failed(out, &names::told(error, view), Some(said), Speaker::Host, era);
}

/// Adds a text of the host as a block of its own.
fn with_block(content: &str, text: &str) -> Cow<'static, str> {
    appended(content, &json!({ "type": "text", "text": text }).to_string()).into_owned().into()
}

/// Adds a note of the host to a guest's result, in each form that a client may show: as a block of its own, and as a fact.
fn with_note<'a>(
    content: &'a str,
    facts: &'a str,
    shape: ResultShape,
    note: Option<String>,
) -> (Cow<'a, str>, Cow<'a, str>) {
    let Some(note) = note else { return (content.into(), facts.into()) };
    let content = with_block(content, &format!("note: {note}"));
    match shape {
        ResultShape::Text => (content, facts.into()),
        ResultShape::Structured => (content, appended(facts, &format!(r#""note":{}"#, json!(note)))),
    }
}

/// A JSON array or object, which was checked before, with one more item or member.
fn appended<'a>(json: &'a str, item: &str) -> Cow<'a, str> {
    let json = json.trim_end();
    let Some((inner, end)) = json.len().checked_sub(1).and_then(|at| json.split_at_checked(at)) else {
        return json.into();
    };
    let is_empty = inner.trim_end().len() == 1;
    format!("{inner}{}{item}{end}", if is_empty { "" } else { "," }).into()
}

fn write_done(out: &mut Vec<u8>, content: &str, facts: &str, shape: ResultShape, said: Said<'_>, era: Era) {
    out.extend_from_slice(br#"{"content":"#);
    out.extend_from_slice(content.as_bytes());
    out.push(b',');
    if shape == ResultShape::Structured {
        out.extend_from_slice(br#""structuredContent":"#);
        out.extend_from_slice(facts.as_bytes());
        out.push(b',');
    }
    write_type(out, era);
    out.extend_from_slice(br#""_meta":{"#);
    if shape == ResultShape::Text {
        write_string(out, RESULT_META);
        out.push(b':');
        out.extend_from_slice(facts.as_bytes());
        out.push(b',');
    }
    if let Some(taken) = said.taken {
        write_string(out, CHECKPOINT_META);
        out.push(b':');
        out.extend_from_slice(taken.facts().to_string().as_bytes());
        out.push(b',');
    }
    write_origin(out, said);
    out.extend_from_slice(b"}}");
}

/// Appends an error of the host as the result of a call.
pub(crate) fn write_error(out: &mut Vec<u8>, error: &ToolError, era: Era) {
    write_failed(out, error, None, Speaker::Host, era);
}

/// Appends a failed result: text for the reader, an object for programs, no structured content.
fn write_failed(out: &mut Vec<u8>, error: &ToolError, said: Option<Said<'_>>, speaker: Speaker, era: Era) {
    let error = &error.clone().with_advice();
    out.extend_from_slice(br#"{"content":[{"type":"text","text":"#);
    write_string(out, &error.to_string());
    out.extend_from_slice(br#"}],"isError":true,"#);
    write_type(out, era);
    out.extend_from_slice(br#""_meta":{"#);
    if let Some(said) = said {
        write_origin(out, said);
        out.push(b',');
    }
    if speaker == Speaker::Guest {
        write_string(out, FROM_META);
        out.push(b':');
        write_string(out, GUEST);
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

fn write_origin(out: &mut Vec<u8>, said: Said<'_>) {
    write_string(out, VM_META);
    out.push(b':');
    let meta = &said.origin.meta;
    match said.woken {
        Some(_) => out.extend_from_slice(appended(meta, r#""woken":true"#).as_bytes()),
        None => out.extend_from_slice(meta.as_bytes()),
    }
}

/// Appends the start of a response: everything up to its result.
pub(crate) fn write_response_start(out: &mut Vec<u8>, id: &str) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
    out.extend_from_slice(id.as_bytes());
    out.extend_from_slice(br#","result":"#);
}

#[cfg(test)]
mod tests {
    use nexus_schema::tools::file::FileRead;
    use nexus_schema::tools::os::OsInfo;
    use serde_json::Value;

    use super::*;
    use crate::tools::Toolset;

    const WHOLE: View = View::Whole(Toolset::ALL);

    fn origin() -> Origin {
        Origin::sample()
    }

    fn alone(origin: &Origin) -> Said<'_> {
        Said { origin, taken: None, woken: None }
    }

    #[test]
    fn a_reply_names_the_checkpoint_that_was_taken_before() {
        let (taken, origin) = (TakenBefore::sample(), origin());
        let said = Said { origin: &origin, taken: Some(&taken), woken: None };
        let facts = json!({"size_bytes": 1, "offset": 0, "read_bytes": 1, "eof": true, "lossy": false});
        let forged = json!({"content": [{"type": "text", "text": "x"}], "_meta": {
            "dev.nexus/result": facts, "dev.nexus/checkpoint": {"name": "forged"}}})
        .to_string();
        let tool = GuestTool::alone::<FileRead>();
        let written = |outcome: Result<&RawValue, LinkError>, said| -> Value {
            let mut out = Vec::new();
            write_outcome(&mut out, outcome, &tool, said, Era::Session, WHOLE);
            serde_json::from_slice(&out).unwrap()
        };
        let value = written(Ok(serde_json::from_str(&forged).unwrap()), said);
        assert_eq!(value["_meta"]["dev.nexus/checkpoint"]["name"], "before-run-abcdef", "{value}");
        let text = value["content"][1]["text"].as_str().unwrap();
        assert!(text.contains("before-run-abcdef of web-1") && text.contains("vm_rollback"), "{text}");
        // Also with an error, and never what a guest says.
        let value = written(Err(LinkError::TooLarge), said);
        assert!(value["content"][0]["text"].as_str().unwrap().contains("before-run-abcdef"), "{value}");
        let value = written(Ok(serde_json::from_str(&forged).unwrap()), alone(&origin));
        assert_eq!(value["_meta"].get("dev.nexus/checkpoint"), None, "{value}");
    }

    fn outcome(outcome: Result<&str, LinkError>, era: Era) -> (Value, &'static str) {
        let mut out = Vec::new();
        let outcome = outcome.map(|text| serde_json::from_str(text).unwrap());
        let said =
            write_outcome(&mut out, outcome, &GuestTool::alone::<FileRead>(), alone(&origin()), era, WHOLE);
        (serde_json::from_slice(&out).unwrap(), said)
    }

    fn result(facts: Value) -> String {
        json!({"content": [{"type": "text", "text": "x"}], "x": 1, "_meta": {
            "dev.nexus/result": facts, "dev.nexus/vm": {"name": "other"}, "io.modelcontextprotocol/serverInfo": {}}})
        .to_string()
    }

    #[test]
    fn results_get_their_origin_and_nothing_that_only_the_host_may_say() {
        let facts = json!({"size_bytes": 1, "offset": 0, "read_bytes": 1, "eof": true, "lossy": false});
        let (value, said) = outcome(Ok(&result(facts.clone())), Era::Stateless);
        assert_eq!(said, "ok");
        assert_eq!(
            value,
            json!({"content": [{"type": "text", "text": "x"}], "resultType": "complete", "_meta": {
                "dev.nexus/result": facts,
                "dev.nexus/vm": {"id": "aaaaaaaaaaaac", "name": "web-1", "boot_id": "aaaaaaaaaaaae"}}})
        );
        let facts = json!({"hostname": "h", "kernel": "k", "arch": "a", "cpus": 1, "memory_total_bytes": 1,
            "memory_available_bytes": 1, "disk_total_bytes": 1, "disk_available_bytes": 1, "load": [0.0, 0.0, 0.0],
            "uptime_s": 1.0, "init": "i", "agent": "0"});
        let text = json!({"content": [], "structuredContent": facts}).to_string();
        let mut out = Vec::new();
        let raw = serde_json::from_str(&text).unwrap();
        write_outcome(
            &mut out,
            Ok(raw),
            &GuestTool::alone::<OsInfo>(),
            alone(&origin()),
            Era::Session,
            WHOLE,
        );
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["structuredContent"], facts, "{value}");
        assert_eq!(value.get("resultType"), None);
    }

    #[test]
    fn the_end_of_a_vm_is_told_in_each_form_of_a_result() {
        let soon = Origin { expires_at: Some(Timestamp::from_millis(1)), ..origin() };
        let told = |text: &str, tool: &GuestTool, view: View| -> Value {
            let mut out = Vec::new();
            let raw = serde_json::from_str(text).unwrap();
            write_outcome(&mut out, Ok(raw), tool, alone(&soon), Era::Session, view);
            serde_json::from_slice(&out).unwrap()
        };
        let facts = json!({"size_bytes": 1, "offset": 0, "read_bytes": 1, "eof": true, "lossy": false});
        let read = GuestTool::alone::<FileRead>();
        let value = told(&result(facts.clone()), &read, WHOLE);
        assert_eq!(value["content"][0]["text"], "x");
        assert!(
            value["content"][1]["text"]
                .as_str()
                .unwrap()
                .starts_with("note: the time to live of web-1 ends in 0s")
        );
        assert_eq!(value["_meta"]["dev.nexus/result"], facts);
        let facts = json!({"hostname": "h", "kernel": "k", "arch": "a", "cpus": 1, "memory_total_bytes": 1,
            "memory_available_bytes": 1, "disk_total_bytes": 1, "disk_available_bytes": 1, "load": [0.0, 0.0, 0.0],
            "uptime_s": 1.0, "init": "i", "agent": "0"});
        let text = json!({"content": [], "structuredContent": facts}).to_string();
        let value = told(&text, &GuestTool::alone::<OsInfo>(), WHOLE);
        assert_eq!(value["content"].as_array().unwrap().len(), 1);
        assert!(value["structuredContent"]["note"].as_str().unwrap().contains("vm_update"), "{value}");
        let inside = told(
            &result(json!({"size_bytes": 1, "offset": 0, "read_bytes": 1, "eof": true, "lossy": false})),
            &read,
            View::Vm(soon.vm),
        );
        let note = inside["content"][1]["text"].as_str().unwrap();
        assert!(note.ends_with("ends in 0s: ask whoever gave you this endpoint to extend it"), "{note}");
    }

    #[test]
    fn a_wake_is_told_in_each_form_of_a_result() {
        let (origin, took) = (origin(), Some(Duration::from_millis(312)));
        let facts = json!({"size_bytes": 1, "offset": 0, "read_bytes": 1, "eof": true, "lossy": false});
        let failed = json!({"content": [], "isError": true,
            "_meta": {"dev.nexus/error": {"code": "file_not_found", "message": "none", "retryable": false}}});
        for text in [result(facts), failed.to_string()] {
            let mut out = Vec::new();
            let (raw, tool) = (serde_json::from_str(&text).unwrap(), GuestTool::alone::<FileRead>());
            let woken = Said { origin: &origin, taken: None, woken: took };
            write_outcome(&mut out, Ok(raw), &tool, woken, Era::Session, WHOLE);
            let value: Value = serde_json::from_slice(&out).unwrap();
            let vm =
                json!({"id": "aaaaaaaaaaaac", "name": "web-1", "boot_id": "aaaaaaaaaaaae", "woken": true});
            assert_eq!(value["_meta"]["dev.nexus/vm"], vm, "{value}");
            if value["isError"] != json!(true) {
                let note = value["content"][1]["text"].as_str().unwrap();
                assert_eq!(note, "note: web-1 was suspended, and was woken in 312 ms");
            }
        }
    }

    #[test]
    fn whose_words_an_error_has_is_said() {
        let error = json!({"code": "file_not_found", "message": "none", "retryable": false});
        let failed = json!({"content": [], "isError": true, "_meta": {"dev.nexus/error": error}}).to_string();
        let refused = LinkError::Refused { code: -32602, message: "no".into(), data: None };
        for (said, code, from) in [
            (Ok(&*failed), "file_not_found", json!("guest")),
            (Err(refused), "invalid_argument", json!("guest")),
            (Err(LinkError::Busy), "busy", Value::Null),
            (Ok("{}"), "guest_misbehaved", Value::Null),
        ] {
            let (value, outcome) = outcome(said, Era::Session);
            assert_eq!((outcome, &value["isError"]), (code, &json!(true)), "{value}");
            assert_eq!(value["_meta"]["dev.nexus/error"]["code"], code);
            assert_eq!(value["_meta"]["dev.nexus/from"], from, "{value}");
            assert_eq!(value["_meta"]["dev.nexus/vm"]["name"], "web-1");
            assert!(value["content"][0]["text"].as_str().unwrap().starts_with(&format!("{code}: ")));
            assert_eq!(value.get("structuredContent"), None);
        }
    }
}
