//! Reads JSON-RPC messages without parsing them completely: values that are forwarded stay raw.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

pub(super) use nexus_wire::rpc::Envelope;

/// The members of a JSON object in their order, with raw values. Duplicate keys are kept.
#[derive(Debug)]
pub struct Members<'a>(pub Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    /// Splits an object into its members, one level deep; `None` if it is not an object.
    pub fn parse(object: &'a RawValue) -> Option<Self> {
        serde_json::from_str(object.get()).ok()
    }

    /// Returns the value of a member. Of duplicates it is the last one, as in most JSON parsers.
    pub fn get(&self, key: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, value)| *value)
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(8);
                while let Some((Key(key), value)) = map.next_entry()? {
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// A key, borrowed if it has no escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// Appends a string as JSON.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("a string goes into a buffer");
}

/// Returns the position after the closing quote of the string that starts before `at`.
fn end_of_string(bytes: &[u8], mut at: usize) -> usize {
    while let Some(found) = bytes.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        at += found;
        if bytes[at] == b'"' {
            return at + 1;
        }
        at += 2;
    }
    bytes.len()
}

/// Finds the id of a message of which only the first bytes are known.
pub fn id_at_start(head: &[u8]) -> Option<&str> {
    let (mut at, mut depth) = (0, 0);
    while let Some(&byte) = head.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            b'"' => {
                let end = end_of_string(head, at);
                if depth == 1 && head.get(at..end) == Some(b"id\"") {
                    return leading_id(head.get(end..)?);
                }
                at = end;
            }
            _ => {}
        }
    }
    None
}

/// Finds the id of a message of which only the last bytes are known, if the id is the last member.
pub fn id_at_end(tail: &[u8]) -> Option<&str> {
    let at = memchr::memmem::rfind(tail, b"\"id\"")?;
    let rest = tail.get(at + 4..)?;
    let id = leading_id(rest)?;
    // Only the closing brace may follow; otherwise this is text inside the message.
    let end = memchr::memmem::find(rest, id.as_bytes())? + id.len();
    rest[end..].trim_ascii().eq(b"}").then_some(id)
}

/// Reads the id after a `:`: a number or a string, as raw JSON.
fn leading_id(rest: &[u8]) -> Option<&str> {
    let rest = rest.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    let end = match rest.first()? {
        b'"' => {
            let end = end_of_string(rest, 1);
            if rest.get(end - 1) != Some(&b'"') {
                return None;
            }
            end
        }
        b'-' | b'0'..=b'9' => rest.iter().position(|b| !matches!(b, b'-' | b'0'..=b'9'))?,
        _ => return None,
    };
    let id = std::str::from_utf8(&rest[..end]).ok()?;
    serde_json::from_str::<&RawValue>(id).ok()?;
    Some(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_found_at_either_end() {
        assert_eq!(id_at_start(br#"{"jsonrpc":"2.0","id":17,"method":"x"#), Some("17"));
        assert_eq!(id_at_start(br#"{"jsonrpc":"2.0", "id" : "a\"b", "x"#), Some(r#""a\"b""#));
        assert_eq!(id_at_start(br#"{"params":{"id":3},"x":[{"id":4}],"me"#), None);
        assert_eq!(id_at_start(br#"{"params":"\"id\":5"#), None);
        assert_eq!(id_at_start(br#"{"id":17"#), None);
        assert_eq!(id_at_end(br#"xxxxx"},"jsonrpc":"2.0","id":17}"#), Some("17"));
        assert_eq!(id_at_end(br#"xxxxx"},"id":"q" } "#), Some(r#""q""#));
        assert_eq!(id_at_end(br#"xx","id":17,"y":1}"#), None);
        assert_eq!(id_at_end(br#"xx {"id":17}}"#), None);
    }

    #[test]
    fn members_keep_order_and_raw_values() {
        let raw: &RawValue = serde_json::from_str(r#"{"b":1.0,"\u0061":{"x" : [1]},"b":2e5}"#).unwrap();
        let members = Members::parse(raw).unwrap();
        let shown: Vec<_> = members.0.iter().map(|(k, v)| (k.as_ref(), v.get())).collect();
        assert_eq!(shown, [("b", "1.0"), ("a", r#"{"x" : [1]}"#), ("b", "2e5")]);
        assert_eq!(members.get("b").unwrap().get(), "2e5");
        assert!(Members::parse(serde_json::from_str("[1]").unwrap()).is_none());
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            id_at_start(&bytes);
            id_at_end(&bytes);
            let _ = Envelope::parse(&bytes);
        }

        #[test]
        fn what_is_found_is_what_was_there(id in any::<u32>(), text in ".{0,40}") {
            let text = serde_json::to_string(&text).unwrap();
            let text_of_id = id.to_string();
            let line = format!(r#"{{"id":{id},"x":{text}}}"#);
            prop_assert_eq!(id_at_start(line.as_bytes()), Some(&*text_of_id));
            let line = format!(r#"{{"x":{text},"id":{id}}}"#);
            prop_assert_eq!(id_at_end(line.as_bytes()), Some(&*text_of_id));
        }
    }
}
