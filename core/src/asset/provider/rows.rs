//! Rows in layers: the built-in ones, with changes applied field by field.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::{ARMOR, Provider};
use crate::asset::AssetError;
use crate::asset::debian::signature::Keyring;

/// All or some fields of a row, without its name.
pub(crate) type Fields = Map<String, Value>;

/// The fields that a provider may have.
const FIELDS: [&str; 10] =
    ["about", "api", "arch", "drivers", "keys", "kind", "min_version", "mirrors", "stages", "versions"];

/// The built-in rows, by name.
static BUILT_IN: LazyLock<BTreeMap<String, Fields>> = LazyLock::new(|| {
    let rows: Vec<Fields> =
        serde_json::from_str(include_str!("providers.json")).expect("the built-in rows are JSON objects");
    rows.into_iter().filter_map(|row| Some((row.get("name")?.as_str()?.to_owned(), row))).collect()
});

/// Whether a provider is built in.
pub(crate) fn is_built_in(name: &str) -> bool {
    BUILT_IN.contains_key(name)
}

/// The field of that name, if it exists.
pub(crate) fn known_field(name: &str) -> Result<&'static str, String> {
    let known = FIELDS.iter().copied().find(|known| *known == name);
    known.ok_or_else(|| format!("a provider has no field `{name}`; it has {}", FIELDS.join(", ")))
}

/// The row of that name with a change applied: each field replaces that of the built-in row, if there is one.
pub(crate) fn row(name: &str, change: &Fields) -> Value {
    let mut row =
        BUILT_IN.get(name).cloned().unwrap_or_else(|| Map::from_iter([("name".into(), Value::from(name))]));
    row.extend(change.iter().map(|(field, value)| (field.clone(), value.clone())));
    Value::Object(row)
}

/// The built-in rows with changes applied; changes to other names are rows of their own. Returns each row by name in its stored
/// form, valid or not.
pub(crate) fn rows(changes: &BTreeMap<String, Value>) -> BTreeMap<String, Value> {
    let mut rows: BTreeMap<String, Value> =
        BUILT_IN.iter().map(|(name, row)| (name.clone(), Value::Object(row.clone()))).collect();
    for (name, change) in changes {
        let changed = match change {
            Value::Object(fields) => row(name, fields),
            // Such a row is refused when it is parsed.
            other => row(name, &Map::from_iter([("row".into(), other.clone())])),
        };
        rows.insert(name.clone(), changed);
    }
    rows
}

/// Every mistake in the changes, one sentence each.
pub fn mistakes(changes: &BTreeMap<String, Value>) -> Vec<String> {
    let rows = rows(changes);
    let of =
        |name: &String| Provider::parse(name, rows.get(name)?).err().map(|p| format!("provider {name}: {p}"));
    changes.keys().filter_map(of).collect()
}

/// Refuses keys that cannot be read or contain no key. A value that is neither a file nor armored is refused when the row is parsed.
pub(crate) fn check_keys(keys: &[String]) -> Result<(), AssetError> {
    for key in keys.iter().filter(|key| key.starts_with('/') || key.contains(ARMOR)) {
        if Keyring::of_keys(std::slice::from_ref(key))?.is_empty() {
            let path = if key.starts_with('/') { key.as_str() } else { "(armored)" };
            return Err(AssetError::Keyring { path: path.into() });
        }
    }
    Ok(())
}

/// The fields of a row without secrets, and the names of the fields that had credentials in an address.
pub(crate) fn without_credentials(row: &Value) -> (Fields, Vec<String>) {
    let mut fields = row.as_object().cloned().unwrap_or_default();
    fields.remove("name");
    let abridge = |(field, value): (&String, &mut Value)| abridge(value).then(|| field.clone());
    let abridged = fields.iter_mut().filter_map(abridge).collect();
    (fields, abridged)
}

/// Removes credentials from every address; returns whether there were any.
fn abridge(value: &mut Value) -> bool {
    match value {
        Value::String(text) => {
            let abridged = plain(text);
            let had_any = abridged != *text;
            *text = abridged;
            had_any
        }
        // `any` would stop at the first.
        Value::Array(items) => items.iter_mut().map(abridge).fold(false, |had_any, has| had_any | has),
        Value::Object(fields) => fields.values_mut().map(abridge).fold(false, |had_any, has| had_any | has),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Removes the part before an `@` from the authority of each address in a text.
fn plain(text: &str) -> String {
    let mut pieces = text.split("://");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let authority = piece.find(['/', '?', '#', ' ']).unwrap_or(piece.len());
        let host = piece[..authority].rfind('@').map_or(0, |at| at + 1);
        plain.push_str("://");
        plain.push_str(&piece[host..]);
    }
    plain
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_those_that_rows_have() {
        for (name, row) in BUILT_IN.iter() {
            let fields = row.keys().filter(|field| *field != "name");
            fields.for_each(|field| assert_eq!(known_field(field).as_deref(), Ok(&**field), "{name}"));
        }
        assert!(known_field("name").unwrap_err().contains("about, api"));
        // Each is a known field; otherwise the error would be a different one.
        for field in FIELDS {
            let refused = Provider::parse("x", &row("x", &Map::from_iter([(field.into(), json!(7))])));
            assert!(!refused.unwrap_err().to_string().contains("unknown field"), "{field}");
        }
    }

    #[test]
    fn a_change_replaces_fields_and_no_others() {
        let change = json!({ "mirrors": ["http://m.example"], "about": "ours" });
        let changed = row("alpine", change.as_object().unwrap());
        let mut shipped = row("alpine", &Map::new());
        assert_ne!(changed, shipped);
        shipped["mirrors"] = change["mirrors"].clone();
        shipped["about"] = change["about"].clone();
        assert_eq!(changed, shipped);
        assert_eq!(row("ours", &Map::new()), json!({ "name": "ours" }));
        assert!(is_built_in("alpine") && !is_built_in("ours"));
    }

    #[test]
    fn credentials_are_never_shown() {
        let row = json!({ "name": "ours", "api": "https://host.example/a@b", "about": "ask me@host.example",
            "mirrors": ["https://host.example/x", "http://me:s3cret@host.example:8080/x"],
            "stages": [{ "stage": "download", "url": "https://s3cret@{host}/f?from=http://a:s3cret@b/" }] });
        let (fields, abridged) = without_credentials(&row);
        assert!(!Value::Object(fields.clone()).to_string().contains("s3cret"), "{fields:?}");
        assert_eq!(abridged, ["mirrors", "stages"]);
        assert_eq!(fields["mirrors"], json!(["https://host.example/x", "http://host.example:8080/x"]));
        assert_eq!(fields["stages"][0]["url"], "https://{host}/f?from=http://b/");
        assert_eq!(fields["api"], row["api"]);
        assert_eq!(fields["about"], row["about"]);
        assert!(!fields.contains_key("name"));
    }
}
