//! `nexusctl asset providers`: where assets come from.

use nexus_schema::tools::asset::AssetKind;
use nexus_schema::tools::provider::{ProviderDetails, ProviderList, ProviderListParams};

use super::App;
use super::args::word;
use super::error::Error;
use super::list::{self, Paging};
use super::ui::{Format, Table};

/// Which providers.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only providers that have assets of this kind
    #[arg(long, value_parser = word::<AssetKind>(&["kernel", "rootfs", "vmm"]))]
    kind: Option<AssetKind>,
    #[command(flatten)]
    paging: Paging,
}

/// Lists them.
pub(crate) async fn list(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let page = |limit, cursor| ProviderListParams { kind: args.kind, limit: Some(limit), cursor };
    let listed =
        list::all::<ProviderList, ProviderDetails>(&mut client, &args.paging, "providers", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|provider| &provider.name))?,
        Format::Human => {
            app.ui.table(table(&listed.rows))?;
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

fn table(providers: &[ProviderDetails]) -> Table {
    let mut table = Table::with_headings(&["NAME", "KIND", "VERSIONS", "STAGES", "FROM", "CHANGED"]);
    for provider in providers {
        table.row([
            (&provider.name).into(),
            kinds(&provider.kinds).into(),
            provider.versions.as_deref().unwrap_or("-").into(),
            provider.stages.join(" ").into(),
            provider.mirrors.first().map_or("-", String::as_str).into(),
            if provider.built_in { "-" } else { "yes" }.into(),
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
            { "name": "alpine", "kinds": ["rootfs"], "about": "Alpine", "built_in": false, "keys": 0, "versions": "release_index",
              "mirrors": ["http://mirror.example/alpine"], "stages": ["download", "checksum", "decompress", "store"],
              "drivers": ["qemu", "firecracker"] },
            { "name": "file", "about": "a file", "built_in": true, "keys": 0, "versions": "given", "stages": ["open", "store"],
              "drivers": [] }
        ]))
        .unwrap();
        insta::assert_snapshot!(table(&providers).render(None, false), @"
        NAME    KIND    VERSIONS       STAGES                              FROM                          CHANGED
        alpine  rootfs  release_index  download checksum decompress store  http://mirror.example/alpine  yes
        file    any     given          open store                          -                             -
        ");
    }
}
