//! Reads the bodies of requests, with limits on size and time.

use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use nexus_core::host::rpc::Envelope;
use nexus_core::link::wire::write_string;
use nexus_schema::limits::HTTP_BODY_MAX;
use rmcp::model::ClientJsonRpcMessage;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::calls::{failed, sends_json};
use super::{Body, plain, respond};
use crate::forward;

/// How long a client may take for the body of its request.
pub const BODY_TIME: Duration = Duration::from_secs(30);
/// How much of an oversized body is read before it is refused, so that a client that has sent all of it can
/// read the refusal.
const DRAINED_MAX: usize = 64 << 20;

/// Reads a body, for at most `longest`; on failure, the error is the response.
pub(super) async fn read(head: &Parts, body: Incoming, longest: Duration) -> Result<Bytes, Response<Body>> {
    let is_asked_first = head.headers.contains_key(header::EXPECT);
    if is_asked_first && body.size_hint().lower() > HTTP_BODY_MAX as u64 {
        return Err(too_large());
    }
    match timeout(longest, collect(body)).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => Err(too_large()),
        Ok(Err(_)) => Err(closing(StatusCode::BAD_REQUEST, "the body did not arrive\n")),
        Err(_) => {
            let text = format!("the body did not arrive within {} s\n", longest.as_secs());
            Err(closing(StatusCode::REQUEST_TIMEOUT, &text))
        }
    }
}

/// The complete body; `None` if it is too large.
async fn collect(mut body: Incoming) -> Result<Option<Bytes>, hyper::Error> {
    let (mut whole, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        total += data.len();
        if total <= HTTP_BODY_MAX {
            whole.extend_from_slice(&data);
        } else if total > DRAINED_MAX {
            break;
        } else {
            whole = Vec::new();
        }
    }
    Ok((total <= HTTP_BODY_MAX).then(|| whole.into()))
}

fn too_large() -> Response<Body> {
    let text = format!("the request body is larger than {} MiB\n", HTTP_BODY_MAX >> 20);
    closing(StatusCode::PAYLOAD_TOO_LARGE, &text)
}

/// A refusal that closes the connection.
fn closing(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = plain(status, text);
    response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    response
}

/// The messages of a batch; `None` if the body is not a batch.
pub(super) fn batch<'a>(head: &Parts, body: &'a Bytes) -> Option<Vec<&'a RawValue>> {
    let may_be = head.method == Method::POST && sends_json(&head.headers);
    (may_be && body.trim_ascii_start().starts_with(b"[")).then(|| serde_json::from_slice(body).ok())?
}

/// The JSON-RPC message in a body; `None` if none is expected.
pub(super) fn message<'a>(
    head: &Parts,
    body: &'a Bytes,
) -> Result<Option<Envelope<'a>>, Box<Response<Body>>> {
    if head.method != Method::POST || !sends_json(&head.headers) {
        return Ok(None);
    }
    match Envelope::parse(body) {
        Some(message) => Ok(Some(message)),
        None if serde_json::from_slice::<IgnoredAny>(body).is_err() => {
            Err(Box::new(refused(None, -32700, "the body is not JSON")))
        }
        None => Err(Box::new(refused(None, -32600, "the body is not a JSON-RPC 2.0 message"))),
    }
}

/// The response to a message that rmcp cannot decode; `None` if it can.
pub(super) fn complaint(message: &Envelope<'_>, body: &Bytes) -> Option<Response<Body>> {
    if serde_json::from_slice::<ClientJsonRpcMessage>(body).is_ok() {
        return None;
    }
    let id = message.id.map(|id| id.get());
    if let (Some(id), Some((error, era))) = (id, forward::flaw_of_call(message)) {
        return Some(failed(id, &error, era));
    }
    Some(match (&message.method, id) {
        (Some(method), Some(_)) if message.is_well_formed() => {
            let method: String = method.chars().take(64).collect();
            refused(id, -32602, &format!("invalid parameters for {method}"))
        }
        _ => refused(id, -32600, "the body is not a JSON-RPC 2.0 message"),
    })
}

/// The response to a method that the revision of the request does not have.
pub(super) fn unknown_method(message: &Envelope<'_>) -> Response<Body> {
    let method = message.method.as_deref().unwrap_or_default();
    let mut response = refused(message.id.map(|id| id.get()), -32601, method);
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// The response to an invalid JSON-RPC request.
pub(super) fn refused(id: Option<&str>, code: i32, message: &str) -> Response<Body> {
    let mut out =
        format!(r#"{{"jsonrpc":"2.0","id":{},"error":{{"code":{code},"message":"#, id.unwrap_or("null"))
            .into_bytes();
    write_string(&mut out, message);
    out.extend_from_slice(b"}}");
    respond(StatusCode::BAD_REQUEST, "application/json", Bytes::from(out))
}
