//! The user of the root filesystem whose rights a thread or a child process uses.

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use rustix::fs::{Gid, Uid};

use crate::os::{User, Users, with_errno};
use crate::sys::Credentials;
use crate::tools::agent_failed;

/// The word for the user that the image names.
const IMAGE: &str = "image";
/// The stack size of a thread with a user's rights, in bytes; it must suffice for walking trees.
const STACK: usize = 1 << 20;

/// A user to run something as.
#[derive(Debug)]
pub(crate) struct Identity {
    /// The login name, or the number if no database has it.
    pub(crate) name: String,
    /// The home directory.
    pub(crate) home: String,
    /// The login shell; empty for the default.
    pub(crate) shell: String,
    /// `None` means the agent's own user.
    pub(crate) credentials: Option<Credentials>,
}

impl Identity {
    /// Resolves a name, a number, `USER:GROUP` of both, or `image`; by default the agent's own user.
    pub(crate) fn resolve(
        wanted: Option<&str>,
        of_image: Option<&str>,
        users: &Users,
    ) -> Result<Self, ToolError> {
        let (own, own_group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let wanted = match wanted {
            Some(IMAGE) => of_image.filter(|user| !user.is_empty()),
            other => other,
        };
        let (user, group) = match wanted {
            None => (users.by_uid(own).unwrap_or_else(|| nameless(own)), None),
            Some(wanted) => named(wanted, users)?,
        };
        let gid = group.unwrap_or(if user.uid == own { own_group } else { user.gid });
        let credentials = if (user.uid, gid) == (own, own_group) {
            None
        } else if own == 0 {
            let groups = if group.is_some() { vec![gid] } else { users.groups_of(&user) };
            Some(Credentials { uid: user.uid, gid, groups })
        } else {
            let text = format!("cannot act as {}: this guest is not root", user.name);
            return Err(ToolError::new(ErrorCode::CommandFailed, text));
        };
        let User { name, home, shell, .. } = user;
        Ok(Self { name, home, shell, credentials })
    }

    /// Runs `work` with the rights of this user, on a separate thread if they differ from the agent's.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, ToolError> {
        let Some(credentials) = &self.credentials else { return Ok(work()) };
        let fail = |error: std::io::Error| {
            let failed = ToolError::new(ErrorCode::GuestFailed, format!("act as {}: {error}", self.name));
            with_errno(failed, &error)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("user".to_owned()).stack_size(STACK);
            let thread = thread.spawn_scoped(scope, move || {
                take(credentials)?;
                Ok(work())
            });
            match thread.map_err(fail)?.join() {
                Ok(done) => done.map_err(|error: rustix::io::Errno| fail(error.into())),
                Err(_) => Err(agent_failed("the tool failed; see the console")),
            }
        })
    }
}

/// Gives this thread, and what it starts, another user's rights for file access. The kernel removes all capabilities from a
/// thread whose effective user is no longer root. The real user stays the same: otherwise that user could send signals to this process.
fn take(to: &Credentials) -> Result<(), rustix::io::Errno> {
    let groups: Vec<Gid> = to.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(None::<Gid>, Gid::from_raw(to.gid), None::<Gid>)?;
    rustix::thread::set_thread_res_uid(None::<Uid>, Uid::from_raw(to.uid), None::<Uid>)
}

fn named(wanted: &str, users: &Users) -> Result<(User, Option<u32>), ToolError> {
    let unknown = |what: &str, name: &str| {
        let name: String = name.chars().take(80).collect();
        ToolError::new(ErrorCode::UserNotFound, format!("no {what} `{name}`"))
            .hint("see /etc/passwd and /etc/group, or give numbers")
    };
    let (name, group) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let user = match (users.by_name(name), number(name)) {
        (Some(user), _) => user,
        (None, Some(uid)) => users.by_uid(uid).unwrap_or_else(|| nameless(uid)),
        (None, None) => return Err(unknown("user", name)),
    };
    let gid = |group| users.gid_of(group).or_else(|| number(group)).ok_or_else(|| unknown("group", group));
    Ok((user, group.map(gid).transpose()?))
}

/// Parses the number of a user or a group. `root` is 0 also in images without a database of users.
fn number(text: &str) -> Option<u32> {
    if text == "root" {
        return Some(0);
    }
    // -1 means "do not change" to the kernel.
    text.parse().ok().filter(|number| *number != u32::MAX)
}

/// Returns a user without a database entry.
fn nameless(uid: u32) -> User {
    let (name, home) = if uid == 0 { ("root".to_owned(), "/root") } else { (uid.to_string(), "/") };
    User { name, uid, gid: uid, home: home.to_owned(), shell: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(wanted: &str, of_image: Option<&str>) -> Result<Option<Credentials>, ErrorCode> {
        let users = Users::of(
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:\n",
            "root:x:0:\nwww:x:33:\nadm:x:4:web\n",
        );
        let who = Identity::resolve(Some(wanted), of_image, &users);
        who.map(|who| who.credentials).map_err(|error| error.code)
    }

    #[test]
    fn users_and_groups_have_names_and_numbers() {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let is = |uid, gid, groups: &[u32]| Ok(Some(Credentials { uid, gid, groups: groups.to_vec() }));
        assert_eq!(who("web", None), is(33, 33, &[4, 33]));
        assert_eq!(who("33", None), is(33, 33, &[4, 33]));
        assert_eq!(who("54321", None), is(54321, 54321, &[54321]));
        assert_eq!(who("54321:7", None), is(54321, 7, &[7]));
        assert_eq!(who("web:adm", None), is(33, 4, &[4]));
        assert_eq!(who("0:7", None), is(0, 7, &[7]));
        assert_eq!(who("root", None), Ok(None));
        assert_eq!(who("image", Some("web:7")), is(33, 7, &[7]));
        for nobody in [None, Some("")] {
            assert_eq!(who("image", nobody), Ok(None));
        }
        for root in ["root", "root:root", "0:root"] {
            let who = Identity::resolve(Some(root), None, &Users::of("", "")).unwrap();
            assert_eq!((who.name.as_str(), who.credentials), ("root", None), "{root}");
        }
        for bad in ["no-such-user", "4294967295", "web:no-such-group", "web:", ":33", "-1", "1:2:3", ""] {
            assert_eq!(who(bad, None), Err(ErrorCode::UserNotFound), "{bad}");
        }
    }

    #[test]
    fn a_thread_has_the_rights_of_its_user_and_no_other_has() {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let users = Users::of("", "");
        let who = Identity::resolve(Some("54321:54322"), None, &users).unwrap();
        let own = || std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = |status: &str, name: &str| {
            status
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap()
                .split_whitespace()
                .skip(1)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let before = own();
        let theirs = who.run(own).unwrap();
        assert_eq!(line(&theirs, "Uid:"), "0 54321 0 54321");
        assert_eq!(line(&theirs, "Gid:"), "0 54322 0 54322");
        assert_eq!(line(&theirs, "Groups:"), "54322");
        assert_eq!(line(&theirs, "CapEff:"), "0000000000000000");
        assert_eq!(line(&own(), "Uid:"), line(&before, "Uid:"));
        assert!(who.run(|| std::fs::read("/etc/shadow")).unwrap().is_err());
    }
}
