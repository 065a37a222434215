//! Records of pax extended headers: `LENGTH KEY=VALUE\n`, where the value may contain anything.

use std::collections::BTreeMap;

/// Records by key; the last one of a key applies.
#[derive(Debug, Default)]
pub struct Records(BTreeMap<String, Vec<u8>>);

/// The key of our own record: the offset where the data of a file starts, if the receiver already has its beginning.
pub(crate) const FROM: &str = "NEXUS.from";
/// What the keys of extended attributes begin with.
pub(crate) const XATTR: &str = "SCHILY.xattr.";

impl Records {
    /// Adds the records of a header. An empty value removes the record.
    pub fn read(&mut self, mut bytes: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "a pax header is invalid";
        while !bytes.is_empty() && bytes[0] != 0 {
            let space = bytes.iter().take(20).position(|b| *b == b' ').ok_or(BAD)?;
            let length = decimal(&bytes[..space]).and_then(|l| usize::try_from(l).ok()).ok_or(BAD)?;
            let record = bytes.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(BAD)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or(BAD)?;
            let key = String::from_utf8_lossy(&record[..equals]).into_owned();
            let value = &record[equals + 1..];
            // An attribute's value may be empty.
            if value.is_empty() && !key.starts_with(XATTR) {
                self.0.remove(&key);
            } else {
                self.0.insert(key, value.to_vec());
            }
            bytes = &bytes[length..];
        }
        Ok(())
    }

    /// Returns how many bytes all keys and values have.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum()
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key).map(Vec::as_slice)
    }

    /// Returns the extended attributes among the records.
    pub fn xattrs(&self) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
        self.0.iter().filter_map(|(key, value)| {
            key.strip_prefix(XATTR).map(|name| (name.as_bytes().to_vec(), value.clone()))
        })
    }
}

/// Parses a decimal number.
pub fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

/// Parses a time in seconds with a fraction, `-?[0-9]+(.[0-9]*)?`, as whole seconds (rounded down) and nanoseconds.
pub fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?).filter(|_| !text.is_empty())?).ok()?;
    let mut fraction = parts.next().unwrap_or_default().to_vec();
    fraction.resize(9, b'0');
    let nanoseconds = u32::try_from(decimal(&fraction)?).ok()?;
    Some(match (negative, nanoseconds) {
        (false, ns) => (seconds, ns),
        (true, 0) => (-seconds, 0),
        (true, ns) => (-seconds - 1, 1_000_000_000 - ns),
    })
}

/// Adds a pax record, `LENGTH KEY=VALUE\n`, where LENGTH includes itself.
pub fn record(into: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut digits = 1;
    while (rest + digits).to_string().len() > digits {
        digits += 1;
    }
    into.extend_from_slice(format!("{} {key}=", rest + digits).as_bytes());
    into.extend_from_slice(value);
    into.push(b'\n');
}

/// Formats a time, in seconds since 1970 and nanoseconds, as [`time`] parses it.
pub fn time_text(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (seconds, 0) => seconds.to_string(),
        (seconds, ns) if seconds >= 0 => format!("{seconds}.{ns:09}"),
        // For negative times the fraction counts away from zero.
        (seconds, ns) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_anything() {
        let mut records = Records::default();
        records.read(b"30 SCHILY.xattr.user.a=b\n\n\0=c\n\n18 path=\xc3\xa4/\xff=a\n\n").unwrap_err();
        let mut record = b"SCHILY.xattr.user.a=b\n\0=c\n".to_vec();
        let mut bytes = format!("{} ", record.len() + 3).into_bytes();
        bytes.append(&mut record);
        records.read(&bytes).unwrap();
        assert_eq!(records.xattrs().collect::<Vec<_>>(), [(b"user.a".to_vec(), b"b\n\0=c".to_vec())]);
        for bad in ["5", "999999999999999999999999 a=b\n", "0 a=b\n", "3 a\n", "6 ab\n", "4 a=b\n", "x a=b\n"]
        {
            assert!(Records::default().read(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        for (text, is) in [
            ("0", Some((0, 0))),
            ("12.5", Some((12, 500_000_000))),
            ("1700000000.123456789123", Some((1_700_000_000, 123_456_789))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-3", Some((-3, 0))),
            ("7.", Some((7, 0))),
            ("", None),
            ("-", None),
            ("1e3", None),
            ("9223372036854775808", None),
        ] {
            assert_eq!(time(text.as_bytes()), is, "{text}");
        }
    }

    #[test]
    fn records_count_their_own_length() {
        for length in [0, 1, 86, 87, 88, 89, 90, 91, 980, 990, 991, 992, 993, 4095] {
            let value = vec![b'\n'; length];
            let mut bytes = Vec::new();
            record(&mut bytes, "path", &value);
            let mut records = Records::default();
            records.read(&bytes).unwrap();
            assert_eq!(records.get("path").unwrap_or_default(), value, "{length}");
        }
    }

    #[test]
    fn times_come_back() {
        for time in [(0, 0), (1, 5), (1_700_000_000, 999_999_999), (-1, 0), (-1, 1), (-7, 250_000_000)] {
            let text = time_text(time.0, time.1);
            assert_eq!(super::time(text.as_bytes()), Some(time), "{text}");
        }
    }
}
