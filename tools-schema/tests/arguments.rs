//! Arguments in other forms than the published schemas', for every argument of every tool: they decode as the plain form does.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use nexus_schema::arguments::Takes;
use nexus_schema::tool::{GUEST_PREFIX, Tool};
use nexus_schema::{for_each_guest_tool, for_each_host_tool};
use proptest::prelude::{BoxedStrategy, Just, Strategy, any};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value, json};

type Object = Map<String, Value>;

/// The arguments of a tool as they are published: read from its reviewed snapshot.
fn published(name: &str) -> Object {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/snapshots/published__{name}.snap"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let json = text.splitn(3, "---\n").nth(2).unwrap();
    let Value::Object(mut shown) = serde_json::from_str(json).unwrap() else { panic!("{name}") };
    let Some(Value::Object(input)) = shown.remove("input") else { panic!("{name} has no input") };
    input
}

fn object<'a>(schema: &'a Object, word: &str) -> Option<&'a Object> {
    schema.get(word).and_then(Value::as_object)
}

fn needs(schema: &Object, name: &str) -> bool {
    schema.get("required").and_then(Value::as_array).into_iter().flatten().any(|needed| needed == name)
}

/// Values as the schema has them.
fn plain(schema: &Object) -> BoxedStrategy<Value> {
    // Of several forms, each is one.
    if let Some(Value::Array(forms)) = schema.get("anyOf") {
        let forms: Vec<_> = forms.iter().map(|form| plain(form.as_object().unwrap())).collect();
        return proptest::strategy::Union::new(forms).boxed();
    }
    let words = schema.get("enum").and_then(Value::as_array).cloned();
    let words = words.or_else(|| schema.get("const").cloned().map(|only| vec![only]));
    match (schema["type"].as_str().unwrap(), words) {
        (_, Some(words)) => proptest::sample::select(words).boxed(),
        ("string", None) => match schema.get("pattern").and_then(Value::as_str) {
            Some(digits) if digits.starts_with("^[0-9]") => {
                "[1-9][0-9]{0,9}|[1-9]GiB".prop_map(Value::from).boxed()
            }
            Some(_) => proptest::sample::select(vec![json!("web-1"), json!("0644")]).boxed(),
            None => "[a-z][a-z /=.-]{0,12}|[1-9][0-9]{0,5}".prop_map(Value::from).boxed(),
        },
        ("integer", None) => {
            let bound = |word: &str, or| schema.get(word).and_then(Value::as_u64).unwrap_or(or);
            (bound("minimum", 0)..=bound("maximum", 1 << 40)).prop_map(Value::from).boxed()
        }
        ("number", None) => (0_u32..1 << 20).prop_map(|whole| json!(f64::from(whole))).boxed(),
        ("boolean", None) => any::<bool>().prop_map(Value::from).boxed(),
        ("array", None) => {
            let items = proptest::collection::vec(plain(object(schema, "items").unwrap()), 1..4);
            items.prop_map(Value::from).boxed()
        }
        ("object", None) if object(schema, "properties").is_some() => members(schema),
        ("object", None) => match object(schema, "additionalProperties") {
            Some(of) => proptest::collection::btree_map("[a-zA-Z/]{1,6}", plain(of), 1..4)
                .prop_map(|members| Value::Object(members.into_iter().collect()))
                .boxed(),
            None => Just(json!({"from": "list", "versions": [1.0, null, ""]})).boxed(),
        },
        (other, None) => panic!("a type of argument that this test does not know: {other}"),
    }
}

/// Objects with the members that are needed, and any of the others.
fn members(schema: &Object) -> BoxedStrategy<Value> {
    let mut all = Just(Object::new()).boxed();
    for (name, of) in object(schema, "properties").unwrap() {
        let (name, of) = (name.clone(), of.as_object().unwrap());
        let value = if needs(schema, &name) {
            plain(of).prop_map(Some).boxed()
        } else {
            proptest::option::weighted(0.7, plain(of)).boxed()
        };
        let joined = (all, value).prop_map(move |(mut members, value)| {
            members.extend(value.map(|value| (name.clone(), value)));
            members
        });
        all = joined.boxed();
    }
    all.prop_map(Value::Object).boxed()
}

/// The other forms of a plain value.
fn odd(schema: &Object, value: &Value, among: bool) -> Vec<Value> {
    if schema.contains_key("anyOf") {
        // Which form is meant is the tool's to say.
        return Vec::new();
    }
    let has_words = schema.contains_key("enum") || schema.contains_key("const");
    match value {
        Value::String(text) if has_words => vec![json!(text.to_uppercase()), json!(format!(" {text} "))],
        Value::String(text) => {
            let number = text.parse::<u64>().ok().filter(|_| !text.starts_with('0'));
            let is_bool = among && (text == "true" || text == "false");
            number.map(Value::from).into_iter().chain(is_bool.then(|| json!(text == "true"))).collect()
        }
        Value::Number(number) => {
            let whole = number.as_u64().unwrap_or_else(|| number.as_f64().unwrap() as u64);
            vec![
                json!(whole as f64),
                json!(whole.to_string()),
                json!(format!("{whole}.0")),
                json!(format!(" {whole} ")),
            ]
        }
        Value::Bool(yes) => vec![json!(yes.to_string()), json!(if *yes { "True" } else { "FALSE" })],
        Value::Array(items) => {
            let of = object(schema, "items").unwrap();
            let mut forms = vec![json!(value.to_string()), json!(format!(" {value:#}"))];
            for (at, item) in items.iter().enumerate() {
                forms.extend(odd(of, item, true).into_iter().map(|form| {
                    let mut items = items.clone();
                    items[at] = form;
                    Value::from(items)
                }));
            }
            forms
        }
        Value::Object(members) => {
            let mut forms = vec![json!(value.to_string())];
            for (name, member) in members {
                let is_among = object(schema, "properties").is_none();
                let of = object(schema, "properties").and_then(|of| of.get(name)?.as_object());
                let Some(of) = of.or_else(|| object(schema, "additionalProperties")) else { continue };
                forms.extend(odd(of, member, is_among).into_iter().map(|form| {
                    let mut members = members.clone();
                    members.insert(name.clone(), form);
                    Value::from(members)
                }));
            }
            forms.extend(absent(schema, members));
            forms
        }
        Value::Null => Vec::new(),
    }
}

/// The same object with each member that is not there in each form of not being there.
fn absent(schema: &Object, members: &Object) -> Vec<Value> {
    let mut forms = Vec::new();
    for (name, of) in object(schema, "properties").into_iter().flatten() {
        if members.contains_key(name) || needs(schema, name) {
            continue;
        }
        let mut empty = vec![Value::Null];
        // An empty condition is refused.
        let is_guard = name.starts_with("if_") || name.starts_with("expect_") || name.ends_with("sha256");
        if !is_guard {
            empty.push(json!(""));
        }
        if of["type"] == "array" && of.get("minItems") != Some(&json!(0)) {
            empty.extend([json!([]), json!({}), json!("[]")]);
        }
        forms.extend(empty.into_iter().map(|form| {
            let mut members = members.clone();
            members.insert(name.clone(), form);
            Value::from(members)
        }));
    }
    forms
}

/// Tries the tool of a snapshot, `decode` says what comes of arguments; how many forms that was.
fn check(name: &str, decode: impl Fn(&Takes, Object) -> Result<Value, String>) -> usize {
    let schema = published(name);
    let takes = Takes::new(name, schema.clone());
    let mut seen = 0;
    let mut runner = TestRunner::deterministic();
    let cases = members(&schema);
    for _ in 0..24 {
        let Value::Object(arguments) = cases.new_tree(&mut runner).unwrap().current() else {
            panic!("{name}")
        };
        assert_eq!(takes.plain(arguments.clone()), Ok(arguments.clone()), "{name}: the plain form stays");
        let expected = decode(&takes, arguments.clone());
        for form in odd(&schema, &Value::Object(arguments.clone()), false) {
            let Value::Object(form) = form else { continue };
            let said = takes.plain(form.clone());
            assert_eq!(said, Ok(arguments.clone()), "{name}: {form:?}");
            assert_eq!(decode(&takes, form), expected, "{name}: {arguments:?}");
            seen += 1;
        }
    }
    seen
}

fn check_typed<T: Tool>(snapshot: &str) -> usize {
    check(snapshot, |takes, arguments| match takes.decode::<T>(arguments) {
        Ok(params) => Ok(serde_json::to_value(params).unwrap()),
        // Random texts are no ids: then it fails in the same way.
        Err(error) => Err(error.to_string()),
    })
}

macro_rules! check_host {
    ($($tool:path => $method:ident,)*) => { [$( check_typed::<$tool>(<$tool as Tool>::NAME) ),*] };
}

macro_rules! check_guest {
    ($($tool:path => $method:ident,)*) => { [$(
        check_typed::<$tool>(&format!("scoped.{}", <$tool as Tool>::NAME))
            + check(&format!("{GUEST_PREFIX}{}", <$tool as Tool>::NAME), |takes, arguments| {
                takes.plain(arguments).map(Value::Object).map_err(|error| error.to_string())
            })
    ),*] };
}

#[test]
fn other_forms_of_the_hosts_arguments_decode_as_the_plain_one() {
    let seen = for_each_host_tool!(check_host);
    assert!(seen.iter().sum::<usize>() > 5_000, "{seen:?}");
}

#[test]
fn other_forms_of_the_guests_arguments_decode_as_the_plain_one() {
    let seen = for_each_guest_tool!(check_guest);
    assert!(seen.iter().sum::<usize>() > 1_000, "{seen:?}");
}
