//! Formats results and errors.

use nexus_schema::error::{ERROR_META, RESULT_META, STREAM_META, VM_META};
use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tool::ResultShape;
use nexus_schema::{Timestamp, Tool, ToolError};
use rmcp::model::{CallToolResult, ContentBlock, JsonObject, MetaObject, TextContent};
use serde_json::{Value, json};

use super::compact::compact;
use super::{Toolset, text};
use crate::expiry;
use crate::host::View;

/// The result of a tool of the host; `is_compact`: what a model needs of it.
pub(super) fn result<T: Tool>(output: &T::Output, is_compact: bool) -> Result<CallToolResult, ToolError> {
    let mut value = serde_json::to_value(output)
        .map_err(|e| ToolError::internal(format!("the result of {} has no JSON form: {e}", T::NAME)))?;
    let vm = vm_of(&value);
    let note = note_of(&value);
    if is_compact {
        compact(&mut value);
    }
    if let (Some(note), Value::Object(members)) = (note, &mut value) {
        members.insert("note".into(), note.into());
    }
    let mut result = match T::SHAPE {
        ResultShape::Structured => {
            let mut shown = text::render(&value, OUTPUT_MAX as usize);
            if let Some(op) = unfinished(&value).filter(|_| !is_compact) {
                shown = format!("not done yet: call op_get with op_id {op}\n{shown}");
            }
            let mut result = CallToolResult::success(vec![ContentBlock::text(shown)]);
            result.structured_content = Some(value);
            result
        }
        ResultShape::Text => {
            let (header, body) = text::text_first(&value);
            let mut content = TextContent::new(body);
            content.meta = Some(meta(STREAM_META, "content".into()));
            let mut result =
                CallToolResult::success(vec![ContentBlock::text(header), ContentBlock::Text(content)]);
            result.meta = Some(meta(RESULT_META, value));
            result
        }
    };
    if let Some(vm) = vm {
        result.meta.get_or_insert_default().0.insert(VM_META.into(), vm);
    }
    Ok(result)
}

/// A failed call: text for the reader, an object for programs, no structured content.
pub(crate) fn error_result(error: &ToolError) -> CallToolResult {
    let error = &error.clone().with_advice();
    let mut result = CallToolResult::error(vec![ContentBlock::text(error.to_string())]);
    result.meta = Some(meta(ERROR_META, json!(error)));
    result
}

fn meta(key: &str, value: Value) -> MetaObject {
    let mut object = JsonObject::new();
    object.insert(key.into(), value);
    MetaObject(object)
}

/// The id of the operation behind an unfinished result.
fn unfinished(value: &Value) -> Option<&str> {
    (value.get("done")? == false).then(|| value.get("op_id")?.as_str()).flatten()
}

/// A warning that the VM of a result soon ends by itself.
fn note_of(value: &Value) -> Option<String> {
    let vm = value.get("result").unwrap_or(value);
    let name = vm.get("name")?.as_str()?;
    let at = |key: &str| -> Option<Timestamp> { vm.get(key)?.as_str()?.parse().ok() };
    if vm.get("run").is_some() {
        return None;
    }
    let suspends = vm.get("idle_action").is_some_and(|action| action == "suspend");
    at("expires_at")
        .and_then(|at| expiry::of_life(at, name, View::Whole(Toolset::ALL)))
        .or_else(|| at("idle_stop_at").and_then(|at| expiry::of_idle(at, name, suspends)))
}

/// `{id, name, boot_id}` of the VM that a result concerns.
fn vm_of(value: &Value) -> Option<Value> {
    let vm = value.get("result").unwrap_or(value);
    vm.get("cid")?;
    Some(json!({ "id": vm.get("id")?, "name": vm.get("name")?, "boot_id": vm.get("boot_id") }))
}
