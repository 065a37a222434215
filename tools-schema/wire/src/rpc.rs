//! The outer form of JSON-RPC messages, without parsing their contents.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// The members of a JSON-RPC message, each verbatim.
#[derive(Debug, Deserialize)]
pub struct Envelope<'a> {
    /// `"2.0"`.
    #[serde(borrow, default)]
    pub jsonrpc: Option<Cow<'a, str>>,
    /// The request's id; absent in notifications (and if it is `null`).
    #[serde(borrow, default)]
    pub id: Option<&'a RawValue>,
    /// The method of a request or notification.
    #[serde(borrow, default)]
    pub method: Option<Cow<'a, str>>,
    /// Its parameters.
    #[serde(borrow, default)]
    pub params: Option<&'a RawValue>,
    /// The result of a response.
    #[serde(borrow, default)]
    pub result: Option<&'a RawValue>,
    /// The error of a response.
    #[serde(borrow, default)]
    pub error: Option<&'a RawValue>,
}

impl<'a> Envelope<'a> {
    /// Parses one line; `None` if it is not a JSON object with these members.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        // serde would also accept an array of the right length.
        line.trim_ascii_start().starts_with(b"{").then(|| serde_json::from_slice(line).ok())?
    }

    /// Returns the id, verbatim.
    pub fn id(&self) -> Option<&'a str> {
        self.id.map(RawValue::get)
    }

    /// Returns whether it is a valid request, notification or response of JSON-RPC 2.0, with a string or a number as id.
    pub fn is_well_formed(&self) -> bool {
        let id_is_good =
            self.id().is_none_or(|id| id.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit()));
        self.jsonrpc.as_deref() == Some("2.0") && id_is_good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelopes_are_read() {
        let line = br#" {"jsonrpc":"2.0","id":"a b","method":"tools\/call","params":{"x":[1]}}"#;
        let envelope = Envelope::parse(line).unwrap();
        assert_eq!(envelope.id(), Some(r#""a b""#));
        assert_eq!(envelope.method.as_deref(), Some("tools/call"));
        assert_eq!(envelope.params.unwrap().get(), r#"{"x":[1]}"#);
        assert!(envelope.is_well_formed());
        assert!(Envelope::parse(b"[1]").is_none());
        assert!(Envelope::parse(b"{").is_none());
        assert_eq!(Envelope::parse(br#"{"id":null}"#).unwrap().id(), None);
        for odd in [r#"{"id":1}"#, r#"{"jsonrpc":"2.0","id":[1]}"#, r#"{"jsonrpc":"1.0","id":1}"#] {
            assert!(!Envelope::parse(odd.as_bytes()).unwrap().is_well_formed(), "{odd}");
        }
    }
}
