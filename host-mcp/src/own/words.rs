//! A guest's words on their way to a client: they pass as they are, except that they are marked as the guest's, and that nothing in
//! them can be taken for Nexus's own.

use nexus_schema::error::{FROM_META, GUEST, VM_META};
use rmcp::ErrorData;
use rmcp::model::{ClientCapabilities, ErrorCode};
use serde_json::{Map, Value, json};

use crate::forward::Origin;

/// Beginnings of members of `_meta` that only Nexus, or only the protocol's own layer, sets; and those of pages to show.
const RESERVED: [&str; 4] = ["dev.nexus/", "io.modelcontextprotocol/", "ui/", "openai/"];
/// The member of `_meta` that names a page to show.
const PAGE: &str = "ui";
/// The longest text that a guest may show to a user, in characters.
const SHOWN_MAX: usize = 2000;
/// The longest name of a guest's logger, in characters.
const LOGGER_MAX: usize = 64;
/// The error of a server that wants the user to open an address (MCP 2025-11-25).
const URL_NEEDED: i32 = -32_042;
/// The members of a question with a form.
const FORM: [&str; 4] = ["message", "requestedSchema", "mode", "_meta"];
/// How much a guest may ask in one result.
const INPUTS_MAX: usize = 16;

/// The levels of log messages, the least grave first.
pub(super) const LEVELS: [&str; 8] =
    ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"];

/// Why something that a guest said is not passed on.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Flaw {
    /// The client did not declare that it can answer this.
    Undeclared(&'static str),
    /// No guest may say that.
    Wrong(&'static str),
}

impl Flaw {
    /// The error for the client, in place of a result.
    pub(super) fn to_client(&self, origin: &Origin) -> ErrorData {
        match self {
            Self::Undeclared(capability) => ErrorData::new(
                ErrorCode::MISSING_REQUIRED_CLIENT_CAPABILITY,
                format!(
                    "the guest of {} asks for what this client does not declare: {capability}",
                    origin.name()
                ),
                Some(
                    json!({ "requiredCapabilities": Map::from_iter([((*capability).to_owned(), json!({}))]) }),
                ),
            ),
            Self::Wrong(what) => ErrorData::internal_error(
                format!("guest_misbehaved: {}: invalid answer from the guest: {what}", origin.name()),
                None,
            ),
        }
    }
}

/// Marks an object as the guest's words: in its `_meta`, where only the host speaks for itself.
pub(super) fn mark(object: &mut Map<String, Value>, origin: &Origin) {
    let mut meta = match object.remove("_meta") {
        Some(Value::Object(meta)) => meta,
        _ => Map::new(),
    };
    strip(&mut meta);
    object.values_mut().for_each(clean);
    meta.insert(FROM_META.into(), GUEST.into());
    meta.insert(VM_META.into(), origin.meta());
    object.insert("_meta".into(), meta.into());
}

fn strip(meta: &mut Map<String, Value>) {
    meta.retain(|key, _| key != PAGE && !RESERVED.iter().any(|start| key.starts_with(start)));
}

/// Removes what guests may not say from every `_meta` inside. How deeply values are nested was checked.
fn clean(value: &mut Value) {
    match value {
        Value::Object(members) => {
            if let Some(Value::Object(meta)) = members.get_mut("_meta") {
                strip(meta);
            }
            members.values_mut().for_each(clean);
        }
        Value::Array(items) => items.iter_mut().for_each(clean),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Marks the data of a guest's error. What is no object says nothing of its own origin, and is left as it is.
pub(super) fn error_data(data: Option<Value>, origin: &Origin) -> Option<Value> {
    let mut data = data?;
    clean(&mut data);
    if let Value::Object(members) = &mut data {
        members.insert(FROM_META.into(), GUEST.into());
        members.insert(VM_META.into(), origin.meta());
    }
    Some(data)
}

/// The code of a guest's error: those of JSON-RPC and of servers, except the one that has clients open an address.
pub(super) fn error_code(code: i64) -> ErrorCode {
    match i32::try_from(code) {
        Ok(URL_NEEDED) => ErrorCode::INTERNAL_ERROR,
        Ok(code @ (-32_603..=-32_600 | -32_099..=-32_000)) => ErrorCode(code),
        Ok(_) | Err(_) => ErrorCode::INTERNAL_ERROR,
    }
}

/// Checks and marks what a guest asks of a client.
pub(super) fn question(
    method: &str,
    params: &mut Map<String, Value>,
    client: Option<&ClientCapabilities>,
    origin: &Origin,
) -> Result<(), Flaw> {
    match method {
        "elicitation/create" => {
            let can = client.and_then(|can| can.elicitation.as_ref());
            // A client that names neither form nor address means a form.
            if !can.is_some_and(|can| can.form.is_some() || can.url.is_none()) {
                return Err(Flaw::Undeclared("elicitation"));
            }
            elicitation(params, origin)?;
        }
        "sampling/createMessage" => {
            if client.is_none_or(|can| can.sampling.is_none()) {
                return Err(Flaw::Undeclared("sampling"));
            }
            // What the client knows of other servers is none of the guest's business.
            params.remove("includeContext");
            let asked = params.get("systemPrompt").and_then(Value::as_str).unwrap_or_default();
            let marked = format!("A program in the VM {} asks this, not Nexus. {asked}", origin.name());
            params.insert("systemPrompt".into(), marked.trim_end().into());
        }
        "roots/list" => {
            if client.is_none_or(|can| can.roots.is_none()) {
                return Err(Flaw::Undeclared("roots"));
            }
        }
        _ => return Err(Flaw::Wrong("a question that guests may not ask")),
    }
    mark(params, origin);
    Ok(())
}

/// Only forms: an address to open would be an invitation that looks like the host's.
fn elicitation(params: &mut Map<String, Value>, origin: &Origin) -> Result<(), Flaw> {
    if params.get("mode").is_some_and(|mode| mode != "form") {
        return Err(Flaw::Wrong("guests may ask users with forms only"));
    }
    if !params.get("requestedSchema").is_some_and(Value::is_object) {
        return Err(Flaw::Wrong("an elicitation without a form"));
    }
    let Some(message) = params.get("message").and_then(Value::as_str) else {
        return Err(Flaw::Wrong("an elicitation without a message"));
    };
    let shown =
        format!("A program in the VM {} asks, not Nexus: {}", origin.name(), shown(message, SHOWN_MAX));
    params.insert("message".into(), shown.into());
    params.retain(|member, _| FORM.contains(&member.as_str()));
    if let Some(schema) = params.get_mut("requestedSchema") {
        tame(schema);
    }
    Ok(())
}

/// Makes every text of a form readable for people.
fn tame(value: &mut Value) {
    match value {
        Value::String(text) => *text = shown(text, SHOWN_MAX),
        Value::Object(members) => members.values_mut().for_each(tame),
        Value::Array(items) => items.iter_mut().for_each(tame),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Text for people: without control characters other than newlines and tabs, and shortened.
fn shown(text: &str, max: usize) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).take(max).collect()
}

/// Checks and marks the questions in a result that asks for input.
pub(super) fn inputs(
    result: &mut Map<String, Value>,
    client: Option<&ClientCapabilities>,
    origin: &Origin,
) -> Result<(), Flaw> {
    let Some(requests) = result.get_mut("inputRequests") else { return Ok(()) };
    let Some(requests) = requests.as_object_mut() else {
        return Err(Flaw::Wrong("inputRequests is not an object"));
    };
    if requests.len() > INPUTS_MAX {
        return Err(Flaw::Wrong("too many questions at once"));
    }
    for request in requests.values_mut() {
        let Some(request) = request.as_object_mut() else {
            return Err(Flaw::Wrong("a question is not an object"));
        };
        let method = request.get("method").and_then(Value::as_str).unwrap_or_default().to_owned();
        let params = request.entry("params").or_insert_with(|| json!({}));
        let Some(params) = params.as_object_mut() else {
            return Err(Flaw::Wrong("the parameters of a question are not an object"));
        };
        question(&method, params, client, origin)?;
    }
    Ok(())
}

/// How grave a log message is, by its level: its place in [`LEVELS`]; `None` if there is no such level.
pub(super) fn gravity(level: &str) -> Option<usize> {
    LEVELS.iter().position(|known| *known == level)
}

/// A guest's log message as the client gets it; `None` if it is none, or not grave enough.
pub(super) fn log(
    mut params: Map<String, Value>,
    least: usize,
    origin: &Origin,
) -> Option<Map<String, Value>> {
    let level = params.get("level").and_then(Value::as_str).and_then(gravity)?;
    if level < least || !params.contains_key("data") {
        return None;
    }
    params.retain(|key, _| matches!(&**key, "level" | "logger" | "data" | "_meta"));
    let logger = params.get("logger").and_then(Value::as_str).map(|name| shown(name, LOGGER_MAX));
    let logger = logger.map_or_else(
        || format!("guest {}", origin.name()),
        |logger| format!("guest {}: {logger}", origin.name()),
    );
    params.insert("logger".into(), logger.into());
    mark(&mut params, origin);
    Some(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn client(can: Value) -> ClientCapabilities {
        serde_json::from_value(can).unwrap()
    }

    fn ask(method: &str, params: Value, can: Value) -> Result<Value, Flaw> {
        let mut params = object(params);
        question(method, &mut params, Some(&client(can)), &Origin::sample())?;
        Ok(params.into())
    }

    #[test]
    fn a_guest_cannot_speak_for_the_host() {
        let mut result = object(json!({"content": [], "_meta": {"mine": 1, "dev.nexus/from": "host",
            "dev.nexus/error": {}, "dev.nexus/vm": {"name": "other"}, "io.modelcontextprotocol/serverInfo": {}}}));
        mark(&mut result, &Origin::sample());
        let meta = result["_meta"].as_object().unwrap();
        assert_eq!((meta.len(), &meta["mine"]), (3, &json!(1)), "{meta:?}");
        assert_eq!(
            (&meta["dev.nexus/from"], &meta["dev.nexus/vm"]["name"]),
            (&json!("guest"), &json!("web-1"))
        );
    }

    #[test]
    fn questions_say_who_asks() {
        let form = json!({"message": "Your\u{1b}[2J password?", "requestedSchema": {"type": "object", "properties": {}},
            "_meta": {"dev.nexus/call": 7}});
        let asked = ask("elicitation/create", form.clone(), json!({"elicitation": {}})).unwrap();
        assert_eq!(asked["message"], "A program in the VM web-1 asks, not Nexus: Your[2J password?");
        assert_eq!(
            (&asked["requestedSchema"], &asked["_meta"]["dev.nexus/call"]),
            (&form["requestedSchema"], &Value::Null)
        );
        let long = json!({"message": "x".repeat(9000), "requestedSchema": {}});
        let asked = ask("elicitation/create", long, json!({"elicitation": {"form": {}}})).unwrap();
        assert!(asked["message"].as_str().unwrap().len() < 2100);
    }

    #[test]
    fn only_what_the_client_declares_and_guests_may_is_asked() {
        let form = json!({"message": "m", "requestedSchema": {}});
        for (method, params, can, flaw) in [
            ("elicitation/create", form.clone(), json!({}), Flaw::Undeclared("elicitation")),
            (
                "elicitation/create",
                form.clone(),
                json!({"elicitation": {"url": {}}}),
                Flaw::Undeclared("elicitation"),
            ),
            (
                "elicitation/create",
                json!({"mode": "url", "message": "m", "url": "https://x", "elicitationId": "1"}),
                json!({"elicitation": {"form": {}, "url": {}}}),
                Flaw::Wrong("guests may ask users with forms only"),
            ),
            (
                "elicitation/create",
                json!({"message": "m"}),
                json!({"elicitation": {}}),
                Flaw::Wrong("an elicitation without a form"),
            ),
            ("sampling/createMessage", json!({}), json!({"elicitation": {}}), Flaw::Undeclared("sampling")),
            ("roots/list", json!({}), json!({}), Flaw::Undeclared("roots")),
            (
                "tools/call",
                json!({}),
                json!({"elicitation": {}}),
                Flaw::Wrong("a question that guests may not ask"),
            ),
        ] {
            assert_eq!(ask(method, params.clone(), can).unwrap_err(), flaw, "{method} {params}");
        }
        let sampled = json!({"messages": [], "maxTokens": 9, "includeContext": "allServers"});
        let asked = ask("sampling/createMessage", sampled, json!({"sampling": {}})).unwrap();
        assert_eq!(asked.get("includeContext"), None);
        assert_eq!(asked["maxTokens"], 9);
    }

    #[test]
    fn no_words_of_a_guest_pass_for_those_of_nexus() {
        let meta = json!({ "ui": { "resourceUri": "ui://nexus/dashboard" }, "ui/x": 1, "dev.nexus/from": "host", "own": 1 });
        let mut result = object(json!({ "tools": [{ "name": "a", "_meta": meta }], "_meta": meta }));
        mark(&mut result, &Origin::sample());
        assert_eq!(result["tools"][0]["_meta"], json!({ "own": 1 }));
        assert_eq!(result["_meta"]["dev.nexus/from"], GUEST);
        assert_eq!(result["_meta"].get("ui"), None);
        // An error that has a client open an address is an ordinary one, and its data say whose they are.
        assert_eq!(
            (error_code(-32_042).0, error_code(7).0, error_code(-32_602).0),
            (-32_603, -32_603, -32_602)
        );
        let data = error_data(Some(json!({ "code": "busy", "_meta": meta })), &Origin::sample()).unwrap();
        assert_eq!((&data["dev.nexus/from"], &data["_meta"]), (&json!(GUEST), &json!({ "own": 1 })));
    }

    #[test]
    fn questions_in_results_are_checked_each() {
        let of = |requests: Value| object(json!({"resultType": "input_required", "inputRequests": requests}));
        let can = client(json!({"elicitation": {}}));
        let form = json!({"method": "elicitation/create", "params": {"message": "m", "requestedSchema": {}}});
        let mut good = of(json!({"a": form}));
        inputs(&mut good, Some(&can), &Origin::sample()).unwrap();
        let message = good["inputRequests"]["a"]["params"]["message"].as_str().unwrap();
        assert!(message.starts_with("A program in the VM web-1 asks"), "{message}");
        let mut bad = of(json!({"a": form, "b": {"method": "roots/list"}}));
        assert_eq!(inputs(&mut bad, Some(&can), &Origin::sample()), Err(Flaw::Undeclared("roots")));
        let many: Map<_, _> = (0..17).map(|n| (n.to_string(), form.clone())).collect();
        assert!(inputs(&mut of(many.into()), Some(&can), &Origin::sample()).is_err());
    }

    #[test]
    fn log_messages_are_filtered_and_named() {
        let least = gravity("warning").unwrap();
        let said = |level: &str| object(json!({"level": level, "logger": "nexus", "data": 1, "more": 2}));
        assert_eq!(log(said("info"), least, &Origin::sample()), None);
        assert_eq!(log(said("loud"), 0, &Origin::sample()), None);
        let passed = log(said("error"), least, &Origin::sample()).unwrap();
        assert_eq!((&passed["logger"], passed.get("more")), (&json!("guest web-1: nexus"), None));
    }
}
