//! Lengths of time in whole seconds: `30m`, `2h`, `1h30m`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time. On the wire a text such as `30m` or `1h30m`; a bare number is seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TimeSpan(u64);

const UNITS: [(char, u64); 4] = [('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];
/// The longest one, in seconds: ten years.
const MAX: u64 = 3650 * 86_400;

/// A text that is not a length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a length of time: whole numbers with s, m, h or d, such as 30m or 1h30m, at most 3650d"
)]
pub struct ParseSpanError {
    /// What was given, shortened.
    pub text: String,
}

impl TimeSpan {
    /// A length of so many seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(seconds)
    }

    /// The length in seconds.
    pub const fn as_seconds(self) -> u64 {
        self.0
    }

    /// The length for timers.
    pub const fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }

    /// Whether it has no length: the way to say "never".
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl FromStr for TimeSpan {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Self, ParseSpanError> {
        let refuse = || ParseSpanError { text: text.chars().take(40).collect() };
        let (mut rest, mut total) = (text.trim(), 0_u64);
        if rest.is_empty() {
            return Err(refuse());
        }
        while !rest.is_empty() {
            let split = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (digits, after) = rest.split_at(split);
            let number: u64 = digits.parse().map_err(|_| refuse())?;
            let mut letters = after.trim_start().chars();
            let unit = match letters.next().map(|letter| letter.to_ascii_lowercase()) {
                // Only a number alone is seconds: in `1h30` the unit is missing.
                None if digits.len() == text.trim().len() => 1,
                None => return Err(refuse()),
                Some(letter) => UNITS.iter().find(|(unit, _)| *unit == letter).ok_or_else(refuse)?.1,
            };
            let part = number.checked_mul(unit).ok_or_else(refuse)?;
            total = total.checked_add(part).filter(|total| *total <= MAX).ok_or_else(refuse)?;
            rest = letters.as_str().trim_start();
        }
        Ok(Self(total))
    }
}

impl fmt::Display for TimeSpan {
    /// All units that are not zero, the largest first; it parses back to the same length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut rest, mut text) = (self.0, String::new());
        for (unit, seconds) in UNITS {
            if rest >= seconds {
                text.push_str(&format!("{}{unit}", rest / seconds));
                rest %= seconds;
            }
        }
        f.pad(if text.is_empty() { "0s" } else { &text })
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for TimeSpan {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "time-span".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[0-9]" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_form_round_trips(seconds in 0..=MAX) {
            prop_assert_eq!(TimeSpan(seconds).to_string().parse(), Ok(TimeSpan(seconds)));
        }
    }

    #[test]
    fn numbers_with_units_are_read() {
        for (text, seconds) in [
            ("0", 0),
            ("90", 90),
            ("30m", 1800),
            ("2h", 7200),
            ("1h30m", 5400),
            ("1 d 2h", 93_600),
            ("5S", 5),
        ] {
            assert_eq!(text.parse::<TimeSpan>().unwrap().as_seconds(), seconds, "{text}");
        }
        for text in ["", "m", "-1", "1.5h", "1x", "1h30", "3651d", "99999999999999999999", "h1"] {
            assert!(text.parse::<TimeSpan>().is_err(), "{text}");
        }
        assert_eq!(TimeSpan(5400).to_string(), "1h30m");
    }
}
