//! The warning in results about a VM whose life ends soon.

use std::time::SystemTime;

use nexus_schema::{TimeSpan, Timestamp};

/// How long before its end a VM's results say so, in milliseconds.
const WARNED: i64 = 5 * 60 * 1000;

/// What to say of a VM whose life ends at `at`; `None` while that is far off.
pub(crate) fn note(at: Timestamp, vm: &str) -> Option<String> {
    note_at(at, vm, Timestamp::from(SystemTime::now()))
}

fn note_at(at: Timestamp, vm: &str, now: Timestamp) -> Option<String> {
    let left = at.as_millis().saturating_sub(now.as_millis());
    let seconds = u64::try_from(left / 1000).unwrap_or(0);
    (left <= WARNED).then(|| {
        let left = TimeSpan::seconds(seconds);
        format!(r#"{vm} is deleted in {left}: vm_update {{"vm":"{vm}","ttl":"1h"}} keeps it longer"#)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_minutes_are_told_with_what_to_do() {
        let now = Timestamp::from_millis(1_000_000_000);
        let at = |millis: i64| note_at(Timestamp::from_millis(1_000_000_000 + millis), "web-1", now);
        assert_eq!(at(WARNED + 1), None);
        let said = r#"web-1 is deleted in 4m10s: vm_update {"vm":"web-1","ttl":"1h"} keeps it longer"#;
        assert_eq!(at(250_900).as_deref(), Some(said));
        assert!(at(-5).is_some_and(|said| said.starts_with("web-1 is deleted in 0s")));
    }
}
