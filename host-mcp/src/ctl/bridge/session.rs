//! The state of a client's session that a new daemon needs to take it over. No IO.
//!
//! It keeps `initialize` and `notifications/initialized`, the log level and the subscriptions, which are all sent again,
//! and the pending requests, which are answered with an error when the daemon disconnects.

use std::collections::{BTreeMap, BTreeSet};

use nexus_schema::error::ERROR_META;
use nexus_schema::limits::LINE_MAX;
use nexus_schema::{ErrorCode, ToolError};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::rpc::Envelope;

/// The prefix of ids of the bridge's own requests; a client's ids are never interpreted.
const OWN_IDS: &str = "nexusctl/replay/";

/// What to do with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Pass it to the other side.
    Forward,
    /// Drop it.
    Drop,
    /// Drop it, and answer this.
    Answer(String),
}

/// A pending request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pending {
    /// `initialize`: sent again unchanged.
    Initialize,
    /// `tools/call`: answered with a tool error, which models can see.
    Call,
    /// A stream of notifications that ends with the connection.
    Listen,
    /// Anything else: answered with a protocol error.
    Other,
}

/// A client's session.
#[derive(Debug, Default)]
pub(super) struct Session {
    initialize: Option<Vec<u8>>,
    is_initialized: bool,
    announced: Option<Vec<u8>>,
    log_level: Option<Vec<u8>>,
    subscriptions: BTreeMap<String, Vec<u8>>,
    pending: BTreeMap<String, Pending>,
    asked: BTreeSet<String>,
    replays: u64,
}

impl Session {
    /// Handles a line of the client that is about to be sent.
    pub(super) fn client_says(&mut self, line: &[u8]) -> Fate {
        let Some(envelope) = Envelope::parse(line) else {
            // A batch, or a message that the daemon has to answer.
            let messages = serde_json::from_slice::<Vec<&RawValue>>(line).unwrap_or_default();
            for message in messages.into_iter().filter(|message| message.get().starts_with('{')) {
                self.client_says(message.get().as_bytes());
            }
            return Fate::Forward;
        };
        if line.len() > LINE_MAX {
            return match envelope.id().filter(|_| envelope.method.is_some()) {
                Some(id) => Fate::Answer(answer(&pending(&envelope), id, &too_large(line.len()))),
                None => Fate::Drop,
            };
        }
        match (envelope.method.as_deref(), envelope.id()) {
            (Some(method), Some(id)) => {
                self.pending.insert(id.into(), pending(&envelope));
                match method {
                    "initialize" => self.initialize = Some(line.into()),
                    "logging/setLevel" => self.log_level = Some(line.into()),
                    "resources/subscribe" => {
                        if let Some(uri) = uri(&envelope) {
                            self.subscriptions.insert(uri, line.into());
                        }
                    }
                    "resources/unsubscribe" => {
                        if let Some(uri) = uri(&envelope) {
                            self.subscriptions.remove(&uri);
                        }
                    }
                    _ => {}
                }
                Fate::Forward
            }
            (Some("notifications/initialized"), None) => {
                self.announced = Some(line.into());
                Fate::Forward
            }
            (Some("notifications/cancelled"), None) => {
                if let Some(id) = param(&envelope, "requestId") {
                    self.pending.remove(&id);
                }
                Fate::Forward
            }
            (Some(_), None) | (None, None) => Fate::Forward,
            // An answer to a question of the previous daemon is useless to the next one.
            (None, Some(id)) if self.asked.remove(id) => Fate::Forward,
            (None, Some(_)) => Fate::Drop,
        }
    }

    /// Handles a line of the daemon.
    pub(super) fn daemon_says(&mut self, line: &[u8]) -> Fate {
        let Some(envelope) = Envelope::parse(line) else { return Fate::Forward };
        match (&envelope.method, envelope.id()) {
            (Some(_), Some(id)) => {
                self.asked.insert(id.into());
            }
            (None, Some(id)) => {
                if is_own(id) {
                    return Fate::Drop;
                }
                if self.pending.remove(id) == Some(Pending::Initialize) && envelope.result.is_some() {
                    self.is_initialized = true;
                }
            }
            (Some(_) | None, None) => {}
        }
        Fate::Forward
    }

    /// Whether no pending request will still be answered.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.values().all(|pending| *pending == Pending::Listen)
    }

    /// Whether exactly one pending request will still be answered.
    pub(super) fn waits_for_one(&self) -> bool {
        let mut waiting = self.pending.values().filter(|pending| **pending != Pending::Listen);
        waiting.next().is_some() && waiting.next().is_none()
    }

    /// The daemon is lost: returns the answers for pending requests. An unanswered `initialize` is returned to be sent again.
    pub(super) fn lost(&mut self, error: &ToolError) -> (Vec<String>, Option<Vec<u8>>) {
        self.asked.clear();
        let mut answers = Vec::new();
        let mut again = None;
        for (id, pending) in std::mem::take(&mut self.pending) {
            match pending {
                Pending::Initialize => again = self.initialize.clone(),
                Pending::Call | Pending::Listen | Pending::Other => {
                    answers.push(answer(&pending, &id, error))
                }
            }
        }
        (answers, again)
    }

    /// The first message for a new daemon, and the id of its answer; `None` if the client has no session.
    pub(super) fn replay(&mut self) -> Option<(Vec<u8>, String)> {
        if !self.is_initialized {
            return None;
        }
        let line = self.initialize.clone()?;
        let id = self.own_id();
        with_id(&line, &id).map(|line| (line, format!("\"{id}\"")))
    }

    /// The messages after its answer.
    pub(super) fn replay_rest(&mut self) -> Vec<Vec<u8>> {
        let mut lines: Vec<_> = self.announced.iter().cloned().collect();
        let requests: Vec<_> = self.log_level.iter().chain(self.subscriptions.values()).cloned().collect();
        for request in requests {
            let id = self.own_id();
            lines.extend(with_id(&request, &id));
        }
        lines
    }

    fn own_id(&mut self) -> String {
        self.replays += 1;
        format!("{OWN_IDS}{}", self.replays)
    }
}

/// The answer to a line that was never sent, if it is a request.
pub(super) fn refuse(line: &[u8], error: &ToolError) -> Option<String> {
    let envelope = Envelope::parse(line)?;
    envelope.method.as_ref()?;
    Some(answer(&pending(&envelope), envelope.id()?, error))
}

/// The answer to a line that was too long.
pub(super) fn refuse_unread() -> String {
    let error = ToolError::new(ErrorCode::TooLarge, "a request was too large to be read");
    answer(&Pending::Other, "null", &error)
}

fn pending(envelope: &Envelope<'_>) -> Pending {
    match envelope.method.as_deref() {
        Some("initialize") => Pending::Initialize,
        Some("tools/call") => Pending::Call,
        Some("subscriptions/listen") => Pending::Listen,
        Some(_) | None => Pending::Other,
    }
}

fn is_own(id: &str) -> bool {
    id.strip_prefix('"').is_some_and(|id| id.starts_with(OWN_IDS))
}

fn too_large(length: usize) -> ToolError {
    ToolError::new(ErrorCode::TooLarge, format!("the request has {length} bytes, the limit is {LINE_MAX}"))
        .hint("write large files in pieces, with append")
}

fn answer(pending: &Pending, id: &str, error: &ToolError) -> String {
    let id: Option<Box<RawValue>> = RawValue::from_string(id.into()).ok();
    let message = match pending {
        Pending::Call => json!({
            "jsonrpc": "2.0", "id": id,
            "result": {
                "resultType": "complete",
                "content": [{ "type": "text", "text": error.to_string() }],
                "isError": true,
                "_meta": { ERROR_META: error },
            },
        }),
        Pending::Initialize | Pending::Listen | Pending::Other => json!({
            "jsonrpc": "2.0", "id": id,
            "error": { "code": -32000, "message": error.to_string(), "data": error },
        }),
    };
    message.to_string()
}

fn param(envelope: &Envelope<'_>, name: &str) -> Option<String> {
    let params: BTreeMap<&str, &RawValue> = serde_json::from_str(envelope.params?.get()).ok()?;
    params.get(name).map(|value| value.get().to_owned())
}

fn uri(envelope: &Envelope<'_>) -> Option<String> {
    serde_json::from_str(&param(envelope, "uri")?).ok()
}

/// The same request with one of the bridge's own ids.
fn with_id(line: &[u8], id: &str) -> Option<Vec<u8>> {
    let mut message: Value = serde_json::from_slice(line).ok()?;
    message["id"] = id.into();
    serde_json::to_vec(&message).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIALIZE: &[u8] =
        br#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"x"}}"#;

    fn gone() -> ToolError {
        ToolError::new(ErrorCode::DaemonDown, "the connection to the daemon was lost")
    }

    fn ready() -> Session {
        let mut session = Session::default();
        assert_eq!(session.client_says(INITIALIZE), Fate::Forward);
        assert_eq!(session.daemon_says(br#"{"jsonrpc":"2.0","id":0,"result":{}}"#), Fate::Forward);
        assert_eq!(
            session.client_says(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#),
            Fate::Forward
        );
        session
    }

    #[test]
    fn pending_requests_are_answered_once() {
        let mut session = ready();
        for line in [
            &br#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"vm_list"}}"#[..],
            br#"{"jsonrpc":"2.0","id":"1","method":"tools/list"}"#,
            br#"{"jsonrpc":"2.0","id":2,"method":"tools/list"}"#,
            br#"{"jsonrpc":"2.0","id":3,"method":"tools/list"}"#,
            br#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":3}}"#,
        ] {
            assert_eq!(session.client_says(line), Fate::Forward);
        }
        assert!(!session.is_idle());
        session.daemon_says(br#"{"jsonrpc":"2.0","id":2,"result":{}}"#);
        let (answers, again) = session.lost(&gone());
        assert_eq!(again, None);
        let answers: Vec<Value> = answers.iter().map(|a| serde_json::from_str(a).unwrap()).collect();
        assert_eq!(answers.len(), 2, "{answers:?}");
        assert_eq!(answers[0]["id"], "1");
        assert_eq!(answers[0]["error"]["data"]["code"], "daemon_down");
        assert_eq!(answers[1]["id"], 1);
        assert_eq!(answers[1]["result"]["isError"], true);
        assert_eq!(answers[1]["result"]["_meta"][ERROR_META]["code"], "daemon_down");
        assert!(session.is_idle());
        assert_eq!(session.lost(&gone()).0.len(), 0);
    }

    #[test]
    fn a_session_is_replayed_to_the_next_daemon() {
        let mut session = ready();
        session.client_says(
            br#"{"jsonrpc":"2.0","id":5,"method":"resources/subscribe","params":{"uri":"nexus://vms"}}"#,
        );
        session
            .client_says(br#"{"jsonrpc":"2.0","id":6,"method":"resources/subscribe","params":{"uri":"a"}}"#);
        session.client_says(
            br#"{"jsonrpc":"2.0","id":7,"method":"resources/unsubscribe","params":{"uri":"a"}}"#,
        );
        session.lost(&gone());
        let (line, id) = session.replay().unwrap();
        let line: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(line["method"], "initialize");
        assert_eq!(line["params"]["protocolVersion"], "x");
        assert_eq!(line["id"].to_string(), id);
        let rest: Vec<Value> =
            session.replay_rest().iter().map(|l| serde_json::from_slice(l).unwrap()).collect();
        assert_eq!(rest.len(), 2, "{rest:?}");
        assert_eq!(rest[0]["method"], "notifications/initialized");
        assert_eq!(rest[1]["params"]["uri"], "nexus://vms");
        let answer = format!(r#"{{"jsonrpc":"2.0","id":{},"result":{{}}}}"#, rest[1]["id"]);
        assert_eq!(session.daemon_says(answer.as_bytes()), Fate::Drop);
    }

    #[test]
    fn an_unanswered_initialize_is_sent_again() {
        let mut session = Session::default();
        session.client_says(INITIALIZE);
        assert_eq!(session.replay(), None);
        let (answers, again) = session.lost(&gone());
        assert_eq!((answers.len(), again.as_deref()), (0, Some(INITIALIZE)));
    }

    #[test]
    fn answers_to_a_daemon_that_is_gone_are_dropped() {
        let mut session = ready();
        session.daemon_says(br#"{"jsonrpc":"2.0","id":9,"method":"roots/list"}"#);
        session.lost(&gone());
        assert_eq!(session.client_says(br#"{"jsonrpc":"2.0","id":9,"result":{"roots":[]}}"#), Fate::Drop);
        session.daemon_says(br#"{"jsonrpc":"2.0","id":9,"method":"roots/list"}"#);
        assert_eq!(session.client_says(br#"{"jsonrpc":"2.0","id":9,"result":{"roots":[]}}"#), Fate::Forward);
    }

    #[test]
    fn requests_that_are_too_large_are_answered() {
        let mut session = ready();
        let line = format!(r#"{{"method":"tools/call","params":"{}","id":4}}"#, "x".repeat(LINE_MAX));
        let Fate::Answer(answer) = session.client_says(line.as_bytes()) else { panic!("not answered") };
        assert!(answer.contains("too_large") && answer.contains(r#""id":4"#), "{answer}");
        assert!(session.is_idle());
    }

    #[test]
    fn the_requests_of_a_batch_wait_for_their_answers() {
        let mut session = ready();
        let batch = br#"[{"jsonrpc":"2.0","id":4,"method":"ping"},[1],{"jsonrpc":"2.0","id":5,"method":"tools/list"}]"#;
        assert_eq!(session.client_says(batch), Fate::Forward);
        session.daemon_says(br#"{"jsonrpc":"2.0","id":4,"result":{}}"#);
        assert!(!session.is_idle());
        session.daemon_says(br#"{"jsonrpc":"2.0","id":5,"result":{}}"#);
        assert!(session.is_idle());
    }

    #[test]
    fn only_requests_are_refused() {
        assert!(refuse(br#"{"id":1,"method":"ping"}"#, &gone()).is_some());
        assert!(refuse(br#"{"method":"notifications/initialized"}"#, &gone()).is_none());
        assert!(refuse(br#"{"id":1,"result":{}}"#, &gone()).is_none());
        assert!(refuse(b"garbage", &gone()).is_none());
    }
}
