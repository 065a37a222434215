//! Checks values against JSON schemas as clients do: the words that the schemas of Nexus use, and a panic for any other.

use serde_json::{Map, Value};

/// Words that say nothing about which values are valid.
const SILENT: [&str; 6] = ["description", "title", "default", "examples", "format", "deprecated"];

/// What of a value its schema does not allow, with the place of it; `None` if it is valid.
pub fn violation(schema: &Map<String, Value>, value: &Value) -> Option<String> {
    object(schema, schema, value, "").err()
}

/// `root` has the definitions that references name.
fn check(root: &Map<String, Value>, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    match schema {
        Value::Bool(true) => Ok(()),
        Value::Bool(false) => Err(format!("{place}: nothing is allowed here, got {value}")),
        Value::Object(schema) => object(root, schema, value, place),
        other => panic!("{other} is no schema"),
    }
}

/// The definition that a reference names.
fn definition<'a>(root: &'a Map<String, Value>, reference: &Value) -> &'a Value {
    let name = reference.as_str().and_then(|place| place.strip_prefix("#/$defs/"));
    let found = name.and_then(|name| root.get("$defs")?.get(name));
    found.unwrap_or_else(|| panic!("{reference} refers to nothing"))
}

fn object(
    root: &Map<String, Value>,
    schema: &Map<String, Value>,
    value: &Value,
    place: &str,
) -> Result<(), String> {
    let check = |schema: &Value, value: &Value, place: &str| check(root, schema, value, place);
    for (word, of) in schema {
        let is_valid = match (word.as_str(), value) {
            ("$ref", _) => {
                check(definition(root, of), value, place)?;
                true
            }
            ("$defs", _) => true,
            ("type", _) => is_type(of.as_str().unwrap_or_default(), value),
            ("enum", _) => of.as_array().is_some_and(|values| values.contains(value)),
            ("const", _) => of == value,
            ("minimum", Value::Number(number)) => number.as_f64() >= of.as_f64(),
            ("maximum", Value::Number(number)) => number.as_f64() <= of.as_f64(),
            ("minLength", Value::String(text)) => text.chars().count() as u64 >= of.as_u64().unwrap_or(0),
            ("maxLength", Value::String(text)) => {
                text.chars().count() as u64 <= of.as_u64().unwrap_or(u64::MAX)
            }
            ("minItems", Value::Array(items)) => items.len() as u64 >= of.as_u64().unwrap_or(0),
            ("maxItems", Value::Array(items)) => items.len() as u64 <= of.as_u64().unwrap_or(u64::MAX),
            ("required", Value::Object(members)) => {
                let names = of.as_array().into_iter().flatten().filter_map(Value::as_str);
                match names.into_iter().find(|name| !members.contains_key(*name)) {
                    Some(name) => return Err(format!("{place}: `{name}` is missing in {value}")),
                    None => true,
                }
            }
            ("properties", Value::Object(members)) => {
                for (name, of) in of.as_object().into_iter().flatten() {
                    members.get(name).map_or(Ok(()), |value| check(of, value, &format!("{place}.{name}")))?;
                }
                true
            }
            ("additionalProperties", Value::Object(members)) => {
                let known = schema.get("properties").and_then(Value::as_object);
                let others =
                    members.iter().filter(|(name, _)| known.is_none_or(|known| !known.contains_key(*name)));
                others
                    .into_iter()
                    .try_for_each(|(name, value)| check(of, value, &format!("{place}.{name}")))?;
                true
            }
            ("items", Value::Array(items)) => {
                let mut items = items.iter().enumerate();
                items.try_for_each(|(at, value)| check(of, value, &format!("{place}[{at}]")))?;
                true
            }
            ("prefixItems", Value::Array(items)) => {
                let places = of.as_array().into_iter().flatten().zip(items).enumerate();
                let mut places = places;
                places.try_for_each(|(at, (of, value))| check(of, value, &format!("{place}[{at}]")))?;
                true
            }
            ("anyOf" | "oneOf", _) => {
                let branches = of.as_array().into_iter().flatten();
                branches.into_iter().any(|of| check(of, value, place).is_ok())
            }
            // Patterns are the form of texts, which their own types check.
            ("pattern", Value::String(_)) => true,
            (
                "minimum"
                | "maximum"
                | "minLength"
                | "maxLength"
                | "minItems"
                | "maxItems"
                | "required"
                | "properties"
                | "additionalProperties"
                | "items"
                | "prefixItems"
                | "pattern",
                _,
            ) => true,
            (word, _) if SILENT.contains(&word) => true,
            (word, _) => panic!("{place}: this validator does not know the word {word}"),
        };
        if !is_valid {
            let shown: String = value.to_string().chars().take(200).collect();
            return Err(format!("{place}: {word} is {of}, got {shown}"));
        }
    }
    Ok(())
}

fn is_type(kind: &str, value: &Value) -> bool {
    match (kind, value) {
        ("object", Value::Object(_))
        | ("array", Value::Array(_))
        | ("string", Value::String(_))
        | ("boolean", Value::Bool(_))
        | ("null", Value::Null)
        | ("number", Value::Number(_)) => true,
        ("integer", Value::Number(number)) => {
            !number.is_f64() || number.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_schema_does_not_allow_is_found_with_its_place() {
        let schema = json!({
            "type": "object", "required": ["a"], "additionalProperties": false,
            "properties": {
                "a": { "type": "integer", "minimum": 1, "description": "x" },
                "b": { "type": "array", "items": { "anyOf": [{ "type": "string" }, { "type": "object", "properties": {
                    "c": { "enum": ["x", "y"] } } }] } },
            },
        });
        let schema = schema.as_object().unwrap();
        let found = |value: Value| violation(schema, &value);
        for good in [json!({ "a": 1 }), json!({ "a": 2.0, "b": ["x", { "c": "y", "d": 1 }] })] {
            assert_eq!(found(good), None);
        }
        for (bad, place) in [
            (json!([]), ""),
            (json!({}), ""),
            (json!({ "a": 0 }), ".a"),
            (json!({ "a": 1.5 }), ".a"),
            (json!({ "a": null }), ".a"),
            (json!({ "a": 1, "x": 1 }), ".x"),
            (json!({ "a": 1, "b": [1] }), ".b[0]"),
            (json!({ "a": 1, "b": ["x", { "c": "z" }] }), ".b[1]"),
        ] {
            let text = found(bad.clone()).unwrap_or_else(|| panic!("{bad} is allowed"));
            assert!(text.starts_with(&format!("{place}: ")), "{text}");
        }
    }

    #[test]
    fn references_are_followed() {
        let schema = json!({
            "type": "object", "$defs": { "count": { "type": "integer", "minimum": 1 },
                "pair": { "type": "object", "properties": { "first": { "$ref": "#/$defs/count" } } } },
            "properties": { "a": { "$ref": "#/$defs/pair", "description": "x" }, "b": { "$ref": "#/$defs/count" } },
        });
        let found = |value: Value| violation(schema.as_object().unwrap(), &value);
        assert_eq!(found(json!({ "a": { "first": 1 }, "b": 2 })), None);
        for (bad, place) in [
            (json!({ "a": 1 }), ".a"),
            (json!({ "a": { "first": 0 } }), ".a.first"),
            (json!({ "b": "x" }), ".b"),
        ] {
            let text = found(bad.clone()).unwrap_or_else(|| panic!("{bad} is allowed"));
            assert!(text.starts_with(&format!("{place}: ")), "{text}");
        }
    }
}
