//! Batches: several messages in the body of one request, as in revisions up to 2025-03-26.

use bytes::Bytes;
use futures::future::join_all;
use http::request::Parts;
use http::{Response, StatusCode, header};
use http_body_util::BodyExt;
use nexus_core::host::rpc::Envelope;
use serde_json::value::RawValue;

use super::{Body, Endpoints, Scoped, body, respond};

/// How many messages one request may hold.
const MESSAGES_MAX: usize = 64;

/// Handles the messages concurrently. The answers to the requests among them form one array, in the same order.
pub(super) async fn answer(
    endpoints: &Endpoints,
    scoped: &Scoped,
    mut head: Parts,
    messages: &[&RawValue],
) -> Response<Body> {
    let begins_session = |message: &&RawValue| {
        Envelope::parse(message.get().as_bytes()).is_some_and(|m| m.method.as_deref() == Some("initialize"))
    };
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        let text = format!("a batch holds 1 to {MESSAGES_MAX} messages, got {}", messages.len());
        return body::refused(None, -32600, &text);
    }
    if messages.iter().any(begins_session) {
        return body::refused(None, -32600, "`initialize` has to be a request of its own");
    }
    head.headers.remove(header::CONTENT_LENGTH);
    let answers = messages.iter().map(|message| {
        let message = Bytes::copy_from_slice(message.get().as_bytes());
        Box::pin(endpoints.message(scoped, head.clone(), message))
    });
    let mut out = vec![b'['];
    for answer in join_all(answers).await {
        let (head, content) = answer.into_parts();
        let kind = head.headers.get(header::CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
        let (is_json, is_events) = (kind == b"application/json", kind == b"text/event-stream");
        let content = content.collect().await.map(|content| content.to_bytes()).unwrap_or_default();
        if !head.status.is_success() && !is_json {
            // It concerns the request as a whole, such as an unknown session.
            return Response::from_parts(head, http_body_util::Full::new(content).boxed());
        }
        for message in content.split(|byte| *byte == b'\n') {
            let message =
                if is_events { message.strip_prefix(b"data:").unwrap_or_default() } else { message };
            if Envelope::parse(message).is_some_and(|m| m.result.is_some() || m.error.is_some()) {
                out.extend_from_slice(if out.len() > 1 { b"," } else { b"" });
                out.extend_from_slice(message.trim_ascii());
            }
        }
    }
    if out.len() == 1 {
        return respond(StatusCode::ACCEPTED, "application/json", Bytes::new());
    }
    out.push(b']');
    respond(StatusCode::OK, "application/json", out.into())
}
