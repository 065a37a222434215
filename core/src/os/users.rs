//! Users and groups of this host.

use std::io;

use nix::unistd::{Group, User};

/// The number of a user, by name or number; `None` if the host knows no such user. A number need not be known.
pub fn uid(name: &str) -> io::Result<Option<u32>> {
    match name.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Ok(User::from_name(name)?.map(|user| user.uid.as_raw())),
    }
}

/// The number of a group, by name or number; `None` if the host knows no such group. A number need not be known.
pub fn gid(name: &str) -> io::Result<Option<u32>> {
    match name.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Ok(Group::from_name(name)?.map(|group| group.gid.as_raw())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_have_names_and_numbers() {
        assert_eq!((uid("root").unwrap(), gid("root").unwrap()), (Some(0), Some(0)));
        assert_eq!((uid("4711").unwrap(), gid("4712").unwrap()), (Some(4711), Some(4712)));
        assert_eq!((uid("no such user").unwrap(), gid("no such group").unwrap()), (None, None));
    }
}
