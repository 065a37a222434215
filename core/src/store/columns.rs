//! Stores values of nexus-schema in columns.

use nexus_schema::Timestamp;
use nexus_schema::id::{Id, Kind};
use rusqlite::Row;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A value stored as JSON text.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: Serialize> rusqlite::ToSql for Json<T> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let text = serde_json::to_string(&self.0)
            .map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
        Ok(text.into())
    }
}

impl<T: DeserializeOwned> FromSql for Json<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let text = value.as_str()?;
        serde_json::from_str(text).map(Json).map_err(|e| FromSqlError::Other(Box::new(e)))
    }
}

/// A value stored as the text that it is parsed from.
pub(crate) struct Text<T>(pub(crate) T);

impl<T: std::fmt::Display> rusqlite::ToSql for Text<T> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.0.to_string().into())
    }
}

impl<T: std::str::FromStr> FromSql for Text<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_str()?.parse().map(Text).map_err(|_| FromSqlError::InvalidType)
    }
}

/// Unsigned sizes are stored as SQLite's signed integers; no real size is large enough to differ.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Reads columns of Nexus' own types.
pub(crate) trait RowExt {
    /// An id.
    fn id<K: Kind>(&self, column: &str) -> rusqlite::Result<Id<K>>;
    /// An id or `NULL`.
    fn id_opt<K: Kind>(&self, column: &str) -> rusqlite::Result<Option<Id<K>>>;
    /// A point in time.
    fn time(&self, column: &str) -> rusqlite::Result<Timestamp>;
    /// A point in time or `NULL`.
    fn time_opt(&self, column: &str) -> rusqlite::Result<Option<Timestamp>>;
    /// A size or count.
    fn unsigned(&self, column: &str) -> rusqlite::Result<u64>;
    /// A value stored as JSON.
    fn json<T: DeserializeOwned>(&self, column: &str) -> rusqlite::Result<T>;
    /// A value stored as JSON, or `NULL`.
    fn json_opt<T: DeserializeOwned>(&self, column: &str) -> rusqlite::Result<Option<T>>;
    /// A value stored as text.
    fn text<T: std::str::FromStr>(&self, column: &str) -> rusqlite::Result<T>;
    /// A value stored as text, or `NULL`.
    fn text_opt<T: std::str::FromStr>(&self, column: &str) -> rusqlite::Result<Option<T>>;
}

impl RowExt for Row<'_> {
    fn id<K: Kind>(&self, column: &str) -> rusqlite::Result<Id<K>> {
        let value: i64 = self.get(column)?;
        Id::from_i64(value).ok_or(rusqlite::Error::IntegralValueOutOfRange(0, value))
    }

    fn id_opt<K: Kind>(&self, column: &str) -> rusqlite::Result<Option<Id<K>>> {
        Ok(self.get::<_, Option<i64>>(column)?.and_then(Id::from_i64))
    }

    fn time(&self, column: &str) -> rusqlite::Result<Timestamp> {
        self.get(column).map(Timestamp::from_millis)
    }

    fn time_opt(&self, column: &str) -> rusqlite::Result<Option<Timestamp>> {
        Ok(self.get::<_, Option<i64>>(column)?.map(Timestamp::from_millis))
    }

    fn unsigned(&self, column: &str) -> rusqlite::Result<u64> {
        self.get::<_, i64>(column).map(|v| u64::try_from(v).unwrap_or(0))
    }

    fn json<T: DeserializeOwned>(&self, column: &str) -> rusqlite::Result<T> {
        self.get::<_, Json<T>>(column).map(|j| j.0)
    }

    fn json_opt<T: DeserializeOwned>(&self, column: &str) -> rusqlite::Result<Option<T>> {
        Ok(self.get::<_, Option<Json<T>>>(column)?.map(|j| j.0))
    }

    fn text<T: std::str::FromStr>(&self, column: &str) -> rusqlite::Result<T> {
        self.get::<_, Text<T>>(column).map(|t| t.0)
    }

    fn text_opt<T: std::str::FromStr>(&self, column: &str) -> rusqlite::Result<Option<T>> {
        Ok(self.get::<_, Option<Text<T>>>(column)?.map(|t| t.0))
    }
}
