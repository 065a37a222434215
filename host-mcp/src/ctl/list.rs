//! Lists that come in pages: reads all of them, or the requested number of rows.

use clap::Args;
use nexus_schema::Tool;
use nexus_schema::limits::PAGE_MAX;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::client::{Client, Options, raw};
use super::error::Error;
use super::ui::{Table, Ui};

/// How much of a list.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Paging {
    /// Maximum number of rows [default: all]
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Where to continue: the cursor of an earlier list
    #[arg(long)]
    cursor: Option<String>,
}

impl Paging {
    /// Sets the default limit.
    pub(crate) fn or(self, limit: u32) -> Self {
        Self { limit: self.limit.or(Some(limit)), cursor: self.cursor }
    }
}

/// The part of a list that was read.
#[derive(Debug)]
pub(crate) struct Listed<R> {
    /// The rows.
    pub(crate) rows: Vec<R>,
    /// The structured result: a single page unchanged, several pages merged.
    pub(crate) raw: Box<RawValue>,
    /// The cursor of the next page.
    next: Option<String>,
}

impl<R> Listed<R> {
    /// Shows the rows, or a message if there are none.
    pub(crate) fn show(&self, ui: &Ui, table: Table, nothing: &str) -> Result<(), Error> {
        if self.rows.is_empty() {
            ui.say(nothing);
            return Ok(());
        }
        ui.table(table)
    }

    /// Reports if there are more rows.
    pub(crate) fn say_more(&self, ui: &Ui) {
        if let Some(next) = &self.next {
            ui.say(&format!("more results: continue with --cursor {next}"));
        }
    }
}

/// Reads a list whose rows are under `key`.
pub(crate) async fn all<T, R>(
    client: &mut Client,
    paging: &Paging,
    key: &str,
    mut params: impl FnMut(u32, Option<String>) -> T::Params,
) -> Result<Listed<R>, Error>
where
    T: Tool,
    R: DeserializeOwned,
{
    let garbled = |source| Error::Garbled { during: T::NAME.into(), source };
    let mut left = paging.limit;
    let mut cursor = paging.cursor.clone();
    let mut whole: Option<Map<String, Value>> = None;
    loop {
        let limit = left.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let reply = client.call_with::<T>(&params(limit, cursor.clone()), Options::default()).await?;
        let mut page: Map<String, Value> = reply.facts(T::NAME, T::SHAPE)?;
        let next = page.get("next_cursor").and_then(Value::as_str).map(str::to_owned);
        let rows = page.get(key).and_then(Value::as_array).map_or(0, Vec::len);
        left = left.map(|left| left.saturating_sub(u32::try_from(rows).unwrap_or(u32::MAX)));
        // Stops if the daemon's pages never end.
        let ends = next.is_none() || left == Some(0) || rows == 0 || next == cursor;
        match &mut whole {
            None if ends => {
                let rows = page.remove(key).unwrap_or_else(|| Value::Array(Vec::new()));
                let rows = serde_json::from_value(rows).map_err(garbled)?;
                return Ok(Listed { rows, raw: reply.structured.unwrap_or(reply.raw), next });
            }
            None => whole = Some(page),
            Some(whole) => {
                if let (Some(Value::Array(all)), Some(Value::Array(more))) =
                    (whole.get_mut(key), page.remove(key))
                {
                    all.extend(more);
                }
                match &next {
                    Some(next) => whole.insert("next_cursor".into(), next.clone().into()),
                    None => whole.remove("next_cursor"),
                };
            }
        }
        cursor = next;
        if ends && let Some(whole) = whole {
            let rows = whole.get(key).cloned().unwrap_or_default();
            let rows = serde_json::from_value(rows).map_err(garbled)?;
            return Ok(Listed { rows, raw: raw(&whole)?, next: cursor });
        }
    }
}

/// Prints ids, one a line.
pub(crate) fn ids(ui: &Ui, ids: impl Iterator<Item = impl std::fmt::Display>) -> Result<(), Error> {
    let text: String = ids.map(|id| format!("{id}\n")).collect();
    ui.bytes(text.as_bytes())
}
