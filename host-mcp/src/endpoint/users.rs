//! Other users of this host on the Unix socket. The socket's group decides who may connect, and a token's rights are what each may do.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use nexus_core::Caller;
use nexus_core::host::shares::{Share, Shares};
use nexus_core::host::{socket, users};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What stands for all users that are not named.
const OTHERS: &str = "*";

/// Which users other than the daemon's own may use the Unix socket, and with the rights of which token.
#[derive(Debug, Clone, Default)]
pub struct SocketUsers {
    group: Option<u32>,
    tokens: HashMap<u32, Arc<str>>,
    others: Option<Arc<str>>,
}

/// The peer of a connection to the Unix socket.
#[derive(Debug)]
pub(super) enum User {
    /// The daemon's user, or root: it may do everything.
    Owner(Caller),
    /// Another one, with the name of its token if it has one.
    Other { uid: u32, token: Option<Arc<str>> },
}

impl SocketUsers {
    /// Looks up the group that may connect and the users with their tokens' names, as the configuration names them.
    ///
    /// # Errors
    /// A group or user that does not exist, or users without a group.
    pub fn resolve(group: Option<&str>, named: &[(String, String)]) -> Result<Self, String> {
        let known = |what: &str, name: &str, found: io::Result<Option<u32>>| match found {
            Ok(Some(number)) => Ok(number),
            Ok(None) => Err(format!("this host has no {what} `{name}`")),
            Err(error) => Err(format!("look up the {what} `{name}`: {error}")),
        };
        let group = group.map(|name| known("group", name, users::gid(name))).transpose()?;
        if group.is_none() && !named.is_empty() {
            return Err("socket_users needs socket_group: the group that may connect".to_owned());
        }
        let mut this = Self { group, ..Self::default() };
        for (name, token) in named {
            let token = Arc::from(&**token);
            if name == OTHERS {
                this.others = Some(token);
            } else {
                this.tokens.insert(known("user", name, users::uid(name))?, token);
            }
        }
        Ok(this)
    }

    /// Opens the socket to the group, and its directory so far that members reach the socket.
    pub(super) fn open(&self, directory: &Path, name: &str) -> io::Result<()> {
        self.group.map_or(Ok(()), |group| socket::share_with_group(directory, name, group))
    }

    /// Who a peer with this uid is.
    pub(super) fn peer(&self, uid: u32) -> User {
        if uid == 0 || uid == rustix::process::geteuid().as_raw() {
            return User::Owner(Caller::owner(format!("uid:{uid}")));
        }
        User::Other { uid, token: self.tokens.get(&uid).or(self.others.as_ref()).cloned() }
    }
}

/// How many connections one user may have, who is not the daemon's.
const CONNECTIONS_OF_ONE: usize = 64;
/// How many all of them may have: half of what the socket has room for.
const CONNECTIONS_OF_ALL: usize = 512;

/// The connections of users other than the daemon's own.
#[derive(Debug)]
pub(super) struct Others {
    each: Shares<u32>,
    all: Arc<Semaphore>,
}

impl Default for Others {
    fn default() -> Self {
        Self { each: Shares::new(CONNECTIONS_OF_ONE), all: Arc::new(Semaphore::new(CONNECTIONS_OF_ALL)) }
    }
}

impl Others {
    /// A place for a connection of a user; `None` if it has too many.
    pub(super) fn take(&self, uid: u32) -> Option<(Share<u32>, OwnedSemaphorePermit)> {
        let share = self.each.take(&uid)?;
        Some((share, Arc::clone(&self.all).try_acquire_owned().ok()?))
    }
}

/// What a user is told that has no token.
pub(super) fn refusal(uid: u32, token: Option<&str>) -> String {
    match token {
        None => format!(
            "user {uid} has no rights here; the daemon's user can add \"{uid}=TOKEN\" to socket_users in nexus.toml\n"
        ),
        Some(token) => format!(
            "user {uid} has the rights of the token {token}, which does not exist, was revoked or has expired; the daemon's user can make it: nexusctl token create {token}\n"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_the_rights_of_tokens() {
        let pair = |user: &str, token: &str| (user.to_owned(), token.to_owned());
        let users = SocketUsers::resolve(Some("0"), &[pair("4711", "team"), pair("*", "readers")]).unwrap();
        let token = |users: &SocketUsers, uid| match users.peer(uid) {
            User::Owner(_) => Some("all".to_owned()),
            User::Other { token, .. } => token.map(|token| token.to_string()),
        };
        assert_eq!(token(&users, 0).as_deref(), Some("all"));
        assert_eq!(token(&users, rustix::process::geteuid().as_raw()).as_deref(), Some("all"));
        assert_eq!(token(&users, 4711).as_deref(), Some("team"));
        assert_eq!(token(&users, 4712).as_deref(), Some("readers"));
        let nobody_else = SocketUsers::resolve(Some("0"), &[pair("4711", "team")]).unwrap();
        assert_eq!(token(&nobody_else, 4712), None);

        // One user cannot take what others or the daemon's user need.
        let others = Others::default();
        let taken: Vec<_> = std::iter::from_fn(|| others.take(1)).collect();
        assert_eq!(taken.len(), CONNECTIONS_OF_ONE);
        assert!(others.take(2).is_some());
        let all: Vec<_> = (10..100).filter_map(|uid| others.take(uid)).collect();
        assert_eq!(all.len(), 90);
        drop(taken);
        assert!(others.take(1).is_some());

        let wrong = |group, user| SocketUsers::resolve(group, &[pair(user, "team")]).unwrap_err();
        assert!(wrong(Some("0"), "no such user").contains("no user `no such user`"));
        assert!(wrong(Some("no such group"), "0").contains("no group `no such group`"));
        assert!(wrong(None, "0").contains("socket_group"));
    }
}
