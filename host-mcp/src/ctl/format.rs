//! Formats sizes, times and durations for people.

use std::time::Duration;

use nexus_schema::Timestamp;

const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// A size, such as `418 B`, `1.5 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    // A value that would be shown as 1024 uses the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || (value.fract() * 10.0).round() % 10.0 == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A duration in its largest unit or two, such as `850 ms`, `2.3 s`, `4 min 5 s`, `3 d 2 h`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86400, "d", seconds % 86400 / 3600, "h"),
    }
}

fn two(large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    }
}

/// How long ago something was, in its largest unit, such as `5 min ago`.
pub(crate) fn ago(then: Timestamp, now: Timestamp) -> String {
    let seconds = (now.as_millis() - then.as_millis()) / 1000;
    match seconds {
        i64::MIN..-5 => "in the future".into(),
        -5..5 => "just now".into(),
        5..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86400),
    }
}

/// A duration given in milliseconds.
pub(crate) fn millis(millis: u64) -> String {
    duration(Duration::from_millis(millis))
}

/// A number with its noun, such as `1 VM`, `2 VMs`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Untrusted text on one line, without characters that could move a terminal's cursor or turn the direction of text.
pub(crate) fn tame(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || turns(c) { '\u{fffd}' } else { c }).collect()
}

/// The name of a file in a VM, as in `checkpoint diff`: what is not seen or changes what is beside it is written as `\xNN`, byte by byte, and a
/// backslash twice.
pub(crate) fn file_name(name: &str) -> String {
    let mut shown = String::with_capacity(name.len());
    for c in name.chars() {
        if c == '\\' {
            shown.push_str("\\\\");
        } else if c.is_control() || turns(c) || is_unseen(c) {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                shown.push_str(&format!("\\x{byte:02x}"));
            }
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Whether a character turns the direction of text, or ends a line.
fn turns(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether a character has no width of its own.
fn is_unseen(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1 MiB"),
            (512 << 20, "512 MiB"),
            (8 << 30, "8 GiB"),
            (8_674_869_248, "8.1 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn durations() {
        for (ms, text) in [
            (0, "0 ms"),
            (850, "850 ms"),
            (2345, "2.3 s"),
            (12_999, "12 s"),
            (245_000, "4 min 5 s"),
            (240_000, "4 min"),
            (3_720_000, "1 h 2 min"),
            (266_400_000, "3 d 2 h"),
        ] {
            assert_eq!(millis(ms), text);
        }
    }

    #[test]
    fn times_are_relative() {
        let now = Timestamp::from_millis(1_000_000_000);
        for (seconds, text) in [
            (0, "just now"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (7200, "2 h ago"),
            (200_000, "2 d ago"),
            (-60, "in the future"),
        ] {
            assert_eq!(ago(Timestamp::from_millis(1_000_000_000 - seconds * 1000), now), text);
        }
    }

    #[test]
    fn terminals_are_safe() {
        assert_eq!(tame("a\u{1b}[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(tame("a\u{202e}b\u{2066}grün"), "a\u{fffd}b\u{fffd}grün");
        assert_eq!(file_name("grün \u{202e}x\u{200b}"), "grün \\xe2\\x80\\xaex\\xe2\\x80\\x8b");
        assert_eq!(file_name("a\n\u{1b}[0m\\"), "a\\x0a\\x1b[0m\\\\");
        assert_eq!((count(1, "VM"), count(2, "VM")), ("1 VM".into(), "2 VMs".into()));
    }
}
