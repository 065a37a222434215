//! Calls of a guest's tools by the daemon itself.

use std::time::Duration;

use nexus_schema::error::STREAM_META;
use nexus_schema::link::CLIENT_META;
use nexus_schema::{ErrorCode, Tool, ToolError};
use serde::Deserialize;
use serde_json::{Value, json, value::to_raw_value};

use crate::guest::result::{Expected, GuestResult, check};
use crate::guest::{Link, LinkError};

/// What a guest says.
#[derive(Debug)]
pub(crate) struct Said<T> {
    /// The facts.
    pub(crate) facts: T,
    blocks: Vec<Block>,
}

/// A content block.
#[derive(Debug, Deserialize)]
struct Block {
    #[serde(default)]
    text: String,
    #[serde(default, rename = "_meta")]
    meta: Value,
}

impl<T> Said<T> {
    /// The text of one stream: `stdout`, `stderr`.
    pub(crate) fn stream(&self, name: &str) -> String {
        let of_stream = self.blocks.iter().filter(|block| block.meta[STREAM_META] == name);
        of_stream.map(|block| block.text.as_str()).collect()
    }
}

/// Calls a tool of the guest of the VM named `vm`, as `client`. Dropping the future cancels the call.
pub(crate) async fn call<T: Tool>(
    link: &Link,
    vm: &str,
    params: &T::Params,
    client: Option<&str>,
    deadline: Duration,
) -> Result<Said<T::Output>, ToolError> {
    let bug = |error: serde_json::Error| ToolError::internal(format!("call {} of {vm}: {error}", T::NAME));
    let meta = client.map(|client| json!({ CLIENT_META: client })).unwrap_or_else(|| json!({}));
    let request = json!({ "name": T::NAME, "arguments": params, "_meta": meta });
    let raw = to_raw_value(&request).map_err(bug)?;
    let answer = link.request("tools/call", &raw, deadline).await;
    let answer = answer.map_err(|error| error.to_tool_error(vm))?;
    match check(&answer, &Expected::of::<T>()).map_err(|error: LinkError| error.to_tool_error(vm))? {
        GuestResult::Done { content, facts } => {
            let garbled = |_| {
                ToolError::new(ErrorCode::GuestMisbehaved, format!("{vm}: its answer to {} is none", T::NAME))
            };
            let facts = serde_json::from_str(facts).map_err(garbled)?;
            let blocks = serde_json::from_str(content).map_err(garbled)?;
            Ok(Said { facts, blocks })
        }
        GuestResult::Failed(failure) => Err(failure.to_tool_error(vm)),
    }
}

/// Whether an error says that the guest cannot be asked just now, and not that it refuses.
pub(crate) const fn is_of_link(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::GuestUnreachable | ErrorCode::Timeout | ErrorCode::Busy)
}
