//! Calls of guest tools over HTTP that pass rmcp by: plain ones, whose answer is one JSON object. Whatever is not plain —
//! progress wanted, headers that contradict, a session that is not here — is left to rmcp, which says what is wrong.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Response, StatusCode, header};
use nexus_core::Caller;
use nexus_core::guest::wire::Envelope;
use nexus_core::guest::{CallOptions, LinkError};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::sessions::Sessions;
use super::{Body, respond};
use crate::forward::{self, Arguments, CallParams, Origin, Timed};
use crate::host::{Host, View};

const SESSION: &str = "mcp-session-id";
const VERSION: &str = "mcp-protocol-version";
/// The revisions that have sessions.
const WITH_SESSIONS: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"];
/// The revision that has none.
const WITHOUT_SESSIONS: &str = "2026-07-28";

/// Calls under way, by session and request id as it stands in the request.
#[derive(Debug, Default)]
pub(super) struct Calls(Mutex<HashMap<(String, String), CancellationToken>>);

impl Calls {
    fn running(&self) -> MutexGuard<'_, HashMap<(String, String), CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a plain call of a guest tool, or its cancellation; `None` for everything else.
    pub(super) async fn answer(
        &self,
        host: &Host,
        sessions: &Sessions,
        caller: &Caller,
        view: View,
        head: &Parts,
        body: &Bytes,
    ) -> Option<Response<Body>> {
        if head.method != Method::POST || !speaks_json(&head.headers) {
            return None;
        }
        let message = Envelope::parse(body)?;
        if message.method.as_deref() == Some("notifications/cancelled") {
            return self.cancel(sessions, &head.headers, &message);
        }
        if !forward::may_be_call(&message) {
            return None;
        }
        let params = CallParams::parse(message.params?)?;
        let tool = host.registry().guest_tool(view, &params.name)?;
        if params.progress_token().is_some() {
            return None;
        }
        let session = match params.version() {
            None => Some(session_of(sessions, &head.headers)?),
            Some(version) => {
                is_plain_request(&head.headers, version, &params.name).then_some(())?;
                None
            }
        };
        let era = params.era(session.is_some())?;
        let id = message.id?.get();
        host.counters().guest_calls.add();
        let timed = Timed::start(host);
        let mut out = Vec::with_capacity(512);
        forward::write_response_start(&mut out, id);
        let found = Arguments::parse(params.arguments, view)
            .and_then(|arguments| Ok((forward::find(host, caller, view, &arguments)?, arguments)));
        match found {
            Ok((guest, arguments)) => {
                let mut text = Vec::new();
                arguments.write(&mut text);
                let text: Box<RawValue> = serde_json::from_slice(&text).ok()?;
                let key = session.map(|session| (session.to_owned(), id.to_owned()));
                let running = Running::start(self, key)?;
                let options = CallOptions {
                    deadline: arguments.deadline(tool),
                    progress: None,
                    cancel: running.cancel.clone(),
                };
                let outcome = guest.link.call(tool, &text, options).await;
                drop(running);
                let origin = Origin::of(&guest);
                let code = match &outcome {
                    Err(LinkError::Cancelled) => {
                        out.truncate(0);
                        "cancelled"
                    }
                    outcome => {
                        let outcome = outcome.as_deref().map_err(Clone::clone);
                        forward::write_outcome(&mut out, outcome, &origin, era)
                    }
                };
                timed.record(host, &caller.owner, tool, Some(guest.vm), code);
                if out.is_empty() {
                    // There is no answer to a cancelled call, but there must be one to its HTTP request.
                    return Some(respond(StatusCode::ACCEPTED, "application/json", Bytes::new()));
                }
            }
            Err(error) => {
                timed.record(host, &caller.owner, tool, view.scope(), error.code.as_str());
                forward::write_error(&mut out, &error, None, era);
            }
        }
        out.push(b'}');
        Some(respond(StatusCode::OK, "application/json", Bytes::from(out)))
    }

    fn cancel(
        &self,
        sessions: &Sessions,
        headers: &HeaderMap,
        message: &Envelope<'_>,
    ) -> Option<Response<Body>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Cancelled<'a> {
            #[serde(borrow)]
            request_id: &'a RawValue,
        }
        let session = session_of(sessions, headers)?;
        let params: Cancelled<'_> = serde_json::from_str(message.params?.get()).ok()?;
        let key = (session.to_owned(), params.request_id.get().to_owned());
        self.running().get(&key)?.cancel();
        Some(respond(StatusCode::ACCEPTED, "application/json", Bytes::new()))
    }
}

/// A call that can be cancelled as long as it runs.
struct Running<'a> {
    calls: &'a Calls,
    key: Option<(String, String)>,
    cancel: CancellationToken,
}

impl<'a> Running<'a> {
    /// `None` if a call of the same id is under way in the session.
    fn start(calls: &'a Calls, key: Option<(String, String)>) -> Option<Self> {
        let cancel = CancellationToken::new();
        if let Some(key) = &key {
            let mut running = calls.running();
            if running.contains_key(key) {
                return None;
            }
            running.insert(key.clone(), cancel.clone());
        }
        Some(Self { calls, key, cancel })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.calls.running().remove(key);
        }
    }
}

/// Whether the client sends JSON and takes it back.
fn speaks_json(headers: &HeaderMap) -> bool {
    let accepts = |what: &str| {
        headers
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|kind| kind.trim().eq_ignore_ascii_case(what)))
    };
    let sends = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).is_some_and(|v| {
        v.split(';').next().is_some_and(|v| v.trim().eq_ignore_ascii_case("application/json"))
    });
    sends && accepts("application/json") && accepts("text/event-stream")
}

/// The only value of a header; `None` also where it is there twice.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let (first, second) = (values.next()?, values.next());
    if second.is_some() {
        return None;
    }
    first.to_str().ok()
}

/// The session that a request belongs to, if it may pass rmcp by.
fn session_of<'a>(sessions: &Sessions, headers: &'a HeaderMap) -> Option<&'a str> {
    if headers.contains_key(VERSION) && !WITH_SESSIONS.contains(&only(headers, VERSION)?) {
        return None;
    }
    only(headers, SESSION).filter(|session| sessions.may_pass_by(session))
}

/// Whether the headers of a request without a session say the same as its body.
fn is_plain_request(headers: &HeaderMap, version: &str, tool: &str) -> bool {
    version == WITHOUT_SESSIONS
        && only(headers, VERSION) == Some(version)
        && only(headers, "mcp-method") == Some("tools/call")
        && only(headers, "mcp-name") == Some(tool)
        && !headers.keys().any(|name| name.as_str().starts_with("mcp-param-"))
}
