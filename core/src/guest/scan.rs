//! Scans well-formed JSON for what well-formed JSON may contain but many parsers fail on: lone surrogates, numbers that no double can
//! hold, deep nesting. Nothing is decoded, and every byte is read once.

use std::borrow::Cow;

use nexus_schema::limits::JSON_DEPTH_MAX;
use serde_json::value::RawValue;

/// Up to this length, a number without an exponent fits in a double (which has up to 309 digits before the point).
const SAFE_DIGITS: usize = 300;

/// Something in well-formed JSON that many parsers fail on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// One half of a surrogate pair (`\ud800` to `\udfff`) without the other half.
    #[error("a lone surrogate, such as \\ud800")]
    Surrogate,
    /// A number beyond what a double can hold.
    #[error("a number that is too large")]
    Number,
    /// Arrays and objects nested more than [`JSON_DEPTH_MAX`] deep.
    #[error("arrays or objects nested more than {JSON_DEPTH_MAX} deep")]
    Depth,
}

/// Fails if a value has a flaw.
pub fn check(value: &RawValue) -> Result<(), Flaw> {
    Scan::new(value).skip().map(drop)
}

/// A position in well-formed JSON. Malformed JSON gives wrong results, but never a panic or an endless loop.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Scan<'a> {
    pub(super) fn new(value: &'a RawValue) -> Self {
        Self { text: value.get(), at: 0, depth: 0 }
    }

    /// Returns the next byte after white space.
    pub(super) fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    /// Passes the next value, and returns its text.
    pub(super) fn skip(&mut self) -> Result<&'a str, Flaw> {
        self.peek();
        let (start, floor) = (self.at, self.depth);
        while let Some(byte) = self.peek() {
            match byte {
                b'{' | b'[' => self.enter()?,
                b'}' | b']' => self.leave(),
                b'"' => drop(self.string()?),
                b'-' | b'0'..=b'9' => self.number()?,
                b',' | b':' => {
                    self.at += 1;
                    continue;
                }
                _ => self.pass(|byte| byte.is_ascii_lowercase()),
            }
            if self.depth <= floor {
                break;
            }
        }
        Ok(&self.text[start..self.at])
    }

    /// Visits each member of the next value, an object; `visit` gets the name and must pass the value. Returns `false` if the next value is
    /// not an object.
    pub(super) fn members<E: From<Flaw>>(
        &mut self,
        mut visit: impl FnMut(&mut Self, Cow<'a, str>) -> Result<(), E>,
    ) -> Result<bool, E> {
        if self.peek() != Some(b'{') {
            return Ok(false);
        }
        self.enter()?;
        while let Some(byte) = self.peek() {
            match byte {
                b',' => self.at += 1,
                b'"' => {
                    let name = decode(self.string()?);
                    self.peek();
                    // The colon.
                    self.at += 1;
                    visit(self, name)?;
                }
                _ => break,
            }
        }
        self.leave();
        Ok(true)
    }

    /// Visits each value of the next value, an array; `visit` must pass it. Returns `false` if the next value is not an array.
    pub(super) fn items<E: From<Flaw>>(
        &mut self,
        mut visit: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<bool, E> {
        if self.peek() != Some(b'[') {
            return Ok(false);
        }
        self.enter()?;
        while let Some(byte) = self.peek() {
            match byte {
                b',' => self.at += 1,
                b']' => break,
                _ => visit(self)?,
            }
        }
        self.leave();
        Ok(true)
    }

    /// Returns the text between `start`, an earlier position, and the current one.
    pub(super) fn since(&self, start: usize) -> &'a str {
        &self.text[start..self.at]
    }

    /// Returns the position of the next value.
    pub(super) fn place(&mut self) -> usize {
        self.peek();
        self.at
    }

    fn enter(&mut self) -> Result<(), Flaw> {
        self.at += 1;
        self.depth += 1;
        if self.depth > JSON_DEPTH_MAX { Err(Flaw::Depth) } else { Ok(()) }
    }

    fn leave(&mut self) {
        self.at = (self.at + 1).min(self.text.len());
        self.depth = self.depth.saturating_sub(1);
    }

    /// Passes at least one byte, and all following bytes for which `is_like` is true.
    fn pass(&mut self, is_like: impl Fn(u8) -> bool) {
        let rest = &self.text.as_bytes()[self.at + 1..];
        self.at += 1 + rest.iter().position(|byte| !is_like(*byte)).unwrap_or(rest.len());
        // Well-formed JSON is ASCII outside of strings. In malformed JSON, a position must still be a character boundary.
        while !self.text.is_char_boundary(self.at) {
            self.at += 1;
        }
    }

    fn number(&mut self) -> Result<(), Flaw> {
        let start = self.at;
        self.pass(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'));
        let number = &self.text[start..self.at];
        let is_safe = number.len() < SAFE_DIGITS && !number.contains(['e', 'E']);
        if is_safe || number.parse().is_ok_and(f64::is_finite) { Ok(()) } else { Err(Flaw::Number) }
    }

    /// Passes a string, and returns it with its quotes.
    fn string(&mut self) -> Result<&'a str, Flaw> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        self.at += 1;
        while let Some(found) = bytes.get(self.at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
            self.at += found;
            if bytes[self.at] == b'"' {
                self.at += 1;
                return Ok(&self.text[start..self.at]);
            }
            self.at += match (unit(bytes, self.at), unit(bytes, self.at + 6)) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
                (Some(0xd800..=0xdfff), _) => return Err(Flaw::Surrogate),
                (Some(_), _) => 6,
                (None, _) => 2,
            };
        }
        self.at = bytes.len();
        Ok(&self.text[start..])
    }
}

/// Returns the UTF-16 unit of an escape `\uXXXX`.
fn unit(bytes: &[u8], at: usize) -> Option<u16> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Returns the text of a string without flaws.
pub(super) fn decode(string: &str) -> Cow<'_, str> {
    match string.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(text) if !text.contains('\\') => Cow::Borrowed(text),
        _ => Cow::Owned(serde_json::from_str(string).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flaw(text: &str) -> Option<Flaw> {
        check(serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))).err()
    }

    #[test]
    fn what_readers_fail_on_is_found_wherever_it_stands() {
        for (bad, expected) in [
            (r#""\ud800""#, Flaw::Surrogate),
            (r#""\ud800x\udc00""#, Flaw::Surrogate),
            (r#""\udc00\ud800""#, Flaw::Surrogate),
            (r#""\uD83D\uD83D\uDE00""#, Flaw::Surrogate),
            (r#""\\\ud800""#, Flaw::Surrogate),
            ("1e999", Flaw::Number),
            ("-1E+400", Flaw::Number),
        ] {
            assert_eq!(flaw(bad), Some(expected), "{bad}");
            assert_eq!(flaw(&format!(r#"{{"a":[1,{{"b" : {bad} }}]}}"#)), Some(expected), "{bad}");
            if bad.starts_with('"') {
                assert_eq!(flaw(&format!(r#"{{{bad}:1}}"#)), Some(expected), "as a name: {bad}");
            }
        }
        assert_eq!(flaw(&"9".repeat(400)), Some(Flaw::Number));
        assert_eq!(flaw(&format!("{}1{}", "[".repeat(65), "]".repeat(65))), Some(Flaw::Depth));
    }

    #[test]
    fn what_readers_can_take_passes() {
        for good in [
            r#""\ud83d\ude00 \\ud800 \u00e9 \"\ud83d\ude00""#,
            "1e308",
            "-0.0",
            "1e-999",
            "18446744073709551615",
            r#"{"a":[true,false,null,{},[],"[[[{{{\"[["],"b":{"c":-1.5e3}}"#,
            " [ 1 , 2 ] ",
        ] {
            assert_eq!(flaw(good), None, "{good}");
        }
        assert_eq!(flaw(&format!("{}1{}", "[".repeat(64), "]".repeat(64))), None);
        assert_eq!(flaw(&format!("0.{}", "1".repeat(5000))), None);
    }

    #[test]
    fn members_and_items_are_visited_in_turn() {
        let raw: &RawValue =
            serde_json::from_str(r#" { "a" : [1, [2] ,"x"], "\u0062":{"c":{}} , "d":null } "#).unwrap();
        let mut scan = Scan::new(raw);
        let mut seen = Vec::new();
        let is_object = scan.members::<Flaw>(|scan, name| {
            if name == "a" {
                let is_list = scan.items::<Flaw>(|scan| {
                    seen.push(scan.skip()?.to_owned());
                    Ok(())
                })?;
                assert!(is_list);
            } else {
                seen.push(format!("{name}={}", scan.skip()?));
            }
            Ok(())
        });
        assert_eq!(is_object, Ok(true));
        assert_eq!(seen, ["1", "[2]", r#""x""#, r#"b={"c":{}}"#, "d=null"]);
        assert_eq!(Scan::new(raw).items::<Flaw>(|_| Ok(())), Ok(false));
    }

    proptest! {
        #[test]
        fn a_value_is_passed_whole(text in r#"[\[\]{},:"a\\u0d8 1e.-]{0,40}"#) {
            if let Ok(raw) = serde_json::from_str::<&RawValue>(&text) {
                let mut scan = Scan::new(raw);
                match scan.skip() {
                    Ok(passed) => prop_assert_eq!(passed, raw.get()),
                    // serde_json refuses every text in which a flaw is found.
                    Err(_) => prop_assert!(serde_json::from_str::<serde_json::Value>(&text).is_err()),
                }
            }
        }
    }
}
