//! JSON schemas that all clients understand: one object, everything inline, no `null` alternatives. Lists of tools have [`shared()`] schemas of results.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

mod shared;

pub use shared::shared;

/// Returns the schema of a parameter or output type.
///
/// # Panics
/// If the type is not an object: every tool takes and returns an object, and a snapshot test covers each.
pub fn of<T: JsonSchema>() -> Map<String, Value> {
    let settings = SchemaSettings::draft2020_12().with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    let mut value = settings.into_generator().into_root_schema_for::<T>().to_value();
    simplify(&mut value);
    let Value::Object(mut object) = value else { unreachable!("a schema of a type is an object") };
    object.remove("title");
    // It only names the type, and each of its words costs a model tokens.
    object.remove("description");
    object.entry("type").or_insert_with(|| "object".into());
    assert_eq!(object["type"], "object", "{} is not an object", T::schema_name());
    object.entry("properties").or_insert_with(|| Map::new().into());
    object
}

/// Removes what some clients do not understand: `null` alternatives of optional fields, integer formats, single-branch combinators, and enumerations
/// written as `oneOf` constants.
fn simplify(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(simplify),
        Value::Object(object) => {
            object.values_mut().for_each(simplify);
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|t| t != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".into(), only);
                }
            }
            if matches!(object.get("default"), Some(Value::Null)) {
                object.remove("default");
            }
            if let Some(Value::Array(variants)) = object.get_mut("enum") {
                variants.retain(|v| !v.is_null());
            }
            if object.get("format").and_then(Value::as_str).is_some_and(is_number_format) {
                object.remove("format");
            }
            for word in ["anyOf", "oneOf"] {
                let Some(Value::Array(branches)) = object.get_mut(word) else { continue };
                branches.retain(|b| b.get("type") != Some(&Value::from("null")));
                if let [Value::Object(only)] = branches.as_slice() {
                    let only = only.clone();
                    object.remove(word);
                    for (key, value) in only {
                        object.entry(key).or_insert(value);
                    }
                } else if let Some(names) =
                    branches.iter().map(|b| b.get("const").cloned()).collect::<Option<Vec<_>>>()
                {
                    object.remove(word);
                    object.insert("type".into(), "string".into());
                    object.insert("enum".into(), names.into());
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn is_number_format(format: &str) -> bool {
    matches!(
        format,
        "uint8"
            | "uint16"
            | "uint32"
            | "uint64"
            | "uint"
            | "int8"
            | "int16"
            | "int32"
            | "int64"
            | "int"
            | "double"
            | "float"
    )
}
