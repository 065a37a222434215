//! The warning in results about a VM that soon ends by itself.

use std::time::SystemTime;

use nexus_schema::{TimeSpan, Timestamp};

use crate::host::View;

/// How long before it ends a VM's results say so, in milliseconds.
const WARNED: i64 = 5 * 60 * 1000;

/// What to say of a VM whose time to live ends at `at`; `None` while that is far off.
pub(crate) fn of_life(at: Timestamp, vm: &str, view: View) -> Option<String> {
    of_life_at(at, vm, view, Timestamp::from(SystemTime::now()))
}

/// What to say of a VM that is stopped or suspended at `at` if it stays idle; `None` while that is far off.
pub(crate) fn of_idle(at: Timestamp, vm: &str, suspends: bool) -> Option<String> {
    let left = soon(at, Timestamp::from(SystemTime::now()))?;
    Some(match suspends {
        true => format!("{vm} is suspended in {left} unless something runs in it; the next call wakes it"),
        false => format!(
            "{vm} is stopped in {left} unless something runs in it: idle_stop of vm_update changes that"
        ),
    })
}

fn of_life_at(at: Timestamp, vm: &str, view: View, now: Timestamp) -> Option<String> {
    let left = soon(at, now)?;
    let what = match view {
        View::Whole(_) => format!(r#"vm_update {{"vm":"{vm}","ttl":"1h"}} extends it"#),
        View::Vm(_) | View::Own(_) => "ask whoever gave you this endpoint to extend it".to_owned(),
    };
    Some(format!("the time to live of {vm} ends in {left}: {what}"))
}

/// How much time is left, if that is little.
fn soon(at: Timestamp, now: Timestamp) -> Option<TimeSpan> {
    let left = at.as_millis().saturating_sub(now.as_millis());
    (left <= WARNED).then(|| TimeSpan::seconds(u64::try_from(left / 1000).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::Toolset;

    #[test]
    fn the_last_minutes_are_told_with_what_to_do() {
        let now = Timestamp::from_millis(1_000_000_000);
        let whole = View::Whole(Toolset::WORK);
        let at =
            |millis: i64| of_life_at(Timestamp::from_millis(1_000_000_000 + millis), "web-1", whole, now);
        assert_eq!(at(WARNED + 1), None);
        let said =
            r#"the time to live of web-1 ends in 4m10s: vm_update {"vm":"web-1","ttl":"1h"} extends it"#;
        assert_eq!(at(250_900).as_deref(), Some(said));
        assert!(at(-5).is_some_and(|said| said.contains("ends in 0s")));
        assert!(
            of_idle(Timestamp::from_millis(1), "web-1", false)
                .is_some_and(|said| said.contains("stopped in 0s"))
        );
        assert!(
            of_idle(Timestamp::from_millis(1), "web-1", true)
                .is_some_and(|said| said.contains("suspended in 0s"))
        );
    }
}
