//! `nexusctl provider`: the providers of assets.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use nexus_schema::tools::asset::AssetKind;
use nexus_schema::tools::provider::{
    ProviderDetails, ProviderInspect, ProviderInspectParams, ProviderList, ProviderListParams,
    ProviderOrigin, ProviderRemove, ProviderRemoveParams, ProviderSet, ProviderSetParams, ProviderWhole,
};
use nexus_schema::{Name, Timestamp};
use serde_json::{Map, Value, json};

use super::App;
use super::args::{pair, word};
use super::client::raw;
use super::error::Error;
use super::format;
use super::list::{self, Paging};
use super::ui::{Format, Table};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List where assets come from
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show a provider with all its fields
    #[command(visible_alias = "show")]
    Inspect(OneArgs),
    /// Add a provider, or change fields of one
    Set(SetArgs),
    /// Remove an added provider, or reset a built-in one to its shipped definition
    #[command(visible_aliases = ["rm", "reset"])]
    Remove(OneArgs),
}

/// Which providers.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only providers that have assets of this kind
    #[arg(long, value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: Option<AssetKind>,
    #[command(flatten)]
    paging: Paging,
}

/// Which provider.
#[derive(Debug, Args)]
pub(crate) struct OneArgs {
    /// The provider's name
    provider: String,
}

/// What is to change.
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    /// The provider's name; an unknown name adds a provider
    provider: Name,
    /// A field and its new value, such as `mirrors=https://mirror.example/alpine`: kind, about, api, min_version; mirrors, keys and
    /// drivers, which may be repeated; arch, versions and stages, as JSON
    #[arg(value_name = "FIELD=VALUE", value_parser = pair)]
    fields: Vec<(String, String)>,
    /// A file with fields as a JSON object, or with what `provider inspect --json` prints; - for stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A field to reset to its shipped value, or to remove from an added provider; may be repeated
    #[arg(long, value_name = "FIELD")]
    reset: Vec<String>,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::List(args) => list(app, args).await,
        Command::Inspect(args) => {
            let params = ProviderInspectParams { provider: args.provider };
            let whole = app.connect().await?.call::<ProviderInspect>(&params).await?;
            show(app, &whole)
        }
        Command::Set(args) => {
            let params = asked(app, args)?;
            let whole = app.connect().await?.call::<ProviderSet>(&params).await?;
            show(app, &whole)
        }
        Command::Remove(args) => {
            let params = ProviderRemoveParams { provider: args.provider };
            let removed = app.connect().await?.call::<ProviderRemove>(&params).await?;
            match (app.ui.format, &removed.provider) {
                (Format::Json, _) => app.ui.json(&raw(&removed)?)?,
                (Format::Quiet, _) => app.ui.line(&removed.name)?,
                (Format::Human, Some(_)) => {
                    app.ui.line(&format!("{} reset to its shipped definition", removed.name))?
                }
                (Format::Human, None) => app.ui.line(&format!("{} removed", removed.name))?,
            }
            Ok(0)
        }
    }
}

/// Lists them.
pub(crate) async fn list(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| ProviderListParams { kind: args.kind, limit: Some(limit), cursor };
    let listed =
        list::all::<ProviderList, ProviderDetails>(&mut client, &args.paging, "providers", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|provider| &provider.name))?,
        Format::Human => {
            listed.show(&app.ui, table(&listed.rows), "no providers of this kind")?;
            for provider in &listed.rows {
                if let Some(problem) = &provider.problem {
                    app.ui.warn(&format!("{} cannot be used: {problem}", provider.name));
                }
            }
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

/// The arguments of the tool.
fn asked(app: &App, args: SetArgs) -> Result<ProviderSetParams, Error> {
    let mut all = match &args.file {
        Some(file) => fields_of_file(app, file)?,
        None => Map::new(),
    };
    all.extend(fields_of_words(args.fields)?);
    if all.is_empty() && args.reset.is_empty() {
        return Err(Error::usage("nothing to change: give FIELD=VALUE, --file FILE or --reset FIELD"));
    }
    all.insert("provider".into(), json!(args.provider));
    all.insert("reset".into(), json!(args.reset));
    serde_path_to_error::deserialize(Value::Object(all)).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." { String::new() } else { format!("{path}: ") };
        Error::usage(format!("{at}{}", error.inner()))
    })
}

fn fields_of_file(app: &App, file: &Path) -> Result<Map<String, Value>, Error> {
    let failed = |source| Error::File { what: "read the provider's fields", path: file.to_owned(), source };
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let read = serde_json::from_str(&text.map_err(failed)?);
    let Ok(Value::Object(mut fields)) = read else {
        let why = read.err().map(|e| format!(": {e}")).unwrap_or_default();
        return Err(Error::usage(format!("{} does not contain a JSON object{why}", file.display())));
    };
    match fields.remove("fields") {
        // The output of `provider inspect --json`.
        Some(Value::Object(whole)) => {
            if let Some(abridged) = fields.get("abridged").and_then(Value::as_array) {
                let abridged: Vec<&str> = abridged.iter().filter_map(Value::as_str).collect();
                app.ui.warn(&format!("credentials in {} are not part of the copy", abridged.join(" and ")));
            }
            Ok(whole)
        }
        Some(other) => {
            fields.insert("fields".into(), other);
            Ok(fields)
        }
        None => Ok(fields),
    }
}

fn fields_of_words(words: Vec<(String, String)>) -> Result<Map<String, Value>, Error> {
    let mut fields: Map<String, Value> = Map::new();
    for (field, value) in words {
        match field.as_str() {
            "mirrors" | "keys" | "drivers" => {
                let value = if field == "keys" { key(&value) } else { value };
                match fields.entry(field).or_insert_with(|| json!([])) {
                    Value::Array(values) => values.push(value.into()),
                    _ => return Err(Error::usage("expected a list")),
                }
            }
            "arch" | "versions" | "stages" => {
                let value: Value = serde_json::from_str(&value)
                    .map_err(|e| Error::usage(format!("{field} must be JSON: {e}")))?;
                fields.insert(field, value);
            }
            _ => {
                if fields.insert(field.clone(), value.into()).is_some() {
                    return Err(Error::usage(format!("{field} is given twice")));
                }
            }
        }
    }
    Ok(fields)
}

/// Makes a key file's path absolute for the daemon, which runs in another directory; an armored key is not changed.
fn key(value: &str) -> String {
    match std::path::absolute(value) {
        Ok(path) if !value.contains("-----BEGIN") => path.display().to_string(),
        Ok(_) | Err(_) => value.to_owned(),
    }
}

fn show(app: &App, whole: &ProviderWhole) -> Result<u8, Error> {
    match app.ui.format {
        Format::Json => app.ui.json(&raw(whole)?)?,
        Format::Quiet => app.ui.line(&whole.provider.name)?,
        Format::Human => {
            app.ui.table(facts(whole, app.ui.now()))?;
            if let Some(problem) = &whole.provider.problem {
                app.ui.warn(&format!("{} cannot be used: {problem}", whole.provider.name));
            }
        }
    }
    Ok(0)
}

fn facts(whole: &ProviderWhole, now: Timestamp) -> Table {
    let provider = &whole.provider;
    let mut table = Table::of_facts();
    table.fact("name", &provider.name);
    table.fact("kind", kinds(&provider.kinds));
    let mut fields = whole.fields.clone();
    if let Some(about) = fields.remove("about") {
        table.fact("about", text(&about));
    }
    fields.remove("kind");
    let (versions, stages) = (fields.remove("versions"), fields.remove("stages"));
    for (field, value) in &fields {
        match value {
            // One value per line.
            Value::Array(values) => values.iter().for_each(|value| table.fact(field, text(value))),
            Value::Object(values) => {
                values.iter().for_each(|(key, value)| table.fact(field, format!("{key}: {}", text(value))));
            }
            value => table.fact(field, text(value)),
        }
    }
    table.maybe("versions", versions.as_ref().map(text));
    for stage in stages.iter().filter_map(Value::as_array).flatten() {
        table.fact("stage", text(stage));
    }
    table.fact("origin", origin(provider.origin));
    if !whole.set.is_empty() {
        table.fact("set", whole.set.join(", "));
    }
    if let (Some(at), Some(who)) = (whole.changed_at, &whole.changed_by) {
        table.fact("changed", format!("{at} ({}) by {who}", format::ago(at, now)));
    }
    if !whole.abridged.is_empty() {
        table.fact("not shown", format!("credentials in {}", whole.abridged.join(", ")));
    }
    table
}

/// A short form of a value: the first line of a key, the field names of an object.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.lines().next().unwrap_or_default().to_owned(),
        Value::Object(fields) => {
            let one = |(field, value): (&String, &Value)| match field.as_str() {
                "stage" | "from" => text(value),
                _ => format!("{field}={}", text(value)),
            };
            let is_first = |field: &&String| matches!(field.as_str(), "stage" | "from");
            let first = fields.iter().filter(|(field, _)| is_first(field));
            let rest = fields.iter().filter(|(field, _)| !is_first(field));
            first.chain(rest).map(one).collect::<Vec<_>>().join(" ")
        }
        Value::Array(values) => {
            let texts: Vec<_> = values.iter().map(text).collect();
            texts.join(", ")
        }
        other => other.to_string(),
    }
}

fn origin(origin: ProviderOrigin) -> &'static str {
    match origin {
        ProviderOrigin::BuiltIn => "built in",
        ProviderOrigin::Configured => "nexus.toml",
        ProviderOrigin::Set => "set at run time",
    }
}

fn table(providers: &[ProviderDetails]) -> Table {
    let mut table = Table::with_headings(&["NAME", "KIND", "VERSIONS", "STAGES", "MIRROR", "ORIGIN"])
        .dropping(&["STAGES", "MIRROR", "ORIGIN", "VERSIONS", "KIND"]);
    for provider in providers {
        table.row([
            (&provider.name).into(),
            kinds(&provider.kinds).into(),
            provider.versions.as_deref().unwrap_or("-").into(),
            provider.stages.join(" ").into(),
            provider.mirrors.first().map_or("-", String::as_str).into(),
            origin(provider.origin).into(),
        ]);
    }
    table
}

fn kinds(kinds: &[AssetKind]) -> String {
    let words: Vec<&str> = kinds.iter().map(|kind| kind.as_str()).collect();
    if words.is_empty() { "any".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_that_were_changed_are_told_apart() {
        let providers: Vec<ProviderDetails> = serde_json::from_value(serde_json::json!([
            { "name": "alpine", "kinds": ["rootfs"], "about": "Alpine", "origin": "set", "keys": 0, "versions": "release_index",
              "mirrors": ["http://mirror.example/alpine"], "stages": ["download", "checksum", "decompress", "store"],
              "drivers": ["qemu", "firecracker"] },
            { "name": "file", "about": "a file", "origin": "built_in", "keys": 0, "versions": "given", "stages": ["open", "store"],
              "drivers": [] }
        ]))
        .unwrap();
        insta::assert_snapshot!(table(&providers).render(None, false), @"
        NAME    KIND    VERSIONS       STAGES                              MIRROR                        ORIGIN
        alpine  rootfs  release_index  download checksum decompress store  http://mirror.example/alpine  set at run time
        file    any     given          open store                          -                             built in
        ");
    }

    #[test]
    fn a_provider_is_shown_whole() {
        let whole: ProviderWhole = serde_json::from_value(json!({
            "provider": { "name": "ours", "kinds": ["kernel"], "about": "ours", "origin": "set", "keys": 1, "stages": [], "drivers": [] },
            "fields": { "about": "ours", "kind": "kernel", "mirrors": ["http://a.example", "http://b.example"], "arch": { "x86_64": { "file": "vmlinux", "ci": "1" } },
                "keys": ["-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDME"],
                "versions": { "from": "list", "versions": ["6.1", "6.2"] },
                "stages": [{ "url": "{mirror}/f", "stage": "download" }, { "stage": "store" }] },
            "set": ["mirrors", "stages"], "abridged": ["mirrors"], "revision": 3,
            "changed_at": "2026-01-02T03:04:05.000Z", "changed_by": "uid:0"
        }))
        .unwrap();
        let now = whole.changed_at.unwrap();
        insta::assert_snapshot!(facts(&whole, now).render(None, false), @"
        name       ours
        kind       kernel
        about      ours
        arch       x86_64: ci=1 file=vmlinux
        keys       -----BEGIN PGP PUBLIC KEY BLOCK-----
        mirrors    http://a.example
        mirrors    http://b.example
        versions   list versions=6.1, 6.2
        stage      download url={mirror}/f
        stage      store
        origin     set at run time
        set        mirrors, stages
        changed    2026-01-02T03:04:05.000Z (just now) by uid:0
        not shown  credentials in mirrors
        ");
    }

    #[test]
    fn fields_are_understood() {
        let words = |words: &[&str]| fields_of_words(words.iter().map(|word| pair(word).unwrap()).collect());
        let fields =
            words(&["mirrors=http://a/?b=c", "mirrors=http://d", "about=x = y", "arch={\"x86_64\":{}}"]);
        assert_eq!(
            Value::Object(fields.unwrap()),
            json!({ "mirrors": ["http://a/?b=c", "http://d"], "about": "x = y", "arch": { "x86_64": {} } })
        );
        assert!(words(&["stages=download"]).is_err());
        assert!(words(&["kind=kernel", "kind=rootfs"]).is_err());
        assert_eq!(key("/a/key"), "/a/key");
        assert_eq!(key("-----BEGIN PGP"), "-----BEGIN PGP");
        assert_eq!(key("Cargo.toml"), std::path::absolute("Cargo.toml").unwrap().display().to_string());
    }
}
