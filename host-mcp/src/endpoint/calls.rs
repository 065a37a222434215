//! Handles plain calls of guest tools over HTTP without rmcp; their response is one JSON object. Everything that is not
//! plain (progress, contradicting headers, an unknown session) is left to rmcp, which reports what is wrong.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Response, StatusCode, header};
use nexus_core::host::rpc::Envelope;
use nexus_schema::ToolError;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::sessions::Sessions;
use super::{Body, respond};
use crate::forward::{self, CallParams, Client, Era, ForwardedCall, Handle};

pub(super) const SESSION: &str = "mcp-session-id";
const VERSION: &str = "mcp-protocol-version";
/// The revisions with sessions.
const WITH_SESSIONS: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"];
/// The revision without sessions.
const WITHOUT_SESSIONS: &str = "2026-07-28";

/// The running calls of sessions.
#[derive(Debug, Default)]
pub(super) struct Calls(Mutex<HashMap<Key, Handle>>);

/// A session, and the id of a request in it, in its original JSON.
type Key = (String, String);

impl Calls {
    fn running(&self) -> MutexGuard<'_, HashMap<Key, Handle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a plain call of a guest tool, or its cancellation; `None` for everything else.
    pub(super) async fn answer(
        &self,
        client: &Client,
        sessions: &Sessions,
        head: &Parts,
        message: &Envelope<'_>,
    ) -> Option<Response<Body>> {
        if !takes_both(&head.headers) {
            return None;
        }
        if message.method.as_deref() == Some("notifications/cancelled") {
            return self.cancel(sessions, &head.headers, message);
        }
        if !forward::may_be_call(message) {
            return None;
        }
        let params = CallParams::parse(message.params?)?;
        let tool = client.guest_tool(&params.name)?;
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
        if tool.becomes_task()
            && params.declares_tasks(session.is_some_and(|session| sessions.take_tasks(session)))
        {
            return None;
        }
        let era = params.era(session.is_some())?;
        let id = message.id?.get();
        let handle = Handle::default();
        let _running =
            Running::start(self, session.map(|session| (session.to_owned(), id.to_owned())), &handle)?;
        let how = (era, params.trace());
        let admitted = ForwardedCall::admit_awake(client, tool, params.arguments, how, &handle).await;
        let (call, arguments) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => return Some(failed(id, &error, era)),
        };
        let mut out = Vec::with_capacity(512);
        forward::write_response_start(&mut out, id);
        Some(match call.wait(&arguments, None, out).await {
            Some(mut out) => {
                out.push(b'}');
                respond(StatusCode::OK, "application/json", Bytes::from(out))
            }
            // A cancelled call has no answer, but its HTTP request needs one.
            None => respond(StatusCode::ACCEPTED, "application/json", Bytes::new()),
        })
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
        let handle = self.running().get(&key).cloned()?;
        handle.cancel();
        Some(respond(StatusCode::ACCEPTED, "application/json", Bytes::new()))
    }
}

/// The response to a call that failed on the host.
pub(super) fn failed(id: &str, error: &ToolError, era: Era) -> Response<Body> {
    let mut out = Vec::new();
    forward::write_response_start(&mut out, id);
    forward::write_error(&mut out, error, era);
    out.push(b'}');
    respond(StatusCode::OK, "application/json", Bytes::from(out))
}

/// A call that can be cancelled while it runs.
struct Running<'a> {
    calls: &'a Calls,
    key: Option<Key>,
}

impl<'a> Running<'a> {
    /// `None` if a call with the same id is running in the session.
    fn start(calls: &'a Calls, key: Option<Key>, handle: &Handle) -> Option<Self> {
        if let Some(key) = &key {
            let mut running = calls.running();
            if running.contains_key(key) {
                return None;
            }
            running.insert(key.clone(), handle.clone());
        }
        Some(Self { calls, key })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.calls.running().remove(key);
        }
    }
}

/// Whether the client sends JSON.
pub(super) fn sends_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).is_some_and(|v| {
        v.split(';').next().is_some_and(|v| v.trim().eq_ignore_ascii_case("application/json"))
    })
}

/// Whether the client accepts both JSON and event streams.
fn takes_both(headers: &HeaderMap) -> bool {
    let accepts = |what: &str| {
        headers
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|kind| kind.trim().eq_ignore_ascii_case(what)))
    };
    accepts("application/json") && accepts("text/event-stream")
}

/// Whether the headers name the revision without sessions.
pub(super) fn is_without_sessions(headers: &HeaderMap) -> bool {
    only(headers, VERSION) == Some(WITHOUT_SESSIONS)
}

/// The only value of a header; `None` if it is missing or repeated.
fn only<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let (first, second) = (values.next()?, values.next());
    if second.is_some() {
        return None;
    }
    first.to_str().ok()
}

/// The session of a request, if the request may bypass rmcp.
fn session_of<'a>(sessions: &Sessions, headers: &'a HeaderMap) -> Option<&'a str> {
    if headers.contains_key(VERSION) && !WITH_SESSIONS.contains(&only(headers, VERSION)?) {
        return None;
    }
    only(headers, SESSION).filter(|session| sessions.may_pass_by(session))
}

/// Whether the headers of a request without a session match its body.
fn is_plain_request(headers: &HeaderMap, version: &str, tool: &str) -> bool {
    version == WITHOUT_SESSIONS
        && only(headers, VERSION) == Some(version)
        && only(headers, "mcp-method") == Some("tools/call")
        && only(headers, "mcp-name") == Some(tool)
        && !headers.keys().any(|name| name.as_str().starts_with("mcp-param-"))
}
