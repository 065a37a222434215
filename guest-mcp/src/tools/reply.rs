//! The reply of a tool, and its conversion to an MCP result.

use nexus_schema::error::{ERROR_META, RESULT_META, STREAM_META};
use nexus_schema::{ResultShape, Tool, ToolError};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

/// The result of a call in MCP's form.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CallResult {
    content: Vec<Text>,
    #[serde(skip_serializing_if = "Option::is_none")]
    structured_content: Option<Box<RawValue>>,
    is_error: bool,
    #[serde(rename = "_meta", skip_serializing_if = "Option::is_none")]
    meta: Option<Meta>,
}

/// A piece of content in MCP's form.
#[derive(Debug, Serialize)]
struct Text {
    r#type: &'static str,
    text: String,
    #[serde(rename = "_meta", skip_serializing_if = "Option::is_none")]
    meta: Option<Meta>,
}

/// A `_meta` with one member. Its value is written once, instead of first being made a tree of values.
#[derive(Debug)]
struct Meta {
    key: &'static str,
    value: Box<RawValue>,
}

impl Meta {
    fn of(key: &'static str, value: &(impl Serialize + ?Sized)) -> Option<Self> {
        Some(Self { key, value: to_raw_value(value).ok()? })
    }
}

impl Serialize for Meta {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut members = serializer.serialize_map(Some(1))?;
        members.serialize_entry(self.key, &self.value)?;
        members.end()
    }
}

impl Text {
    fn new(text: String) -> Self {
        Self { r#type: "text", text, meta: None }
    }
}

/// The reply of a tool that succeeded.
pub(crate) struct Reply<O> {
    /// What happened, in one line; the VM's name is put before it.
    pub(crate) header: String,
    /// Text after the header.
    pub(crate) blocks: Vec<Block>,
    /// The structured result.
    pub(crate) facts: O,
}

/// One piece of text.
pub(crate) struct Block {
    /// The text.
    pub(crate) text: String,
    /// The stream that it comes from; `None` for a message of the tool.
    pub(crate) stream: Option<&'static str>,
}

impl Block {
    /// Creates a block with content of a stream.
    pub(crate) fn stream(stream: &'static str, text: String) -> Self {
        Self { text, stream: Some(stream) }
    }

    /// Creates a block with a message of the tool.
    pub(crate) fn talk(text: impl Into<String>) -> Self {
        Self { text: text.into(), stream: None }
    }
}

impl<O: Serialize> Reply<O> {
    /// Creates a reply from a header and the structured result.
    pub(crate) fn new(header: String, facts: O) -> Self {
        Self { header, blocks: Vec::new(), facts }
    }

    /// Converts it to an MCP result of tool `T`.
    pub(super) fn into_result<T: Tool<Output = O>>(self, vm: &str) -> Result<CallResult, ToolError> {
        let facts = to_raw_value(&self.facts)
            .map_err(|error| super::agent_failed(format!("write the result of {}: {error}", T::NAME)))?;
        let mut content = Vec::with_capacity(1 + self.blocks.len());
        content.push(Text::new(format!("{vm} · {}", without_controls(self.header))));
        for block in self.blocks {
            // Content of a stream or file is passed unchanged.
            let mut text = Text::new(match block.stream {
                Some(_) => block.text,
                None => without_controls(block.text),
            });
            if let Some(stream) = block.stream {
                text.meta = Meta::of(STREAM_META, stream);
            }
            content.push(text);
        }
        let mut result = CallResult { content, structured_content: None, is_error: false, meta: None };
        match T::SHAPE {
            ResultShape::Structured => result.structured_content = Some(facts),
            ResultShape::Text => result.meta = Some(Meta { key: RESULT_META, value: facts }),
        }
        Ok(result)
    }
}

/// Converts an error to an MCP result: text and `_meta`, never structured content. The host accepts no control characters.
pub(super) fn failed(error: ToolError) -> CallResult {
    debug_assert!(error.code.may_be_of_guest(), "the host does not accept this code from a guest: {error}");
    let error = ToolError {
        message: without_controls(error.message),
        hint: error.hint.map(without_controls),
        ..error
    };
    let content = vec![Text::new(error.to_string())];
    let meta = Meta::of(ERROR_META, &error);
    CallResult { content, structured_content: None, is_error: true, meta }
}

/// Replaces each control character except tab and newline, which file names may contain, by a mark.
fn without_controls(text: String) -> String {
    let is_bad = |c: char| c.is_control() && c != '\t' && c != '\n';
    // Most text has none.
    if !text.contains(is_bad) {
        return text;
    }
    text.chars().map(|c| if is_bad(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Formats a size for people: `418 B`, `1.2 KiB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1023.95 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_no_control_characters() {
        let error =
            ToolError::new(nexus_schema::ErrorCode::FileNotFound, "stat a\u{1b}[2J\tb\r\nc").hint("\u{7}");
        let result = serde_json::to_value(failed(error)).unwrap();
        assert_eq!(result["_meta"][ERROR_META]["message"], "stat a\u{fffd}[2J\tb\u{fffd}\nc");
        assert_eq!(result["_meta"][ERROR_META]["hint"], "\u{fffd}");
        assert_eq!(result["content"][0]["text"], "file_not_found: stat a\u{fffd}[2J\tb\u{fffd}\nc\n\u{fffd}");
    }

    #[test]
    fn sizes_are_for_people() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (1_048_575, "1.0 MiB")]
        {
            assert_eq!(human_bytes(bytes), text);
        }
        assert_eq!(human_bytes(u64::MAX), "16384.0 PiB");
    }
}
