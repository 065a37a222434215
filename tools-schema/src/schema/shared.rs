//! Shapes that a schema has more than once, written once: `$defs` and `$ref` of JSON Schema 2020-12.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Shorter shapes stay where they are, in bytes of JSON: a reference saves little there, and is harder to read.
const SHAPE_MIN: usize = 64;
/// What the first of the definitions costs besides, in bytes of JSON.
const DEFS_COST: usize = r#","$defs":{}"#.len();
/// The words that are not of a shape: they stay beside the reference to it.
const BESIDE: [&str; 2] = ["description", "default"];
/// The words whose value is a schema.
const ONE: [&str; 2] = ["items", "additionalProperties"];
/// The words whose value is a list of schemas.
const SEVERAL: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];

/// A shape in a schema.
struct Shape {
    schema: Map<String, Value>,
    /// The member that has it first.
    member: String,
    /// How often it is there. What is inside of a repeated shape is counted once.
    count: usize,
}

/// Returns the schema with its repeated shapes in its `$defs`, as far as that makes it shorter. A definition is named after a member that has the
/// shape. The same schema always makes the same text; one that has `$defs` is returned as it is.
pub fn shared(mut schema: Map<String, Value>) -> Map<String, Value> {
    if schema.contains_key("$defs") {
        return schema;
    }
    let mut shapes = BTreeMap::new();
    count(&schema, "part", &mut shapes);
    let Some(names) = names_of(&shapes) else { return schema };
    let mut definitions = Map::new();
    for (text, name) in &names {
        let mut definition = shapes[text].schema.clone();
        replace_in(&mut definition, &names);
        definitions.insert(name.clone(), definition.into());
    }
    replace_in(&mut schema, &names);
    schema.insert("$defs".into(), definitions.into());
    schema
}

/// Counts the shapes in a schema, by their text. `member` is the one that has the schema.
fn count(schema: &Map<String, Value>, member: &str, shapes: &mut BTreeMap<String, Shape>) {
    for (word, of) in schema {
        match of {
            Value::Object(members) if word == "properties" => {
                members.iter().for_each(|(member, part)| count_part(part, member, shapes));
            }
            Value::Array(parts) if SEVERAL.contains(&word.as_str()) => {
                parts.iter().for_each(|part| count_part(part, member, shapes));
            }
            part if ONE.contains(&word.as_str()) => count_part(part, member, shapes),
            _ => {}
        }
    }
}

fn count_part(part: &Value, member: &str, shapes: &mut BTreeMap<String, Shape>) {
    let Value::Object(part) = part else { return };
    let (text, schema) = shape_of(part);
    if let Some(known) = shapes.get_mut(&text) {
        known.count += 1;
        return;
    }
    shapes.insert(text, Shape { schema, member: member.to_owned(), count: 1 });
    count(part, member, shapes);
}

/// The shape of a schema, as text and as schema.
fn shape_of(schema: &Map<String, Value>) -> (String, Map<String, Value>) {
    let mut shape = schema.clone();
    BESIDE.iter().for_each(|word| drop(shape.remove(*word)));
    let shape = Value::Object(shape);
    let text = shape.to_string();
    let Value::Object(shape) = shape else { unreachable!("it was an object") };
    (text, shape)
}

/// The names of the shapes that become definitions, by the shapes' texts; `None` if the schema would not get shorter.
fn names_of(shapes: &BTreeMap<String, Shape>) -> Option<BTreeMap<String, String>> {
    let (mut names, mut saved) = (BTreeMap::<String, String>::new(), 0);
    for (text, shape) in shapes.iter().filter(|(text, shape)| shape.count > 1 && text.len() >= SHAPE_MIN) {
        let base: String =
            shape.member.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '_').collect();
        let numbered = (2..).map(|number| format!("{base}{number}"));
        let is_free = |name: &String| !name.is_empty() && names.values().all(|taken| taken != name);
        let name = std::iter::once(base.clone()).chain(numbered).find(is_free)?;
        let saving = saving(text.len(), name.len(), shape.count);
        if saving > 0 {
            saved += saving;
            names.insert(text.clone(), name);
        }
    }
    (saved > DEFS_COST).then_some(names)
}

/// How many bytes of JSON a definition saves: for a shape of that length, a name of that length, and so many places.
fn saving(shape: usize, name: usize, count: usize) -> usize {
    let reference = r##"{"$ref":"#/$defs/"}"##.len() + name;
    let definition = r#""":,"#.len() + name + shape;
    (count * shape).saturating_sub(count * reference + definition)
}

/// Puts references in place of the named shapes in a schema.
fn replace_in(schema: &mut Map<String, Value>, names: &BTreeMap<String, String>) {
    for (word, of) in schema {
        match of {
            Value::Object(members) if word == "properties" => {
                members.values_mut().for_each(|part| replace(part, names));
            }
            Value::Array(parts) if SEVERAL.contains(&word.as_str()) => {
                parts.iter_mut().for_each(|part| replace(part, names));
            }
            part if ONE.contains(&word.as_str()) => replace(part, names),
            _ => {}
        }
    }
}

fn replace(part: &mut Value, names: &BTreeMap<String, String>) {
    let Value::Object(schema) = part else { return };
    let Some(name) = names.get(&shape_of(schema).0) else { return replace_in(schema, names) };
    schema.retain(|word, _| BESIDE.contains(&word.as_str()));
    schema.insert("$ref".into(), format!("#/$defs/{name}").into());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shared_of(schema: &Value) -> Value {
        shared(schema.as_object().unwrap().clone()).into()
    }

    /// A schema of some length; those of different words are different shapes.
    fn long(word: &str) -> Value {
        json!({ "type": "object", "required": [word], "properties": { word: { "type": "string" }, "more": { "type": "integer" } } })
    }

    fn with(mut schema: Value, word: &str, value: Value) -> Value {
        schema[word] = value;
        schema
    }

    /// The schema without references.
    fn whole(schema: &Value, definitions: &Value) -> Value {
        match schema {
            Value::Object(members) => match members.get("$ref").and_then(Value::as_str) {
                Some(place) => {
                    let name = place.strip_prefix("#/$defs/").unwrap();
                    let Value::Object(mut shape) = whole(&definitions[name], definitions) else {
                        panic!("no definition {name}")
                    };
                    shape.extend(members.clone().into_iter().filter(|(word, _)| word != "$ref"));
                    shape.into()
                }
                None => {
                    let parts = members.iter().filter(|(word, _)| *word != "$defs");
                    Value::Object(parts.map(|(word, of)| (word.clone(), whole(of, definitions))).collect())
                }
            },
            Value::Array(items) => items.iter().map(|item| whole(item, definitions)).collect(),
            other => other.clone(),
        }
    }

    #[test]
    fn a_repeated_shape_is_written_once() {
        let schema = json!({ "type": "object", "properties": {
            "last": with(long("a"), "description", json!("The last one.")),
            "list": { "type": "array", "items": long("a") },
            "other": { "anyOf": [{ "type": "string" }, with(long("a"), "default", json!({}))] },
            "by_name": { "type": "object", "additionalProperties": long("a") },
        } });
        let reference = json!({ "$ref": "#/$defs/by_name" });
        let expected = json!({ "type": "object", "$defs": { "by_name": long("a") }, "properties": {
            "last": with(reference.clone(), "description", json!("The last one.")),
            "list": { "type": "array", "items": reference },
            "other": { "anyOf": [{ "type": "string" }, with(reference.clone(), "default", json!({}))] },
            "by_name": { "type": "object", "additionalProperties": reference },
        } });
        assert_eq!(shared_of(&schema), expected);
        assert_eq!(shared_of(&expected), expected, "once more changes nothing");
    }

    #[test]
    fn shapes_of_the_same_member_are_kept_apart() {
        let schema = json!({ "type": "object", "properties": {
            "a": { "type": "object", "properties": { "error": long("x"), "last": long("x"), "next": long("x") } },
            "b": { "type": "object", "properties": { "error": long("y"), "last": long("y"), "next": long("y") } },
            "c": { "type": "object", "properties": { "error": long("z") } },
        } });
        let short = shared_of(&schema);
        assert_eq!(short["$defs"], json!({ "error": long("x"), "error2": long("y") }));
        assert_eq!(short["properties"]["b"]["properties"]["next"], json!({ "$ref": "#/$defs/error2" }));
        assert_eq!(whole(&short, &short["$defs"]), schema);
    }

    #[test]
    fn a_definition_refers_to_another_one() {
        let outer = |word: &str| json!({ "type": "object", "properties": { word: long("in"), "why": { "type": "string" } } });
        let schema = json!({ "type": "object", "properties": {
            "a": outer("x"), "b": outer("x"), "c": { "type": "array", "items": long("in") },
        } });
        let short = shared_of(&schema);
        assert_eq!(short["properties"]["a"], json!({ "$ref": "#/$defs/a" }));
        assert_eq!(short["$defs"]["a"]["properties"]["x"], json!({ "$ref": "#/$defs/x" }));
        assert_eq!(short["properties"]["c"]["items"], json!({ "$ref": "#/$defs/x" }));
        assert_eq!(whole(&short, &short["$defs"]), schema);
    }

    #[test]
    fn what_would_not_get_shorter_stays_as_it_is() {
        let text = json!({ "type": "string" });
        let name = json!({ "type": "string", "maxLength": 63, "minLength": 1, "pattern": "^[a-z]+$" });
        assert!(name.to_string().len() > SHAPE_MIN);
        for members in [
            json!({}),
            json!({ "a": long("a"), "b": long("b") }),
            json!({ "a": text, "b": text, "c": text }),
            // The references and the name would cost more.
            json!({ "name_of_the_first": name, "name_of_the_other": name }),
            // Values are no schemas, even if they look like some.
            json!({ "a": { "type": "object", "default": { "items": long("a") } },
                "b": { "type": "object", "examples": [long("a")] }, "c": { "const": long("a") } }),
        ] {
            let schema = json!({ "type": "object", "properties": members });
            assert_eq!(shared_of(&schema), schema);
        }
    }

    #[test]
    fn results_of_all_tools_say_the_same_with_definitions() {
        let mut with_definitions = 0;
        for info in crate::tools::host().into_iter().chain(crate::tools::guest_on_host()) {
            let Some(output) = info.output_schema.map(Value::Object) else { continue };
            let short = shared_of(&output);
            assert_eq!(whole(&short, &short["$defs"]), output, "{}", info.name);
            if short != output {
                with_definitions += 1;
                assert!(short.to_string().len() < output.to_string().len(), "{}", info.name);
            }
        }
        assert!(with_definitions > 0);
    }
}
