//! Valid and invalid rows.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

fn row(name: &str, versions: &Value, stages: &Value) -> Value {
    json!({ "name": name, "mirrors": ["http://host.example/a"], "versions": versions, "stages": stages })
}

fn refused(stages: &Value) -> String {
    let row = row("mine", &json!({ "from": "list", "versions": ["1"] }), stages);
    Provider::parse("mine", &row).unwrap_err().to_string()
}

#[test]
fn the_built_in_rows_are_good() {
    let rows = rows(&BTreeMap::new());
    let names: Vec<_> = rows.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["alpine", "anvil", "debian", "file", "firecracker", "firecracker-ci", "kernel-org", "ubuntu", "url"]
    );
    for (name, row) in &rows {
        let provider = Provider::parse(name, row).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert!(!provider.about.is_empty());
        // A row is stored unchanged.
        assert_eq!(Provider::parse(name, &serde_json::to_value(&provider).unwrap()).unwrap(), provider);
    }
}

#[test]
fn a_row_becomes_a_plan() {
    let rows = rows(&BTreeMap::new());
    let anvil = Provider::parse("anvil", &rows["anvil"]).unwrap();
    let values = with_version(anvil.values("https://m.example").unwrap(), "6.1.150");
    let plan = anvil.plan(&values).unwrap();
    let file = format!("{}-6.1.150-{}", values["file"], values["arch"]);
    assert_eq!(plan.source, Source::Download(format!("https://m.example/v6.1.150/{file}.xz")));
    let sums = "https://m.example/v6.1.150/SHA256SUMS".to_owned();
    let listed =
        |name: String| vec![Check { expect: Expect::Listed { document: sums.clone(), name: Some(name) } }];
    assert_eq!(plan.raw, listed(format!("{file}.xz")));
    assert_eq!(plan.unpacked, listed(file));
    assert_eq!(plan.signed, [Signed { document: sums.clone(), signature: Some(format!("{sums}.asc")) }]);
    assert!(plan.is_checked());
}

#[test]
fn unknown_stages_and_fields_are_refused_by_name() {
    let download = json!({ "stage": "download", "url": "{mirror}/f" });
    let store = json!({ "stage": "store" });
    for (stages, words) in [
        (
            json!([download, { "stage": "frobnicate" }, store]),
            vec!["stages[1]", "unknown variant `frobnicate`"],
        ),
        (
            json!([{ "stage": "download", "url": "x", "speed": 1 }, store]),
            vec!["stages[0]", "unknown field `speed`"],
        ),
        (json!([download, { "stage": "store", "as": "x" }]), vec!["stages[1]", "unknown field `as`"]),
        (json!([{ "stage": "download" }, store]), vec!["stages[0]", "missing field `url`"]),
        (
            json!([download, { "stage": "decompress", "format": "rar" }, store]),
            vec!["unknown variant `rar`", "xz"],
        ),
        (json!([download, { "stage": "checksum", "sha256": "12" }, store]), vec!["64 hexadecimal digits"]),
        (json!([download, { "stage": "checksum" }, store]), vec!["stages[1]", "either sha256, or document"]),
        (json!([{ "stage": "download", "url": "{mirrors}/f" }, store]), vec!["stages[0]", "{mirrors}"]),
        (json!([{ "stage": "download", "url": "{mirror" }, store]), vec!["brace"]),
        (json!([{ "stage": "download", "url": "{url}" }, store]), vec!["{url}", "nothing is known"]),
        (json!([store]), vec!["stages[0]", "begins with download"]),
        (json!([]), vec!["ends with store"]),
        (json!([download]), vec!["ends with store"]),
        (json!([download, download, store]), vec!["stages[1]", "one source"]),
        (json!([download, store, store]), vec!["stages[2]", "nothing can follow"]),
        (json!([download, { "stage": "extract", "members": [] }, store]), vec!["no members"]),
        (
            json!([download, { "stage": "extract", "members": [{ "path": "a", "as": "../a" }] }, store]),
            vec!["no fit name"],
        ),
        (
            json!([download, { "stage": "pgp", "document": "{mirror}/s" }, store]),
            vec!["stages[1]", "no checksum is taken from the signed document"],
        ),
        (
            json!([download, { "stage": "decompress", "format": "xz" }, { "stage": "decompress", "format": "xz" }, store]),
            vec!["stages[2]", "decompressed already"],
        ),
    ] {
        let refused = refused(&stages);
        for word in words {
            assert!(refused.contains(word), "{word} in {refused}");
        }
    }
}

#[test]
fn other_fields_are_checked_too() {
    let good = row(
        "mine",
        &json!({ "from": "list", "versions": ["1"] }),
        &json!([{ "stage": "download", "url": "{mirror}/f" }, { "stage": "store" }]),
    );
    Provider::parse("mine", &good).unwrap();
    for (field, value, word) in [
        ("speed", json!(1), "unknown field `speed`"),
        ("name", json!("Mine"), "is not a name"),
        ("name", json!("other"), "it is other, not mine"),
        ("kind", json!("disk"), "unknown variant `disk`"),
        ("mirrors", json!(["ftp://host.example"]), "is not an address"),
        ("mirrors", json!(["http://host.example/"]), "is not an address"),
        ("keys", json!(["key.asc"]), "absolute path"),
        ("versions", json!({ "from": "stars" }), "unknown variant `stars`"),
        ("versions", json!({ "from": "list", "versions": [], "more": 1 }), "unknown field `more`"),
        ("versions", json!({ "from": "listing", "url": "{api}/x", "before": "a", "after": "b" }), "{api}"),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        let refused = Provider::parse("mine", &bad).unwrap_err().to_string();
        assert!(refused.contains(word), "{word} in {refused}");
    }
}

#[test]
fn changes_replace_fields_and_mistakes_are_told_at_once() {
    let changes = BTreeMap::from([
        ("alpine".to_owned(), json!({ "mirrors": ["http://mirror.example/alpine"] })),
        ("anvil".to_owned(), json!({ "miror": [] })),
        ("mine".to_owned(), json!({ "stages": [] })),
        ("bad".to_owned(), json!(7)),
    ]);
    let rows = rows(&changes);
    let alpine = Provider::parse("alpine", &rows["alpine"]).unwrap();
    assert_eq!(alpine.mirrors, ["http://mirror.example/alpine"]);
    assert_eq!(alpine.kind, Some(AssetKind::Rootfs));
    let mistakes = mistakes(&changes);
    assert_eq!(mistakes.len(), 3, "{mistakes:?}");
    assert!(mistakes[0].starts_with("provider anvil: ") && mistakes[0].contains("`miror`"), "{mistakes:?}");
    assert!(mistakes[2].contains("missing field `versions`"), "{mistakes:?}");
}

#[test]
fn versions_are_compared_number_by_number() {
    let mut versions =
        ["1.9", "1.16.1", "1.16.1-rc1", "1.10.0", "1.16", "2.0-beta", "6.1.0-40-amd64", "6.1.0-9-amd64"];
    versions.sort_by(|a, b| compare(a, b));
    assert_eq!(
        versions,
        ["1.9", "1.10.0", "1.16", "1.16.1-rc1", "1.16.1", "2.0-beta", "6.1.0-9-amd64", "6.1.0-40-amd64"]
    );
    for bad in ["", "../x", "1/2", "1?x", "-1", "1..2", "a b", &"1".repeat(65)] {
        assert!(checked_version(bad).is_err(), "{bad}");
    }
}
