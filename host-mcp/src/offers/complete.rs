//! Completion of arguments of prompts and resource templates.

/// What can be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// Names of VMs.
    Vms,
    /// Ids of operations.
    Ops,
    /// Names of images.
    Images,
}

/// What an argument names; `None` if it cannot be completed. `resource` is a template's URI, otherwise it is an argument of a prompt.
pub(crate) fn subject(resource: Option<&str>, argument: &str) -> Option<Subject> {
    match (resource, argument) {
        (_, "vm") => Some(Subject::Vms),
        (Some(uri), "id") if uri.starts_with("nexus://op/") => Some(Subject::Ops),
        (None, "image") => Some(Subject::Images),
        _ => None,
    }
}

/// The names that begin with what was typed, then those that contain it; at most `max`, and how many there are in all.
pub(crate) fn matching(names: Vec<String>, typed: &str, max: usize) -> (Vec<String>, usize) {
    let (mut first, rest): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| name.starts_with(typed));
    first.extend(rest.into_iter().filter(|name| name.contains(typed)));
    let total = first.len();
    first.truncate(max);
    (first, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_come_first() {
        let names = || ["db-web", "web-1", "web-2", "other"].map(str::to_owned).to_vec();
        assert_eq!(matching(names(), "web", 2), (vec!["web-1".into(), "web-2".into()], 3));
        assert_eq!(matching(names(), "", 9).1, 4);
        assert_eq!(matching(names(), "x", 9), (vec![], 0));
    }

    #[test]
    fn arguments_are_known_where_they_are() {
        assert_eq!(subject(Some("nexus://vm/{vm}/console"), "vm"), Some(Subject::Vms));
        assert_eq!(subject(Some("nexus://op/{id}"), "id"), Some(Subject::Ops));
        assert_eq!(subject(Some("nexus://vm/{vm}/command/{id}"), "id"), None);
        assert_eq!(subject(None, "image"), Some(Subject::Images));
        assert_eq!(subject(None, "needs"), None);
    }
}
