//! Tasks of commands whose VMs cannot be asked: paused, or silent. They are `working` for a while, and then have failed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rmcp::model::{JsonObject, TaskPayload};

use super::Id;

/// For how long a command's VM may be asked in vain until its task has failed.
const SILENT_MAX: Duration = Duration::from_mins(15);
/// How many commands are known whose VMs cannot be asked.
const SILENCES_MAX: usize = 1024;

/// Commands whose VMs cannot be asked about them: since when, and whether their tasks have failed for that. A task that has failed stays so, and its
/// command is still the tools'.
#[derive(Debug, Default)]
pub(crate) struct Silences(Mutex<HashMap<Id, Silence>>);

#[derive(Debug, Clone, Copy)]
struct Silence {
    since: Instant,
    is_given_up: bool,
}

impl Silences {
    /// Notes that a VM could not be asked; whether that has been so for too long.
    pub(super) fn lasts(&self, id: Id, now: Instant) -> bool {
        let mut silences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if silences.len() >= SILENCES_MAX && !silences.contains_key(&id) {
            let oldest = silences.iter().min_by_key(|(_, silence)| silence.since).map(|(id, _)| *id);
            if let Some(oldest) = oldest {
                silences.remove(&oldest);
            }
        }
        let silence = silences.entry(id).or_insert(Silence { since: now, is_given_up: false });
        silence.is_given_up |= now.duration_since(silence.since) >= SILENT_MAX;
        silence.is_given_up
    }

    /// Notes that a VM has answered; whether the task had failed before.
    pub(super) fn ends(&self, id: Id) -> bool {
        let mut silences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if silences.get(&id).is_some_and(|silence| silence.is_given_up) {
            return true;
        }
        silences.remove(&id);
        false
    }
}

/// A task that has failed because its VM cannot be asked.
pub(super) fn given_up(why: &str) -> (TaskPayload, Option<String>) {
    let message = format!(
        "{why}; after {} min the task has failed, but the command may go on: guest_command_output tells once its VM answers",
        SILENT_MAX.as_secs() / 60
    );
    let mut error = JsonObject::new();
    error.insert("code".into(), rmcp::model::ErrorCode::INTERNAL_ERROR.0.into());
    error.insert("message".into(), message.clone().into());
    (TaskPayload::Failed { error }, Some(message))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The id of a command's task.
    fn id(vm: &str, started: usize) -> Id {
        format!("bbbbbbbbbbbbe.{vm}.{started}").parse().unwrap()
    }

    #[test]
    fn a_task_whose_vm_cannot_be_asked_for_long_has_failed_for_good() {
        let (silences, begun) = (Silences::default(), Instant::now());
        let [first, second] = [1, 2].map(|at| id("bbbbbbbbbbbbi", at));
        assert!(!silences.lasts(first, begun));
        assert!(!silences.lasts(first, begun + SILENT_MAX / 2));
        assert!(!silences.ends(first), "it answered in time");
        assert!(!silences.lasts(first, begun + SILENT_MAX), "anew");
        assert!(!silences.lasts(second, begun + SILENT_MAX));
        assert!(silences.lasts(first, begun + SILENT_MAX * 2));
        assert!(silences.ends(first) && silences.lasts(first, begun + SILENT_MAX * 2), "it stays failed");
        assert!(!silences.ends(second));
        let (payload, message) = given_up("web-1 is paused");
        let TaskPayload::Failed { error } = payload else { panic!("{payload:?}") };
        assert_eq!((&error["code"], error["message"].as_str()), (&json!(-32603), message.as_deref()));
        // Others do not take more memory than so many.
        for at in 0..=SILENCES_MAX {
            silences.lasts(id("bbbbbbbbbbbbe", at), begun + SILENT_MAX * 3);
        }
        assert_eq!(silences.0.lock().unwrap().len(), SILENCES_MAX);
    }
}
