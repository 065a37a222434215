//! Stops all commands at once and lets them go on, for checkpoints. The agent uses it, not the holder: the holder goes on, and so does PID 1.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nexus_schema::link::InitMode;

use super::cgroup::{OURS, ROOT};
use crate::os::read_small;

/// Timeout for all processes to stand still.
const FREEZE_MAX: Duration = Duration::from_secs(1);
/// The interval of checks whether they do.
const STEP: Duration = Duration::from_millis(2);
/// The cgroup in which the image's init itself is.
const INIT: &str = "init.scope";
/// How deep cgroups are looked for.
const DEPTH_MAX: usize = 16;

/// Stops all commands; beside the image's init also everything else but that init and this agent. Returns whether they stand still.
pub(crate) async fn freeze(init: InitMode) -> io::Result<bool> {
    // The first command may start while the others stand still.
    std::fs::create_dir_all(OURS)?;
    stop(groups(init)).await
}

/// Stops these cgroups, and returns whether they stand still. If one of them cannot be stopped, none is.
async fn stop(mut groups: Vec<PathBuf>) -> io::Result<bool> {
    let mut error = None;
    groups.retain(|group| match std::fs::write(group.join("cgroup.freeze"), "1") {
        Ok(()) => true,
        // It ended meanwhile.
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => false,
        Err(other) => {
            error = Some(other);
            false
        }
    });
    if let Some(error) = error {
        let became = match go_on(&groups) {
            Ok(()) => "what stood still goes on".to_owned(),
            Err(other) => format!("not all that stood still goes on: {other}"),
        };
        return Err(io::Error::new(error.kind(), format!("{error}; {became}")));
    }
    let deadline = Instant::now() + FREEZE_MAX;
    loop {
        if groups.iter().all(|group| is_frozen(group)) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Lets everything go on that [`freeze`] stopped. Commands that are being killed stay as they are.
pub(crate) fn thaw(init: InitMode) -> io::Result<()> {
    go_on(&groups(init))
}

fn go_on(groups: &[PathBuf]) -> io::Result<()> {
    let mut result = Ok(());
    for group in going_on(groups) {
        match std::fs::write(group.join("cgroup.freeze"), "0") {
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            written => result = result.and(written),
        }
    }
    result
}

/// The order in which groups go on: the reverse of that in which they are stopped.
fn going_on(groups: &[PathBuf]) -> impl Iterator<Item = &PathBuf> {
    groups.iter().rev()
}

/// Returns whether commands were told to stand still, also by an agent that was killed before it had told all of them.
pub(crate) fn is_quiet() -> bool {
    read_small(Path::new(OURS).join("cgroup.freeze"), 16).is_some_and(|told| told.trim() == "1")
}

/// Returns the cgroups that are frozen as a whole, in the order in which they are stopped.
fn groups(init: InitMode) -> Vec<PathBuf> {
    match init {
        InitMode::Agent => vec![PathBuf::from(OURS)],
        InitMode::System => {
            let own = read_small("/proc/self/cgroup", 4 << 10).unwrap_or_default();
            let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default().to_owned();
            in_order(all_but(Path::new(ROOT), Path::new(&own), 0), Path::new(OURS))
        }
    }
}

/// Puts the cgroup of commands first: as long as anything stands still, it does, so that the agent after one that was killed meanwhile knows it.
fn in_order(mut groups: Vec<PathBuf>, ours: &Path) -> Vec<PathBuf> {
    groups.sort_by_key(|group| group != ours);
    groups
}

/// Returns the largest cgroups below `root` that hold neither `own`, a path relative to it, nor the image's init.
fn all_but(root: &Path, own: &Path, depth: usize) -> Vec<PathBuf> {
    let mut own = own.components();
    let next = own.next().map(|part| part.as_os_str().to_owned());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || (depth == 0 && entry.file_name() == INIT) {
            continue;
        }
        if Some(entry.file_name()) != next {
            found.push(entry.path());
        } else if depth < DEPTH_MAX && own.clone().next().is_some() {
            found.extend(all_but(&entry.path(), own.as_path(), depth + 1));
        }
    }
    found
}

fn is_frozen(group: &Path) -> bool {
    match read_small(group.join("cgroup.events"), 4 << 10) {
        Some(events) => events.lines().any(|line| line == "frozen 1"),
        // It has ended.
        None => !group.exists(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_the_agent_or_init_is_not_frozen() {
        let root = tempfile::tempdir().unwrap();
        for group in [
            "init.scope",
            "nexus/a",
            "system.slice/agent.service/x",
            "system.slice/ssh.service",
            "user.slice/u",
        ] {
            std::fs::create_dir_all(root.path().join(group)).unwrap();
        }
        std::fs::write(root.path().join("cgroup.events"), "").unwrap();
        let mut found = all_but(root.path(), Path::new("system.slice/agent.service"), 0);
        found.sort_unstable();
        assert_eq!(
            found,
            ["nexus", "system.slice/ssh.service", "user.slice"].map(|name| root.path().join(name))
        );
    }

    /// The agent may be killed after each of its steps.
    #[test]
    fn commands_stand_still_as_long_as_anything_does() {
        let ours = PathBuf::from(OURS);
        let found = ["init", "system.slice", "nexus", "user.slice"].map(|name| Path::new(ROOT).join(name));
        let order = in_order(found.to_vec(), &ours);
        assert_eq!(order.len(), found.len());
        for steps in 1..=order.len() {
            assert!(order[..steps].contains(&ours), "stopped so far: {:?}", &order[..steps]);
            let mut left: Vec<_> = going_on(&order).skip(order.len() - steps).collect();
            assert!(left.contains(&&ours), "still stopped: {left:?}");
            left.retain(|group| **group != ours);
            assert_eq!(left.len(), steps - 1);
        }
    }

    #[tokio::test]
    async fn if_one_group_cannot_be_stopped_the_others_go_on() {
        let root = tempfile::tempdir().unwrap();
        let [first, odd, last] = ["a", "b", "c"].map(|name| root.path().join(name));
        for group in [&first, &odd, &last] {
            std::fs::create_dir(group).unwrap();
            std::fs::write(group.join("cgroup.events"), "frozen 1\n").unwrap();
        }
        let told = |group: &Path| std::fs::read_to_string(group.join("cgroup.freeze")).unwrap();
        assert!(stop(vec![first.clone(), last.clone()]).await.unwrap());
        assert_eq!((told(&first), told(&last)), ("1".to_owned(), "1".to_owned()));
        // It cannot be written to.
        std::fs::create_dir(odd.join("cgroup.freeze")).unwrap();
        let error = stop(vec![first.clone(), odd, last.clone()]).await.unwrap_err();
        assert!(error.to_string().contains("what stood still goes on"), "{error}");
        assert_eq!((told(&first), told(&last)), ("0".to_owned(), "0".to_owned()));
    }

    #[test]
    fn a_group_stands_still_when_the_kernel_says_so() {
        let group = tempfile::tempdir().unwrap();
        for (events, expected) in [("populated 1\nfrozen 0\n", false), ("populated 1\nfrozen 1\n", true)] {
            std::fs::write(group.path().join("cgroup.events"), events).unwrap();
            assert_eq!(is_frozen(group.path()), expected, "{events}");
        }
        assert!(is_frozen(&group.path().join("gone")));
    }
}
