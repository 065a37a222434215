//! HTTP requests inside the guest.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Effect, ResultShape, Tool};
use crate::tools::ContentEncoding;

/// Sends an HTTP request to a server in the VM.
pub enum HttpRequest {}

/// Arguments of `http_request`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpRequestParams {
    /// A URL on the VM's loopback, such as `http://localhost:8080/health`; not TLS.
    pub url: String,
    /// The method (default GET, with a body POST).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Headers of the request.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The body of the request, at most 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// How `body` is encoded (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body_encoding: Option<ContentEncoding>,
    /// How the body of the response is shown (default text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// How much of it, in bytes (default 32768; at most 48000 as text, 262144 as base64).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 262_144))]
    pub limit: Option<u64>,
    /// How many seconds the whole may take (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 45))]
    pub timeout_s: Option<f64>,
}

/// The structured result of `http_request`; the body of the response is the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HttpRequestOutput {
    /// The status, such as 200.
    pub status: u16,
    /// The headers, with names in lower case; repeated ones are joined by `, `.
    pub headers: BTreeMap<String, String>,
    /// The number of bytes of the body in the text.
    pub body_bytes: u64,
    /// Whether the body was cut.
    pub truncated: bool,
    /// Whether bytes that are not UTF-8 were replaced.
    pub lossy: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

impl Tool for HttpRequest {
    const NAME: &'static str = "http_request";
    const TITLE: &'static str = "Send an HTTP request inside the VM";
    const DESCRIPTION: &'static str = "Sends an HTTP request from inside the VM to a server that listens on its loopback; use it to look at \
        a server that you started, without curl. Follows no redirects.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    type Params = HttpRequestParams;
    type Output = HttpRequestOutput;
}
