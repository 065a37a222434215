//! Sets one member of one object in a JSON file, and keeps the text of everything else.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// The members of an object in their order, each value as its own text.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfObject;
        impl<'de> Visitor<'de> for OfObject {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(OfObject)
    }
}

impl Members {
    fn text(&self, indent: usize) -> String {
        if self.0.is_empty() {
            return "{}".to_owned();
        }
        let (outer, inner) = (" ".repeat(indent), " ".repeat(indent + 2));
        let lines = self
            .0
            .iter()
            .map(|(key, value)| format!("{inner}{}: {}", Value::from(key.as_str()), value.get()));
        format!("{{\n{}\n{outer}}}", lines.collect::<Vec<_>>().join(",\n"))
    }
}

/// The text of a file in which the object `key` has `entry` as its member `name`, or no such member; `None` if it is so already. An
/// empty file counts as an empty object.
///
/// # Errors
/// If the text is not JSON without comments, or it or its member `key` is not an object.
pub(super) fn set(
    text: &str,
    key: &str,
    name: &str,
    entry: Option<&Map<String, Value>>,
) -> Result<Option<String>, serde_json::Error> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    let mut file: Members = serde_json::from_str(text)?;
    let at = file.0.iter().position(|(member, _)| member == key);
    let mut servers = match at {
        Some(at) => serde_json::from_str(file.0[at].1.get())
            .map_err(|error| serde_json::Error::custom(format!("its member {key}: {error}")))?,
        None => Members(Vec::new()),
    };
    let before = servers.0.iter().position(|(member, _)| member == name);
    let raw = |text: String| RawValue::from_string(text);
    match (entry, before) {
        (Some(entry), before) => {
            let entry = Value::Object(entry.clone());
            let indented = format!("{entry:#}").replace('\n', "\n    ");
            match before {
                Some(before) if serde_json::from_str::<Value>(servers.0[before].1.get())? == entry => {
                    return Ok(None);
                }
                Some(before) => servers.0[before].1 = raw(indented)?,
                None => servers.0.push((name.to_owned(), raw(indented)?)),
            }
        }
        (None, Some(before)) => drop(servers.0.remove(before)),
        (None, None) => return Ok(None),
    }
    let servers = raw(servers.text(2))?;
    match at {
        Some(at) => file.0[at].1 = servers,
        None => file.0.push((key.to_owned(), servers)),
    }
    Ok(Some(format!("{}\n", file.text(0))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn everything_else_keeps_its_text() {
        let text = r#"{"z": 1.50, "mcpServers": {"b": {"x":   [1,2]}}, "a": {"k":"\u00e9"}}"#;
        let nexus = entry(&json!({ "command": "n", "args": ["mcp"] }));
        let set_once = set(text, "mcpServers", "nexus", Some(&nexus)).unwrap().unwrap();
        insta::assert_snapshot!(set_once, @r#"
        {
          "z": 1.50,
          "mcpServers": {
            "b": {"x":   [1,2]},
            "nexus": {
              "args": [
                "mcp"
              ],
              "command": "n"
            }
          },
          "a": {"k":"\u00e9"}
        }
        "#);
        assert_eq!(set(&set_once, "mcpServers", "nexus", Some(&nexus)).unwrap(), None);
        let other = entry(&json!({ "url": "u" }));
        let replaced = set(&set_once, "mcpServers", "nexus", Some(&other)).unwrap().unwrap();
        assert!(replaced.contains(r#""url": "u""#) && !replaced.contains("command"), "{replaced}");
        let removed = set(&replaced, "mcpServers", "nexus", None).unwrap().unwrap();
        let same: Value = serde_json::from_str(&removed).unwrap();
        assert_eq!(same, serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(set(&removed, "mcpServers", "nexus", None).unwrap(), None);
    }

    #[test]
    fn what_is_not_plain_json_is_refused() {
        let nexus = entry(&json!({}));
        for text in ["{ // a comment\n}", "[]", r#"{"servers": []}"#, r#"{"servers": {}} x"#] {
            assert!(set(text, "servers", "nexus", Some(&nexus)).is_err(), "{text}");
        }
        let text = set(" \n", "servers", "nexus", Some(&nexus)).unwrap().unwrap();
        assert_eq!(text, "{\n  \"servers\": {\n    \"nexus\": {}\n  }\n}\n");
    }
}
