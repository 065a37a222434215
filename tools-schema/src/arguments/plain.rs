//! Normalizes values that are in another form than the schema's, if they have only one possible meaning.

use std::fmt::Write;

use serde_json::{Map, Number, Value};

use super::{Wrong, names};
use crate::tool::VM_ARGUMENT;

type Schema = Map<String, Value>;

/// The maximum length of a wrong value in messages, in characters.
const SHOWN_MAX: usize = 60;
/// From here on, a floating-point number may not represent an integer exactly.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// The result of normalizing a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    /// It is given, and normalized.
    Given,
    /// It counts as not given.
    Absent,
}

/// The place of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// An optional argument or member.
    Optional,
    /// A required argument or member.
    Required,
    /// An item of a list, or a value of a map.
    Among,
}

/// Returns the members that a schema names.
pub(super) fn properties(schema: &Schema) -> Option<&Schema> {
    schema.get("properties").and_then(Value::as_object)
}

/// Returns the names of the required members.
pub(super) fn required(schema: &Schema) -> impl Iterator<Item = &str> {
    schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// Returns the object with named members that a value is, or that each of its items or values is, and what precedes the list of these members.
pub(super) fn within(schema: &Schema) -> Option<(&'static str, &Schema)> {
    let object = |of: &Schema| properties(of).is_some_and(|members| !members.is_empty());
    if object(schema) {
        return Some(("", schema));
    }
    let each =
        ["items", "additionalProperties"].into_iter().find_map(|word| schema.get(word)?.as_object())?;
    if object(each) {
        return Some(("each: ", each));
    }
    let forms = each.get("anyOf").and_then(Value::as_array)?;
    let of = forms.iter().filter_map(Value::as_object).find(|form| object(form))?;
    let is_text = |form: &Value| form.get("type").is_some_and(|kind| kind == "string");
    Some((if forms.iter().any(is_text) { "each: a string, or " } else { "each: " }, of))
}

/// Normalizes the members of an object.
pub(super) fn make(schema: &Schema, members: &mut Schema) -> Result<(), Wrong> {
    let none = Schema::new();
    let properties = properties(schema).unwrap_or(&none);
    names::of_results(properties, members);
    let mut absent = Vec::new();
    for (name, value) in members.iter_mut() {
        let Some(of) = properties.get(name).and_then(Value::as_object) else {
            return Err(unknown(properties, name));
        };
        if is_guard(name) && value.as_str().is_some_and(str::is_empty) {
            let what = "must not be empty: leave it out to do without the check";
            return Err(Wrong::new(what.into()).within(format_args!(".{name}")));
        }
        let place =
            if required(schema).any(|needed| needed == name) { Place::Required } else { Place::Optional };
        match value_of(of, value, place) {
            Ok(Is::Given) => {}
            Ok(Is::Absent) => absent.push(name.clone()),
            Err(wrong) => return Err(advise(properties, name, value, wrong).within(format_args!(".{name}"))),
        }
    }
    for name in absent {
        members.remove(&name);
    }
    match required(schema).find(|name| !members.contains_key(*name)) {
        Some(name) => {
            let what = properties.get(name).and_then(|of| of.get("description")).and_then(Value::as_str);
            let what = what.map(|text| format!(" ({})", first_clause(text))).unwrap_or_default();
            Err(Wrong::new(format!("missing argument `{name}`{what}")))
        }
        None => Ok(()),
    }
}

/// Returns whether an argument is a condition that a call must meet. Nobody who gives one means to do without it, so an empty text is not a missing
/// value.
fn is_guard(name: &str) -> bool {
    name.starts_with("if_") || name.starts_with("expect_") || name.ends_with("sha256")
}

/// Returns the first words of a description.
fn first_clause(text: &str) -> String {
    let words = text.split(['.', ';', '\n']).next().unwrap_or_default();
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| format!("{}{}", first.to_lowercase(), letters.as_str()))
}

fn unknown(properties: &Schema, name: &str) -> Wrong {
    let shown: String = name.chars().take(SHOWN_MAX).collect();
    let mut what = format!("unknown argument `{shown}`");
    // Writing to a string cannot fail.
    let _ = match names::meant(properties, name) {
        Some(meant) => write!(what, "; use `{meant}`"),
        None if names::is_terminal(name) && properties.contains_key("stdin_open") => {
            write!(what, ": this tool gives no terminal; command_start does, with `tty`")
        }
        None if name == VM_ARGUMENT => write!(what, ": this endpoint is the inside of one VM"),
        None => match member_meant(properties, name) {
            Some((argument, member)) => write!(what, "; `{member}` is a member of `{argument}`"),
            None => Ok(()),
        },
    };
    Wrong::new(what)
}

/// Returns the member of an argument that is most likely meant by an unknown name, after that argument.
fn member_meant<'a>(arguments: &'a Schema, name: &str) -> Option<(&'a str, &'a str)> {
    arguments.iter().find_map(|(argument, of)| {
        let (_, of) = within(of.as_object()?)?;
        Some((argument.as_str(), names::meant(properties(of)?, name)?))
    })
}

/// Adds a suggestion to the error about a value of the wrong kind.
fn advise(properties: &Schema, name: &str, value: &Value, mut wrong: Wrong) -> Wrong {
    let other = match (name, value) {
        ("command", Value::Array(_)) => ("argv", "give a program with its arguments as `argv`"),
        ("argv", Value::String(_)) => ("command", "give a line for the shell as `command`"),
        _ => return wrong,
    };
    if properties.contains_key(other.0) && wrong.path.is_empty() {
        wrong.what.push_str("; ");
        wrong.what.push_str(other.1);
    }
    wrong
}

/// Normalizes one value.
fn value_of(schema: &Schema, value: &mut Value, place: Place) -> Result<Is, Wrong> {
    let kind = schema.get("type").and_then(Value::as_str);
    match kind {
        Some("array") => unpack(value, '['),
        Some("object") => {
            unpack(value, '{');
            unfold(schema, value);
        }
        _ => {}
    }
    match (&*value, place) {
        // If it is required, the caller reports it as missing.
        (Value::Null, Place::Optional | Place::Required) => return Ok(Is::Absent),
        (Value::String(text), Place::Optional) if text.is_empty() && !may_be_empty(schema, "minLength") => {
            return Ok(Is::Absent);
        }
        (Value::Array(items), Place::Optional) if items.is_empty() && !may_be_empty(schema, "minItems") => {
            return Ok(Is::Absent);
        }
        _ => {}
    }
    let made = match kind {
        Some("string") => string(schema, value, place),
        Some("integer") => integer(schema, value),
        Some("number") => number(value),
        Some("boolean") => boolean(value),
        Some("array") => return array(schema, value).map(|()| Is::Given),
        Some("object") => return object(schema, value).map(|()| Is::Given),
        // Any value is allowed; the tool itself checks it.
        Some(_) | None => return Ok(Is::Given),
    };
    match made {
        Some(plain) => *value = plain,
        None if is_plain(schema, value) => {}
        None => return Err(must_be(schema, value)),
    }
    Ok(Is::Given)
}

/// Returns whether a schema allows an empty text or list as a value.
fn may_be_empty(schema: &Schema, word: &str) -> bool {
    schema.get(word).and_then(Value::as_u64) == Some(0)
}

/// Returns whether a scalar already has its schema's type.
fn is_plain(schema: &Schema, value: &Value) -> bool {
    match (schema.get("type").and_then(Value::as_str), value) {
        (Some("string"), Value::String(text)) => {
            words(schema).is_none_or(|mut words| words.any(|word| word == text))
        }
        (Some("integer"), Value::Number(number)) => !number.is_f64() && is_in_reach(schema, number),
        (Some("boolean"), Value::Bool(_)) => true,
        _ => false,
    }
}

/// Returns whether an integer is not negative, if the schema allows no negative ones.
fn is_in_reach(schema: &Schema, number: &Number) -> bool {
    let has_floor = schema.get("minimum").and_then(Value::as_i64).is_some_and(|floor| floor >= 0);
    !has_floor || number.is_u64()
}

/// Returns the only texts that a schema allows, if there is such a list.
fn words(schema: &Schema) -> Option<impl Iterator<Item = &str>> {
    let many = schema.get("enum").and_then(Value::as_array);
    let one = schema.get("const");
    (many.is_some() || one.is_some()).then(|| many.into_iter().flatten().chain(one).filter_map(Value::as_str))
}

/// Returns a value as a string; `None` if it cannot be normalized.
fn string(schema: &Schema, value: &Value, place: Place) -> Option<Value> {
    let words = words(schema);
    match value {
        Value::String(text) => {
            let mut fitting = words?.filter(|word| word.eq_ignore_ascii_case(text.trim()));
            let (first, second) = (fitting.next()?, fitting.next());
            second.is_none().then(|| first.into())
        }
        // A number with a fraction may have been another text: 3.10 becomes 3.1. The same is true of a number if the text has a format other than
        // digits: 0644 and 644 are not sizes.
        Value::Number(number) if words.is_none() && takes_digits(schema) => {
            let number = whole(number)?;
            (!number.is_f64()).then(|| number.to_string().into())
        }
        Value::Bool(yes) if words.is_none() && place == Place::Among => Some(yes.to_string().into()),
        _ => None,
    }
}

fn takes_digits(schema: &Schema) -> bool {
    schema.get("pattern").and_then(Value::as_str).is_none_or(|pattern| pattern.starts_with("^[0-9]"))
}

/// Returns a value as a whole number; `None` if it cannot be normalized.
fn integer(schema: &Schema, value: &Value) -> Option<Value> {
    let number = match value {
        Value::Number(number) if number.is_f64() => whole(number)?,
        Value::String(text) => whole(&serde_json::from_str(text.trim()).ok()?)?,
        _ => return None,
    };
    is_in_reach(schema, &number).then(|| number.into())
}

/// Returns a value as a number; `None` if it is not one.
fn number(value: &Value) -> Option<Value> {
    let number = match value {
        Value::Number(number) => number.clone(),
        Value::String(text) => serde_json::from_str(text.trim()).ok()?,
        _ => return None,
    };
    Number::from_f64(number.as_f64()?).map(Value::Number)
}

/// Returns a number without a fraction as an integer.
fn whole(number: &Number) -> Option<Number> {
    if !number.is_f64() {
        return Some(number.clone());
    }
    let float = number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < EXACT_MAX)?;
    Some(if float < 0.0 { Number::from(float as i64) } else { Number::from(float as u64) })
}

/// Returns a value as a boolean; `None` if it cannot be normalized.
fn boolean(value: &Value) -> Option<Value> {
    let text = value.as_str()?.trim();
    let is = |word: &str| text.eq_ignore_ascii_case(word);
    if is("true") { Some(true.into()) } else { is("false").then(|| false.into()) }
}

fn array(schema: &Schema, value: &mut Value) -> Result<(), Wrong> {
    let Value::Array(items) = value else { return Err(must_be(schema, value)) };
    let Some(of) = schema.get("items").and_then(Value::as_object) else { return Ok(()) };
    for (at, item) in items.iter_mut().enumerate() {
        value_of(of, item, Place::Among).map_err(|wrong| wrong.within(format_args!("[{at}]")))?;
    }
    Ok(())
}

fn object(schema: &Schema, value: &mut Value) -> Result<(), Wrong> {
    let Value::Object(members) = value else { return Err(must_be(schema, value)) };
    if properties(schema).is_some() {
        return make(schema, members);
    }
    let Some(of) = schema.get("additionalProperties").and_then(Value::as_object) else { return Ok(()) };
    for (name, value) in members.iter_mut() {
        value_of(of, value, Place::Among).map_err(|wrong| wrong.within(format_args!(".{name}")))?;
    }
    Ok(())
}

/// Parses a list or map that was sent as a string. Also replaces an empty map by an empty list and vice versa, because some languages confuse them.
fn unpack(value: &mut Value, opening: char) {
    if let Value::String(text) = &*value
        && text.trim_start().starts_with(opening)
        && let Ok(unpacked) = serde_json::from_str(text)
    {
        *value = unpacked;
    }
    match (&*value, opening) {
        (Value::Object(members), '[') if members.is_empty() => *value = Value::Array(Vec::new()),
        (Value::Array(items), '{') if items.is_empty() => *value = Value::Object(Map::new()),
        _ => {}
    }
}

/// Converts a word to an object, if it is a valid value of exactly one of the object's members.
fn unfold(schema: &Schema, value: &mut Value) {
    let Value::String(text) = &*value else { return };
    let mut fitting = members_of_words(schema).filter_map(|(name, of)| {
        let word = words(of)?.find(|word| word.eq_ignore_ascii_case(text.trim()))?;
        Some((name.clone(), Value::from(word)))
    });
    if let (Some(only), None) = (fitting.next(), fitting.next()) {
        *value = Value::Object(Map::from_iter([only]));
    }
}

/// Returns the members whose values are words of a list.
fn members_of_words(schema: &Schema) -> impl Iterator<Item = (&String, &Schema)> {
    let members = properties(schema).into_iter().flatten();
    members.filter_map(|(name, of)| of.as_object().map(|of| (name, of))).filter(|(_, of)| words(of).is_some())
}

fn must_be(schema: &Schema, value: &Value) -> Wrong {
    let mut what = format!("must be {}, got ", kind(schema));
    let shown = value.to_string();
    what.extend(shown.chars().take(SHOWN_MAX));
    if shown.chars().nth(SHOWN_MAX).is_some() {
        what.push_str("...");
    }
    Wrong::new(what)
}

/// Describes the values that a schema allows.
fn kind(schema: &Schema) -> String {
    let bound = |word| schema.get(word).and_then(Value::as_u64);
    match schema.get("type").and_then(Value::as_str) {
        Some("string") => match (words(schema), schema.get("examples").and_then(Value::as_array)) {
            (Some(words), _) => match words.collect::<Vec<_>>().as_slice() {
                [only] => format!("`{only}`"),
                words => format!("one of {}", words.join(", ")),
            },
            (None, Some(examples)) => {
                let examples: Vec<_> = examples.iter().map(Value::to_string).collect();
                format!("a string such as {}", examples.join(" or "))
            }
            (None, None) => "a string".into(),
        },
        Some("integer") => match (bound("minimum"), bound("maximum")) {
            (Some(least), Some(most)) => format!("a whole number from {least} to {most}"),
            (Some(least), None) => format!("a whole number, {least} or more"),
            (None, _) => "a whole number".into(),
        },
        Some("number") => match (bound("minimum"), bound("maximum")) {
            (Some(least), Some(most)) => format!("a number from {least} to {most}"),
            (Some(least), None) => format!("a number, {least} or more"),
            (None, _) => "a number".into(),
        },
        Some("boolean") => "true or false".into(),
        Some("array") => match schema.get("items").and_then(|of| of.get("type")).and_then(Value::as_str) {
            Some("string") => r#"an array of strings such as ["a", "b"]"#.into(),
            _ => "an array".into(),
        },
        Some("object") => {
            match schema.get("additionalProperties").and_then(|of| of.get("type")).and_then(Value::as_str) {
                Some("string") => r#"an object of strings such as {"a": "b"}"#.into(),
                _ => match members_of_words(schema)
                    .filter_map(|(_, of)| words(of))
                    .flatten()
                    .collect::<Vec<_>>()
                {
                    words if words.is_empty() => "an object".into(),
                    words => format!("an object, or one of {}", words.join(", ")),
                },
            }
        }
        Some(_) | None => "something else".into(),
    }
}
