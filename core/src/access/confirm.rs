//! Confirmations: a call that cannot be undone answers with a plan and a token first, and is done when the token comes back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::access::Scope;
use nexus_schema::error::Confirm;
use nexus_schema::id::VmId;
use nexus_schema::{ErrorCode, ToolError};

use super::Caller;
use crate::os::random;

/// How long a confirmation is valid.
const LIFE: Duration = Duration::from_secs(300);
/// How many confirmations may be pending: of one owner, and of all tokens together, which cannot take the place of the daemon's user.
const PENDING_MAX: (usize, usize) = (64, 1024);

/// What a call would do that cannot be undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deed {
    /// The tool.
    pub(crate) tool: &'static str,
    /// What it would do, a sentence each; exactly this is confirmed. It names things by their ids where a name can change hands.
    pub(crate) plan: Vec<String>,
}

#[derive(Debug)]
struct Pending {
    owner: Arc<str>,
    scope: Option<VmId>,
    /// Whether a token asked.
    of_token: bool,
    deed: Deed,
    until: Instant,
}

/// The pending confirmations of one daemon; a restart forgets them.
#[derive(Debug, Default)]
pub(crate) struct Confirmations(Mutex<HashMap<String, Pending>>);

impl Confirmations {
    /// Succeeds if a deed needs no confirmation from this caller, or if `given` confirms exactly this one. Then `given` is used up.
    ///
    /// # Errors
    /// `confirmation_required`, with the plan and a token for it.
    pub(crate) fn require(&self, caller: &Caller, deed: Deed, given: Option<&str>) -> Result<(), ToolError> {
        if deed.plan.is_empty() || caller.has(Scope::WaiveConfirmation) {
            return Ok(());
        }
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        pending.retain(|_, known| known.until > now);
        let why = match given {
            None => None,
            Some(token) => match pending.get(token) {
                Some(known) if *known.owner != *caller.owner || known.scope != caller.scope => Some(UNKNOWN),
                Some(known) if known.deed != deed => Some("that confirmation is for another plan"),
                Some(_) => {
                    pending.remove(token);
                    return Ok(());
                }
                None => Some(UNKNOWN),
            },
        };
        let own = pending.values().filter(|known| known.owner == caller.owner).count();
        let of_token = caller.grant().is_some();
        let is_full = || pending.values().filter(|known| known.of_token).count() >= PENDING_MAX.1;
        if own >= PENDING_MAX.0 || (of_token && is_full()) {
            return Err(ToolError::new(ErrorCode::Busy, "too many confirmations are pending")
                .hint(format!("use them, or wait until they expire: {} minutes", LIFE.as_secs() / 60)));
        }
        let token = random::token();
        let error = required(&deed, why, &token);
        let (owner, scope, until) = (Arc::clone(&caller.owner), caller.scope, now + LIFE);
        pending.insert(token, Pending { owner, scope, of_token, deed, until });
        Err(error)
    }
}

/// What is said of a confirmation that does not exist, whether it never did, was used, is too old or is somebody else's.
const UNKNOWN: &str = "that confirmation is unknown, used or expired";

fn required(deed: &Deed, why: Option<&str>, token: &str) -> ToolError {
    let plan = deed.plan.join("; ");
    let message = match why {
        Some(why) => format!("{why}; this would {plan}"),
        None => format!("this would {plan}"),
    };
    let hint = format!(
        "if the user wants that, call {} again with the same arguments and \"confirm\":\"{token}\" (valid once, for {} minutes)",
        deed.tool,
        LIFE.as_secs() / 60
    );
    let mut error = ToolError::new(ErrorCode::ConfirmationRequired, message).hint(hint);
    let expires_in_s = u32::try_from(LIFE.as_secs()).unwrap_or(u32::MAX);
    error.confirm = Some(Box::new(Confirm { token: token.into(), plan: deed.plan.clone(), expires_in_s }));
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Tokens, Wanted};

    fn deed(what: &str) -> Deed {
        Deed { tool: "vm_delete", plan: vec![what.to_owned()] }
    }

    fn ask(pending: &Confirmations, who: &str, what: &str, given: Option<&str>) -> Result<(), ToolError> {
        pending.require(&Caller::owner(who), deed(what), given)
    }

    fn token(error: ToolError) -> String {
        assert_eq!(error.code, ErrorCode::ConfirmationRequired);
        error.confirm.unwrap().token
    }

    #[test]
    fn a_confirmation_is_good_once_for_its_plan_and_its_caller() {
        let pending = Confirmations::default();
        let given = token(ask(&pending, "uid:0", "delete a", None).unwrap_err());
        let foreign = ask(&pending, "uid:1", "delete a", Some(&given)).unwrap_err();
        assert!(foreign.message.contains("unknown, used or expired"), "{foreign}");
        let other = ask(&pending, "uid:0", "delete a and b", Some(&given)).unwrap_err();
        assert!(other.message.contains("another plan") && !other.to_string().contains(&given), "{other}");
        ask(&pending, "uid:0", "delete a", Some(&given)).unwrap();
        let replayed = ask(&pending, "uid:0", "delete a", Some(&given)).unwrap_err();
        assert!(replayed.message.contains("unknown, used or expired"), "{replayed}");
        assert!(ask(&pending, "uid:0", "delete a", Some("")).is_err());
        pending.require(&Caller::owner("uid:0"), Deed { tool: "vm_delete", plan: Vec::new() }, None).unwrap();
    }

    #[test]
    fn confirmations_expire_and_are_limited() {
        let pending = Confirmations::default();
        let given = token(ask(&pending, "uid:0", "delete a", None).unwrap_err());
        for known in pending.0.lock().unwrap().values_mut() {
            known.until = Instant::now();
        }
        let expired = ask(&pending, "uid:0", "delete a", Some(&given)).unwrap_err();
        assert!(expired.message.contains("unknown, used or expired"), "{expired}");
        for _ in 1..PENDING_MAX.0 {
            token(ask(&pending, "uid:0", "delete a", None).unwrap_err());
        }
        assert_eq!(ask(&pending, "uid:0", "delete a", None).unwrap_err().code, ErrorCode::Busy);
        token(ask(&pending, "uid:1", "delete a", None).unwrap_err());
    }

    #[test]
    fn tokens_do_not_take_the_place_of_the_daemons_user() {
        let (pending, tokens) = (Confirmations::default(), Tokens::default());
        for asked in 0..=PENDING_MAX.1 / PENDING_MAX.0 {
            let (record, secret) = tokens.draft(&Caller::owner("uid:0"), Wanted::default()).unwrap();
            tokens.add(record);
            let holder = tokens.authenticate(&secret).unwrap();
            let refused = || pending.require(&holder, deed("delete a"), None).unwrap_err();
            if asked == PENDING_MAX.1 / PENDING_MAX.0 {
                assert_eq!(refused().code, ErrorCode::Busy);
                break;
            }
            (0..PENDING_MAX.0).for_each(|_| drop(token(refused())));
        }
        token(ask(&pending, "uid:0", "delete a", None).unwrap_err());
    }
}
