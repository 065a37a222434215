//! Completes an `initialize` in a form between the two eras: missing members are taken from `_meta`, or get defaults.

use nexus_core::host::rpc::Envelope;
use serde_json::{Map, Value, json};

/// The client's members in `initialize`, and their names in `_meta` in revision 2026-07-28.
const MEMBERS: [(&str, &str); 3] = [
    ("protocolVersion", "io.modelcontextprotocol/protocolVersion"),
    ("capabilities", "io.modelcontextprotocol/clientCapabilities"),
    ("clientInfo", "io.modelcontextprotocol/clientInfo"),
];

/// Whether a request is an `initialize` that names revision 2026-07-28 in `_meta`, as all requests of that revision do. It has no such
/// method.
pub(crate) fn is_of_stateless_era(message: &Envelope<'_>) -> bool {
    let version = || {
        let params: Value = serde_json::from_str(message.params?.get()).ok()?;
        params.get("_meta")?.get(MEMBERS[0].1)?.as_str().map(|version| version == "2026-07-28")
    };
    message.method.as_deref() == Some("initialize") && version() == Some(true)
}

/// The same request with everything that `initialize` requires; `None` if it is another request or
/// already complete.
pub(crate) fn completed(message: &Envelope<'_>) -> Option<Vec<u8>> {
    if message.method.as_deref() != Some("initialize") {
        return None;
    }
    let id = message.id?;
    let mut params: Map<String, Value> = match message.params {
        Some(params) => serde_json::from_str(params.get()).ok()?,
        None => Map::new(),
    };
    if MEMBERS.iter().all(|(name, _)| params.contains_key(*name)) {
        return None;
    }
    for (name, of_meta) in MEMBERS {
        let told = params.get("_meta").and_then(|meta| meta.get(of_meta)).cloned();
        params.entry(name).or_insert_with(|| {
            told.unwrap_or_else(|| match name {
                "protocolVersion" => json!("2025-11-25"),
                "capabilities" => json!({}),
                _ => json!({"name": "unknown", "version": "0"}),
            })
        });
    }
    serde_json::to_vec(&json!({"jsonrpc": "2.0", "id": id, "method": "initialize", "params": params})).ok()
}
