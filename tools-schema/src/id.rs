//! Ids: random, 1 to 2^63-1, shown as 13 characters of lowercase RFC 4648 base32 over the 8 big-endian bytes, unpadded.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::str::FromStr;

use data_encoding::{Encoding, Specification};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The length of an id as text, in characters.
pub const ID_LEN: usize = 13;

/// An id, to show the form.
const EXAMPLE: &str = "kpukhbkw6qsnw";

/// Returns the indefinite article of a word.
fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// Returns what is wrong with a text that is not an id.
fn flaw(text: &str, kind: &str) -> String {
    let has_form = text.len() == ID_LEN && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'));
    if has_form {
        format!("no {kind} has this id")
    } else {
        format!("{} {kind} id has the form {EXAMPLE}, {ID_LEN} characters of a-z and 2-7", article(kind))
    }
}

fn base32() -> &'static Encoding {
    static ENCODING: std::sync::OnceLock<Encoding> = std::sync::OnceLock::new();
    ENCODING.get_or_init(|| {
        let mut spec = Specification::new();
        spec.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
        // Non-zero trailing bits are refused, so that each id has only one spelling.
        spec.check_trailing_bits = true;
        spec.encoding().expect("a constant specification")
    })
}

/// A kind of object with ids.
pub trait Kind: 'static {
    /// The word for it in messages, such as `vm`.
    const WORD: &'static str;
}

/// Declares the kinds of objects with ids.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $alias:ident $word:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $kind {}
        impl Kind for $kind {
            const WORD: &'static str = $word;
        }
        #[doc = concat!("The id of one ", $word, ".")]
        pub type $alias = Id<$kind>;
    )*};
}

kinds! {
    /// A virtual machine.
    VmKind VmId "vm";
    /// A read-only master image.
    ImageKind ImageId "image";
    /// A writable disk.
    DriveKind DriveId "drive";
    /// A verified file, downloaded or imported.
    AssetKindTag AssetId "asset";
    /// A blueprint of images.
    TemplateKind TemplateId "template";
    /// One run of a template.
    BuildKind BuildId "build";
    /// A long operation.
    OpKind OpId "op";
    /// A VM's memory and drives at one moment.
    CheckpointKind CheckpointId "checkpoint";
    /// A command in a VM. The upper half of its number identifies the boot, see [`CommandId::is_of_boot`].
    CommandKind CommandId "command";
    /// One boot of a VM.
    BootKind BootId "boot";
    /// One installation of Nexus (a state directory).
    InstanceKind InstanceId "instance";
    /// An access token.
    TokenKind TokenId "token";
}

/// The id of an object of kind `K`.
pub struct Id<K> {
    value: i64,
    kind: PhantomData<fn() -> K>,
}

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {a} {kind} id: {why}", a = article(.kind), why = flaw(.text, .kind))]
pub struct ParseIdError {
    /// The given text, shortened.
    pub text: String,
    /// The kind of id that was expected.
    pub kind: &'static str,
}

impl<K: Kind> Id<K> {
    /// Creates an id from a number from 1 to 2^63-1; `None` outside that range.
    pub fn from_i64(value: i64) -> Option<Self> {
        (value > 0).then_some(Self { value, kind: PhantomData })
    }

    /// Creates an id from 8 random bytes; `None` for the one pattern in 2^63 that gives 0.
    pub fn from_random(bytes: [u8; 8]) -> Option<Self> {
        Self::from_i64((u64::from_be_bytes(bytes) >> 1) as i64)
    }

    /// Returns the number, as in the store.
    pub fn as_i64(self) -> i64 {
        self.value
    }
}

impl CommandId {
    /// Returns the id of the command `number` of a boot; `None` for number 0 of the boot 0. 31 bits identify the boot.
    pub fn of_boot(boot: u32, number: u32) -> Option<Self> {
        Self::from_i64(i64::from(boot >> 1) << 32 | i64::from(number))
    }

    /// Returns whether it belongs to this boot.
    pub fn is_of_boot(self, boot: u32) -> bool {
        self.value >> 32 == i64::from(boot >> 1)
    }
}

impl<K: Kind> FromStr for Id<K> {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        decode(text)
            .and_then(Self::from_i64)
            .ok_or_else(|| ParseIdError { text: text.chars().take(40).collect(), kind: K::WORD })
    }
}

/// Returns whether `text` is a valid id of any kind; such a text cannot be a name.
pub fn is_id(text: &str) -> bool {
    decode(text).is_some_and(|value| value > 0)
}

fn decode(text: &str) -> Option<i64> {
    if text.len() != ID_LEN {
        return None;
    }
    let bytes: [u8; 8] = base32().decode(text.as_bytes()).ok()?.try_into().ok()?;
    Some(i64::from_be_bytes(bytes))
}

impl<K> fmt::Display for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&base32().encode(&self.value.to_be_bytes()))
    }
}

impl<K> fmt::Debug for Id<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<K> Clone for Id<K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K> Copy for Id<K> {}

impl<K> PartialEq for Id<K> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<K> Eq for Id<K> {}

impl<K> PartialOrd for Id<K> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K> Ord for Id<K> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value.cmp(&other.value)
    }
}

impl<K> Hash for Id<K> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.value.hash(state);
    }
}

impl<K> Serialize for Id<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Id<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<K: Kind> JsonSchema for Id<K> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("{}-id", K::WORD).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[a-p][a-z2-7]{12}$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_form_round_trips(value in 1..=i64::MAX) {
            let id = VmId::from_i64(value).unwrap();
            let text = id.to_string();
            prop_assert_eq!(text.len(), ID_LEN);
            prop_assert!(is_id(&text));
            prop_assert_eq!(text.parse::<VmId>().unwrap(), id);
        }

        #[test]
        fn one_spelling_only(text in "[a-z2-7]{13}") {
            if let Ok(id) = text.parse::<VmId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn what_is_no_id_is_told_the_form_of_one() {
        assert!(is_id(EXAMPLE));
        let form = "has the form kpukhbkw6qsnw, 13 characters of a-z and 2-7";
        for (said, expected) in [
            ("web-1".parse::<OpId>().unwrap_err().to_string(), "`web-1` is not an op id: an op id"),
            ("web-1".parse::<ImageId>().unwrap_err().to_string(), "`web-1` is not an image id: an image id"),
            ("web-1".parse::<BootId>().unwrap_err().to_string(), "`web-1` is not a boot id: a boot id"),
        ] {
            assert_eq!(said, format!("{expected} {form}"));
        }
        // The form is right, the value is out of range.
        for text in ["aaaaaaaaaaaaa", "qaaaaaaaaaaaa", "aaaaaaaaaaaab"] {
            let said = text.parse::<BootId>().unwrap_err().to_string();
            assert_eq!(said, format!("`{text}` is not a boot id: no boot has this id"));
        }
    }

    #[test]
    fn refuses_what_is_not_canonical() {
        for text in
            ["", "aaaaaaaaaaaaa", "aaaaaaaaaaaab", "AAAAAAAAAAAAC", "qaaaaaaaaaaaa", "aaaaaaaaaaaa=", "aaaa"]
        {
            assert!(text.parse::<VmId>().is_err(), "{text}");
        }
        assert_eq!(VmId::from_i64(1).unwrap().to_string(), "aaaaaaaaaaaac");
        assert!(VmId::from_i64(0).is_none());
        assert!(VmId::from_i64(-1).is_none());
    }
}
