//! The JSON-RPC messages that the agent sends: results, errors and notifications.

use std::io;

use nexus_schema::limits::GUEST_RESULT_MAX;
use serde::Serialize;
use serde_json::value::RawValue;

/// The line is not a JSON object.
pub(crate) const PARSE_ERROR: i32 = -32700;
/// The message is not a request, or cannot be accepted now.
pub(crate) const INVALID_REQUEST: i32 = -32600;
/// The method does not exist.
pub(crate) const METHOD_NOT_FOUND: i32 = -32601;
/// The method does not accept these parameters.
pub(crate) const INVALID_PARAMS: i32 = -32602;
/// The agent failed.
pub(crate) const INTERNAL_ERROR: i32 = -32603;

/// A request's id, verbatim.
pub(crate) type Id = Box<RawValue>;

/// A protocol error: why a request has no result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Failure {
    code: i32,
    message: String,
}

impl Failure {
    /// Creates an error with one of the codes of this module.
    pub(crate) fn new(code: i32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[derive(Serialize)]
struct Response<'a, R> {
    jsonrpc: &'static str,
    id: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<R>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a Failure>,
}

#[derive(Serialize)]
struct Notification<P> {
    jsonrpc: &'static str,
    method: &'static str,
    params: P,
}

/// Encodes an answer as a line; an error if the result is too large to be sent.
pub(crate) fn answer(id: &RawValue, outcome: Result<impl Serialize, Failure>) -> io::Result<Vec<u8>> {
    match outcome {
        Ok(result) => {
            let made = line(&Response { jsonrpc: "2.0", id, result: Some(result), error: None })?;
            if made.len() <= GUEST_RESULT_MAX {
                return Ok(made);
            }
            failure(id, &Failure::new(INTERNAL_ERROR, "the result is too large to be sent"))
        }
        Err(error) => failure(id, &error),
    }
}

/// Encodes an error as a line.
pub(crate) fn failure(id: &RawValue, error: &Failure) -> io::Result<Vec<u8>> {
    line(&Response::<()> { jsonrpc: "2.0", id, result: None, error: Some(error) })
}

/// Encodes a notification as a line.
pub(crate) fn notification(method: &'static str, params: impl Serialize) -> io::Result<Vec<u8>> {
    line(&Notification { jsonrpc: "2.0", method, params })
}

fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(512);
    serde_json::to_writer(&mut line, message)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        RawValue::from_string(text.to_owned()).unwrap()
    }

    #[test]
    fn answers_have_the_ids_as_they_came() {
        let text = |line: io::Result<Vec<u8>>| String::from_utf8(line.unwrap()).unwrap();
        assert_eq!(text(answer(&id("7"), Ok(1))), "{\"jsonrpc\":\"2.0\",\"id\":7,\"result\":1}\n");
        let refused = answer(&id(r#""x\"y""#), Err::<(), _>(Failure::new(METHOD_NOT_FOUND, "a")));
        assert_eq!(
            text(refused),
            "{\"jsonrpc\":\"2.0\",\"id\":\"x\\\"y\",\"error\":{\"code\":-32601,\"message\":\"a\"}}\n"
        );
        let large = text(answer(&id("7"), Ok("x".repeat(GUEST_RESULT_MAX))));
        assert!(large.contains("too large to be sent") && large.contains("\"id\":7"), "{}", large.len());
    }
}
