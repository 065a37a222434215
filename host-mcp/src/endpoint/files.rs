//! Answers browsers with the files of the page, and says what a browser may do with them.

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};

use super::access::Door;
use super::{Body, respond};
use crate::page;

/// The file that a request asks for; `None` if it asks for something else. It needs no token: the page asks for one.
pub(super) fn answer<B>(door: &Door, request: &Request<B>) -> Option<Response<Body>> {
    if !door.offers_page() || request.method() != Method::GET {
        return None;
    }
    let page::File { content_type, text } = page::file(request.uri().path())?;
    let mut response = respond(StatusCode::OK, content_type, Bytes::from_static(text.as_bytes()));
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, page::policy()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Some(response)
}
