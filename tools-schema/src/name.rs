//! Names, and references that are a name or an id.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::{Id, Kind, is_id};

/// The maximum length of a name, in characters.
pub const NAME_MAX: usize = 63;

/// A name: `^[a-z][a-z0-9-]{0,62}$`, unique per kind, and never a valid id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It does not have the form of a name.
    #[error("`{text}` is not a name: a letter a-z first, then up to 62 of a-z, 0-9 and -")]
    Malformed {
        /// The given text, shortened.
        text: String,
    },
    /// It has the form of an id, so a reference to it would be ambiguous.
    #[error("`{text}` cannot be a name: it has the form of an id")]
    IsId {
        /// The given text.
        text: String,
    },
}

impl Name {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let head = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        let tail = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !head || !tail || text.len() > NAME_MAX {
            return Err(NameError::Malformed { text: text.chars().take(80).collect() });
        }
        if is_id(text) {
            return Err(NameError::IsId { text: text.into() });
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Name {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "name".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[a-z][a-z0-9-]{0,62}$" })
    }
}

/// A reference to an object of kind `K`: its id or its name.
pub enum Reference<K> {
    /// By id.
    Id(Id<K>),
    /// By name.
    Name(Name),
}

impl<K: Kind> FromStr for Reference<K> {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse::<Id<K>>() {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl<K> fmt::Display for Reference<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl<K> fmt::Debug for Reference<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<K> Clone for Reference<K> {
    fn clone(&self) -> Self {
        match self {
            Self::Id(id) => Self::Id(*id),
            Self::Name(name) => Self::Name(name.clone()),
        }
    }
}

impl<K> PartialEq for Reference<K> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Id(a), Self::Id(b)) => a == b,
            (Self::Name(a), Self::Name(b)) => a == b,
            (Self::Id(_), Self::Name(_)) | (Self::Name(_), Self::Id(_)) => false,
        }
    }
}

impl<K> Serialize for Reference<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Reference<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<K: Kind> JsonSchema for Reference<K> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("{}-reference", K::WORD).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "minLength": 1, "maxLength": 63 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::VmKind;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-1", "debian", &"a".repeat(63)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", "1a", "-a", "A", "a_b", "a b", "ä", "a\n", &"a".repeat(64)] {
            assert!(matches!(bad.parse::<Name>(), Err(NameError::Malformed { .. })), "{bad}");
        }
    }

    #[test]
    fn a_name_is_never_an_id() {
        let id = crate::id::VmId::from_i64(0x1234_5678_9abc_def0).unwrap().to_string();
        assert_eq!(id.parse::<Name>(), Err(NameError::IsId { text: id.clone() }));
        assert!(matches!(id.parse::<Reference<VmKind>>(), Ok(Reference::Id(_))));
        assert!(matches!("web".parse::<Reference<VmKind>>(), Ok(Reference::Name(_))));
    }
}
