//! Times on a command line: a point in time, or a length of time from now, such as `1h`.

use std::str::FromStr;

use nexus_schema::{TimeSpan, Timestamp};

/// The number of milliseconds in a second.
const MILLIS: i64 = 1000;

/// A point in time, given itself or by its distance from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A time, such as `2026-01-02T15:00:00Z`.
    At(Timestamp),
    /// A length of time, such as `1h`, `10m` or `2d`.
    Away(TimeSpan),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(span) = text.parse() {
            return Ok(Self::Away(span));
        }
        text.parse().map(Self::At).map_err(|_| {
            format!("`{text}` is neither a length of time such as 1h or 2d, nor a time such as 2026-01-02T15:00:00Z")
        })
    }
}

impl Moment {
    /// The time, where a length of time means that long ago.
    pub(crate) fn past(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(time) => time,
            Self::Away(span) => Timestamp::from_millis(now.as_millis().saturating_sub(millis(span))),
        }
    }

    /// How many seconds from now it is; `None` unless it is in the future.
    pub(crate) fn seconds_ahead(self, now: Timestamp) -> Option<u64> {
        let seconds = match self {
            Self::Away(span) => span.as_seconds(),
            Self::At(time) => {
                u64::try_from(time.as_millis().saturating_sub(now.as_millis()) / MILLIS).unwrap_or(0)
            }
        };
        (seconds > 0).then_some(seconds)
    }
}

fn millis(span: TimeSpan) -> i64 {
    i64::try_from(span.as_seconds()).unwrap_or(i64::MAX).saturating_mul(MILLIS)
}

/// Parses a length of time that says its unit; 0 needs none. Whoever writes `--ttl 5` seldom means seconds.
pub(crate) fn span(text: &str) -> Result<TimeSpan, String> {
    let span: TimeSpan = text.parse().map_err(|e| format!("{e}"))?;
    let number = text.trim();
    match number.bytes().all(|byte| byte.is_ascii_digit()) && !span.is_zero() {
        true => Err(format!("`{number}` has no unit: {number}s, {number}m, {number}h or {number}d")),
        false => Ok(span),
    }
}

/// Parses a length of time; returns its seconds.
pub(crate) fn seconds(text: &str) -> Result<u32, String> {
    let span: TimeSpan = text.parse().map_err(|e| format!("{e}"))?;
    u32::try_from(span.as_seconds()).map_err(|_| format!("`{text}` is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-02T15:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    #[test]
    fn a_time_is_given_itself_or_by_its_distance() {
        for (text, past) in [
            ("1h", "2026-01-02T14:00:00Z"),
            ("10m", "2026-01-02T14:50:00Z"),
            ("2d", "2025-12-31T15:00:00Z"),
            ("1h30m", "2026-01-02T13:30:00Z"),
            ("90", "2026-01-02T14:58:30Z"),
            ("0", NOW),
            ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            ("2026-01-01T01:00:00+01:00", "2026-01-01T00:00:00Z"),
        ] {
            let moment: Moment = text.parse().unwrap();
            assert_eq!(moment.past(now()), past.parse().unwrap(), "{text}");
        }
        for text in ["", "yesterday", "-1h", "1.5h", "1w", "2026-01-02", "15:00", "99999999999999999999d"] {
            let refused = text.parse::<Moment>().unwrap_err();
            assert!(refused.contains("such as 1h") && refused.contains("15:00:00Z"), "{refused}");
        }
    }

    #[test]
    fn an_end_is_in_the_future() {
        for (text, seconds) in [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("12h", Some(43_200)),
            ("7d", Some(604_800)),
            ("2026-01-02T15:01:00Z", Some(60)),
            ("0", None),
            (NOW, None),
            ("2026-01-02T14:00:00Z", None),
        ] {
            assert_eq!(text.parse::<Moment>().unwrap().seconds_ahead(now()), seconds, "{text}");
        }
    }

    #[test]
    fn lifetimes_have_units() {
        assert_eq!(
            ["5m", "90s", "0", "1h30m"].map(|text| span(text).unwrap().as_seconds()),
            [300, 90, 0, 5400]
        );
        assert_eq!(span("5").unwrap_err(), "`5` has no unit: 5s, 5m, 5h or 5d");
        assert!(span("soon").unwrap_err().contains("not a length of time"));
    }

    #[test]
    fn limits_have_units_or_are_seconds() {
        assert_eq!([seconds("30"), seconds("5m"), seconds("0")], [Ok(30), Ok(300), Ok(0)]);
        for text in ["", "-1", "web-1", "1.5"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
