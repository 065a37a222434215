//! Scratch directories. Each belongs to the work that claims it; unclaimed ones may be deleted at any time.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The directory of scratch directories. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Scratch {
    directory: PathBuf,
    claimed: Arc<Mutex<HashSet<String>>>,
}

/// A claim on a scratch directory until it is dropped. The directory need not exist.
#[derive(Debug)]
pub(crate) struct Claim {
    of: Scratch,
    name: String,
}

impl Scratch {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, claimed: Arc::default() }
    }

    /// A directory for work with a unique id. Neither ids nor directory names are reused.
    pub(crate) fn claim(&self, id: impl ToString) -> Claim {
        let name = id.to_string();
        self.claimed().insert(name.clone());
        Claim { of: self.clone(), name }
    }

    /// Directories without a claim. They can never be claimed again: a name is claimed only once, before its directory is made.
    pub(crate) fn abandoned(&self) -> std::io::Result<Vec<PathBuf>> {
        // Listed before the claims are checked: an unclaimed directory that existed by then stays unclaimed.
        let there = fs_err::read_dir(&self.directory)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()?;
        let claimed = self.claimed();
        let is_free = |path: &PathBuf| {
            !path.file_name().and_then(|name| name.to_str()).is_some_and(|name| claimed.contains(name))
        };
        Ok(there.into_iter().filter(is_free).collect())
    }

    fn claimed(&self) -> MutexGuard<'_, HashSet<String>> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// The directory.
    pub(crate) fn path(&self) -> PathBuf {
        self.of.directory.join(&self.name)
    }

    /// Removes the directory with its contents.
    pub(crate) async fn clear(&self) {
        crate::os::remove::tree(Path::new(&self.path())).await;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.of.claimed().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_has_is_not_abandoned_from_before_it_is_made_until_it_is_given_back() {
        let place = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(place.path().to_owned());
        fs_err::create_dir(place.path().join("left")).unwrap();
        let left = vec![place.path().join("left")];
        assert_eq!(scratch.abandoned().unwrap(), left);
        let claim = scratch.claim("mine");
        assert_eq!(scratch.abandoned().unwrap(), left, "what is claimed need not be there");
        fs_err::create_dir(claim.path()).unwrap();
        assert_eq!(scratch.abandoned().unwrap(), left);
        drop(claim);
        let mut all = scratch.abandoned().unwrap();
        all.sort();
        assert_eq!(all, [place.path().join("left"), place.path().join("mine")]);
    }

    #[test]
    fn pruning_beside_work_that_begins_and_ends_never_takes_what_somebody_has() {
        let place = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(place.path().to_owned());
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let pruning = scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    for path in scratch.abandoned().unwrap() {
                        fs_err::remove_dir_all(path).ok();
                    }
                }
            });
            for number in 0..2000 {
                let claim = scratch.claim(number);
                fs_err::create_dir(claim.path()).unwrap();
                fs_err::write(claim.path().join("file"), "content").unwrap();
                assert!(claim.path().join("file").exists(), "{number} was taken away");
                // Every second one leaves something behind.
                if number % 2 == 0 {
                    fs_err::remove_dir_all(claim.path()).unwrap();
                }
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            pruning.join().unwrap();
        });
    }
}
