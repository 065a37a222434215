//! Logins of the page. A browser gives its token once and goes on with a secret that only this process knows. Whoever takes the port after the daemon has
//! ended gets that secret from an open page, and it is good for nothing.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nexus_core::Caller;
use nexus_core::host::random_token;
use nexus_schema::access::Scope;

/// Where a browser logs in (POST) and out (DELETE).
pub(super) const PATH: &str = "/login";
/// What the secret of a login begins with.
const PREFIX: &str = "nexus-page_";
/// How long a login works that is not used.
const IDLE_MAX: Duration = Duration::from_hours(1);
/// How long a login works.
const LIFE: Duration = Duration::from_hours(12);
/// How many logins there may be: of one caller, whose oldest ends then, and of all, but for callers with the scope `admin`.
const LOGINS_MAX: (usize, usize) = (16, 4096);

struct Login {
    caller: Caller,
    begun: Instant,
    used: Instant,
}

impl Login {
    fn works(&self, now: Instant) -> bool {
        let is_idle = now.duration_since(self.used) >= IDLE_MAX;
        !is_idle && now.duration_since(self.begun) < LIFE && !self.caller.ended().is_cancelled()
    }
}

/// The logins of one daemon, by their secrets; none outlives it.
#[derive(Default)]
pub(super) struct Logins(Mutex<HashMap<String, Login>>);

/// Whether what a client gives as its token is the secret of a login.
pub(super) fn is_login(given: &str) -> bool {
    given.starts_with(PREFIX)
}

impl Logins {
    /// Logs a caller in; returns the secret. `None` if there are too many logins.
    pub(super) fn begin(&self, caller: &Caller) -> Option<String> {
        self.begin_at(caller, Instant::now())
    }

    fn begin_at(&self, caller: &Caller, now: Instant) -> Option<String> {
        let mut logins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logins.retain(|_, login| login.works(now));
        let own = logins.iter().filter(|(_, login)| login.caller.owner == caller.owner);
        let (count, oldest) =
            own.fold((0, None::<(&String, Instant)>), |(count, oldest), (secret, login)| {
                let is_older = oldest.is_none_or(|(_, used)| login.used < used);
                (count + 1, if is_older { Some((secret, login.used)) } else { oldest })
            });
        let oldest = oldest.filter(|_| count >= LOGINS_MAX.0).map(|(secret, _)| secret.clone());
        match oldest {
            Some(oldest) => drop(logins.remove(&oldest)),
            // Whoever may make everything is not kept out by the tokens that others make.
            None if logins.len() >= LOGINS_MAX.1 && !caller.has(Scope::Admin) => return None,
            None => {}
        }
        let secret = format!("{PREFIX}{}", random_token());
        logins.insert(secret.clone(), Login { caller: caller.clone(), begun: now, used: now });
        Some(secret)
    }

    /// The caller of a login, which is used by that.
    pub(super) fn caller(&self, secret: &str) -> Option<Caller> {
        self.caller_at(secret, Instant::now())
    }

    fn caller_at(&self, secret: &str, now: Instant) -> Option<Caller> {
        let mut logins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let login = logins.get_mut(secret).filter(|login| login.works(now))?;
        login.used = now;
        Some(login.caller.clone())
    }

    /// Logs out.
    pub(super) fn end(&self, secret: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(secret);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_ends_when_it_is_idle_and_at_its_time() {
        let (logins, begun) = (Logins::default(), Instant::now());
        let caller = Caller::owner("uid:7");
        let secret = logins.begin_at(&caller, begun).unwrap();
        assert!(is_login(&secret) && logins.caller_at("nexus-page_", begun).is_none());
        let minute = Duration::from_mins(1);
        let mut at = begun;
        while at + IDLE_MAX - minute < begun + LIFE {
            at += IDLE_MAX - minute;
            assert_eq!(logins.caller_at(&secret, at).unwrap().owner, caller.owner);
        }
        assert!(logins.caller_at(&secret, begun + LIFE).is_none(), "it is over, though it was used");
        let secret = logins.begin_at(&caller, begun).unwrap();
        assert!(logins.caller_at(&secret, begun + IDLE_MAX).is_none(), "it was idle");
        let secret = logins.begin_at(&caller, begun).unwrap();
        logins.end(&secret);
        assert!(logins.caller_at(&secret, begun).is_none(), "it was logged out");
    }

    #[test]
    fn the_oldest_login_of_a_caller_makes_room_and_no_other() {
        let (logins, begun) = (Logins::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let other = logins.begin_at(&Caller::owner("uid:8"), begun).unwrap();
        let caller = Caller::owner("uid:7");
        let secrets: Vec<String> = (0..)
            .take(LOGINS_MAX.0 + 1)
            .map(|number| logins.begin_at(&caller, at(number)).unwrap())
            .collect();
        let works = |secret: &String| logins.caller_at(secret, at(60)).is_some();
        assert!(works(&other) && !works(&secrets[0]) && secrets[1..].iter().all(works));
    }
}
