//! A file to write into a new VM.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::tools::ContentEncoding;
use crate::tools::file::parse_mode;

/// A file to be written once, before a new VM is ready for the first time: a text, or an object with a mode and an owner.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VmFile {
    /// The content.
    pub content: String,
    /// How `content` is encoded; text where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<ContentEncoding>,
    /// The permission bits in octal, such as `0755`; `0644` where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Whose it is: a name, a uid, `uid:gid`, or `image` for the image's user; the owner of the directory where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The content with mode and owner.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Whole {
    /// The content.
    content: String,
    /// How `content` is encoded (default text).
    #[serde(default)]
    encoding: Option<ContentEncoding>,
    /// The permission bits in octal, such as `0755` (default `0644`).
    #[serde(default)]
    mode: Option<String>,
    /// Its owner: name, uid, `uid:gid`, or `image` (the image's); default: its directory's.
    #[serde(default)]
    user: Option<String>,
}

impl VmFile {
    /// Creates a text file with the default mode and owner.
    pub fn text(content: impl Into<String>) -> Self {
        Self { content: content.into(), ..Self::default() }
    }

    /// Returns its bytes and its permission bits; the error is a message.
    pub fn resolve(&self) -> Result<(Vec<u8>, u32), String> {
        let encoding = self.encoding.unwrap_or_default();
        let bytes = encoding.decode(self.content.clone()).map_err(|error| error.to_string())?;
        let mode = match &self.mode {
            None => 0o644,
            Some(text) => parse_mode(text).ok_or_else(|| {
                let shown: String = text.chars().take(40).collect();
                format!("`{}` is not a mode: octal digits such as 0644", shown.escape_debug())
            })?,
        };
        let is_user =
            |user: &String| !user.is_empty() && user.len() <= 256 && !user.contains(char::is_control);
        if !self.user.as_ref().is_none_or(is_user) {
            return Err("its user is not a name, uid or uid:gid".into());
        }
        Ok((bytes, mode))
    }

    /// Returns the size of its parts in the call, in bytes.
    pub fn size(&self) -> usize {
        self.content.len() + self.user.as_ref().map_or(0, String::len)
    }
}

impl JsonSchema for VmFile {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "VmFile".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, Whole::json_schema(generator)] })
    }
}

impl<'de> Deserialize<'de> for VmFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Forms;

        impl<'de> Visitor<'de> for Forms {
            type Value = VmFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, or an object of content, encoding, mode and user")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<VmFile, E> {
                Ok(VmFile::text(text))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<VmFile, E> {
                Ok(VmFile::text(text))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<VmFile, A::Error> {
                let Whole { content, encoding, mode, user } =
                    Whole::deserialize(MapAccessDeserializer::new(map))?;
                Ok(VmFile { content, encoding, mode, user })
            }
        }

        deserializer.deserialize_any(Forms)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    #[test]
    fn a_file_is_a_text_or_an_object() {
        let text: VmFile = from_value(json!("hi\n")).unwrap();
        assert_eq!(text.resolve(), Ok((b"hi\n".to_vec(), 0o644)));
        let whole = json!({ "content": "AAH/", "encoding": "base64", "mode": "4755", "user": "1000:1000" });
        let file: VmFile = from_value(whole.clone()).unwrap();
        assert_eq!(file.resolve(), Ok((vec![0, 1, 255], 0o4755)));
        assert_eq!(to_value(&file).unwrap(), whole);
        assert_eq!(from_value::<VmFile>(to_value(&text).unwrap()).unwrap(), text);
    }

    #[test]
    fn what_is_no_file_says_why() {
        for (value, words) in [
            (json!(7), "a text, or an object"),
            (json!({ "mode": "0644" }), "missing field `content`"),
            (json!({ "content": "", "owner": "me" }), "unknown field `owner`"),
        ] {
            let error = from_value::<VmFile>(value.clone()).unwrap_err().to_string();
            assert!(error.contains(words), "{value}: {error}");
        }
        let base64 = Some(ContentEncoding::Base64);
        for (file, words) in [
            (VmFile { content: "%".into(), encoding: base64, ..VmFile::default() }, "base64"),
            (VmFile { mode: Some("rw-r--r--".into()), ..VmFile::default() }, "octal"),
            (VmFile { user: Some(String::new()), ..VmFile::default() }, "user"),
        ] {
            let error = file.resolve().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
