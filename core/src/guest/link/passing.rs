//! Requests that are passed to a guest as clients send them, whatever their method, and what the guest says meanwhile: questions to
//! the client, and log messages. Both name the request that they belong to; whatever names none is refused or dropped.

use std::fmt;
use std::time::Duration;

use nexus_schema::link::{CALL_META, EARLY_DATA, KEEPS_CALLS};
use serde_json::value::RawValue;

use super::{CallId, CallSink, Link, LinkError};
use crate::guest::lines::Outbox;
use crate::guest::scan;
use crate::guest::wire::{self, Members};

/// What guests may ask of clients.
const QUESTIONS: [&str; 3] = ["elicitation/create", "sampling/createMessage", "roots/list"];
/// The largest question or log message, in bytes.
const ASIDE_MAX: usize = 64 << 10;
/// The longest id of a question, in bytes.
const ID_MAX: usize = 200;
/// How many bytes may wait to be written to a guest; beyond that its questions get no answer.
const BACKLOG_MAX: usize = 4 << 20;

/// What a guest's own MCP server says that it offers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offers {
    /// Tools.
    pub tools: bool,
    /// Prompts.
    pub prompts: bool,
    /// Resources.
    pub resources: bool,
    /// Completion of arguments.
    pub completions: bool,
    /// Log messages during a request.
    pub logging: bool,
    /// Answers to calls that outlive the loss of their connection.
    pub(super) keeps_calls: bool,
    /// Frames with the request that opens a TCP stream.
    pub(crate) early_data: bool,
}

impl Offers {
    /// Reads the `capabilities` of an `initialize` result. Anything else offers nothing.
    pub(super) fn read(capabilities: Option<&RawValue>) -> Self {
        let members = capabilities.and_then(Members::parse);
        let has = |name: &str| {
            members.as_ref().and_then(|members| members.get(name)).is_some_and(|of| of.get().starts_with('{'))
        };
        let experimental = members.as_ref().and_then(|members| Members::parse(members.get("experimental")?));
        let tries = |name: &str| experimental.as_ref().is_some_and(|members| members.get(name).is_some());
        Self {
            tools: has("tools"),
            prompts: has("prompts"),
            resources: has("resources"),
            completions: has("completions"),
            logging: has("logging"),
            keeps_calls: tries(KEEPS_CALLS),
            early_data: tries(EARLY_DATA),
        }
    }
}

/// A request of a guest to the client whose request it is working on. Dropping it refuses it.
#[derive(Debug)]
pub struct Question {
    /// `elicitation/create`, `sampling/createMessage` or `roots/list`.
    pub method: &'static str,
    /// Its parameters, as the guest wrote them: an object of at most 64 KiB.
    pub params: Box<RawValue>,
    /// The way back.
    pub reply: Reply,
}

/// Answers one [`Question`]; dropped without an answer, it refuses.
pub struct Reply {
    outbox: Outbox,
    /// The guest's id, verbatim; empty once answered.
    id: Box<str>,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Reply {
    /// Sends the client's result: a JSON object.
    pub fn result(mut self, result: &RawValue) {
        self.send(r#""result":"#, |out| out.extend_from_slice(result.get().as_bytes()));
    }

    /// Sends an error.
    pub fn refuse(mut self, code: i32, message: &str) {
        self.error(code, message);
    }

    fn error(&mut self, code: i32, message: &str) {
        self.send(r#""error":"#, |out| {
            out.extend_from_slice(format!(r#"{{"code":{code},"message":"#).as_bytes());
            wire::write_string(out, message);
            out.push(b'}');
        });
    }

    fn send(&mut self, member: &str, value: impl FnOnce(&mut Vec<u8>)) {
        let id = std::mem::take(&mut self.id);
        if id.is_empty() || self.outbox.len() > BACKLOG_MAX {
            return;
        }
        self.outbox.push(|out| {
            out.extend_from_slice(format!(r#"{{"jsonrpc":"2.0","id":{id},{member}"#).as_bytes());
            value(out);
            out.push(b'}');
        });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.error(-32601, "not offered to guests");
    }
}

/// The question that a guest's request is, and the request of the host that it belongs to; `None` if it is none that may be passed on.
pub(super) fn question(
    method: &str,
    id: &RawValue,
    params: Option<&RawValue>,
    outbox: &Outbox,
) -> Option<(u64, Question)> {
    let method = QUESTIONS.into_iter().find(|known| *known == method)?;
    let params = params?;
    let call = call_of(params)?;
    if id.get().len() > ID_MAX {
        return None;
    }
    let reply = Reply { outbox: outbox.clone(), id: id.get().into() };
    Some((call, Question { method, params: params.to_owned(), reply }))
}

/// The request of the host that a question or log message names, if it is small and sound.
pub(super) fn call_of(params: &RawValue) -> Option<u64> {
    if params.get().len() > ASIDE_MAX || scan::check(params).is_err() {
        return None;
    }
    let meta = Members::parse(params)?.get("_meta")?;
    Members::parse(meta)?.get(CALL_META)?.get().parse().ok()
}

impl Link {
    /// What the guest's own MCP server offers; nothing before the link was up.
    pub fn offers(&self) -> Offers {
        self.shared.calls().offers
    }

    /// Starts a request of any method, without waiting for its answer. `params` appends its parameters, an object, and is given the
    /// request's id, which is its progress token and what the guest's questions name. It is written at the next [`Link::flush`].
    ///
    /// # Errors
    /// The link is not up or has too much to do; nothing was written then.
    pub fn pass(
        &self,
        method: &str,
        params: impl FnOnce(&mut Vec<u8>, u64),
        wants_progress: bool,
        deadline: Duration,
        sink: Box<dyn CallSink>,
    ) -> Result<CallId, LinkError> {
        let begun = self.shared.begin(deadline, wants_progress, sink, |out, id| {
            out.extend_from_slice(br#""method":"#);
            wire::write_string(out, method);
            out.extend_from_slice(br#","params":"#);
            params(out, id);
        });
        begun.map_err(|(error, _)| error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn capabilities_are_objects() {
        let offers = Offers::read(Some(&raw(
            r#"{"tools":{},"prompts":{"listChanged":true},"resources":true,"logging":null}"#,
        )));
        assert_eq!(offers, Offers { tools: true, prompts: true, ..Offers::default() });
        let offers = Offers::read(Some(&raw(r#"{"experimental":{"dev.nexus/early":{}}}"#)));
        assert_eq!(offers, Offers { early_data: true, ..Offers::default() });
        for odd in ["[]", "7", r#""tools""#] {
            assert_eq!(Offers::read(Some(&raw(odd))), Offers::default(), "{odd}");
        }
        assert_eq!(Offers::read(None), Offers::default());
    }

    #[test]
    fn only_questions_of_a_request_are_passed() {
        let outbox = Outbox::default();
        let asked = |method: &str, id: &str, params: &str| {
            question(method, &raw(id), Some(&raw(params)), &outbox).map(|(call, question)| {
                question.reply.result(&raw("{}"));
                call
            })
        };
        let good = r#"{"message":"m","_meta":{"dev.nexus/call":7}}"#;
        assert_eq!(asked("elicitation/create", "1", good), Some(7));
        assert_eq!(asked("tools/call", "1", good), None);
        assert_eq!(asked("elicitation/create", &format!("\"{}\"", "x".repeat(300)), good), None);
        for odd in [
            r#"{"message":"m"}"#,
            r#"{"_meta":{"dev.nexus/call":"7"}}"#,
            r#"{"_meta":{"dev.nexus/call":-7}}"#,
            r#"{"_meta":[7]}"#,
            "[]",
            r#"{"x":"\ud800","_meta":{"dev.nexus/call":7}}"#,
        ] {
            assert_eq!(asked("elicitation/create", "1", odd), None, "{odd}");
        }
        let large = format!(r#"{{"x":"{}","_meta":{{"dev.nexus/call":7}}}}"#, "x".repeat(ASIDE_MAX));
        assert_eq!(asked("elicitation/create", "1", &large), None);
    }

    #[test]
    fn each_question_gets_one_answer() {
        let outbox = Outbox::default();
        let ask = || Reply { outbox: outbox.clone(), id: "7".into() };
        let before = outbox.len();
        ask().result(&raw(r#"{"action":"accept"}"#));
        let line = r#"{"jsonrpc":"2.0","id":7,"result":{"action":"accept"}}"#;
        assert_eq!(outbox.len() - before, line.len() + 1);
        let before = outbox.len();
        drop(ask());
        let line = r#"{"jsonrpc":"2.0","id":7,"error":{"code":-32601,"message":"not offered to guests"}}"#;
        assert_eq!(outbox.len() - before, line.len() + 1);
    }
}
