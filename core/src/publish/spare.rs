//! A connection into the guest that is made before the next client of a published port needs it.
//!
//! Clients often make several connections in a row. So while they do, one into the guest is kept for the next of them, which then waits only for the
//! guest's answer. Nothing is kept for ports that no client uses.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::sleep;

use crate::guest::{Dialled, Era, connect};

/// When the connection is made after that of a client: first the guest serves this client.
const AFTER: Duration = Duration::from_millis(3);
/// How long it is kept. The guest waits longer for its opening.
const KEPT: Duration = Duration::from_secs(2);

/// The place of the connection.
#[derive(Debug, Default)]
pub(super) struct Spare(Mutex<Place>);

#[derive(Debug, Default)]
struct Place {
    ready: Option<(Era, Dialled)>,
    /// How many connections were made.
    made: u64,
    is_making: bool,
}

impl Spare {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the connection, if there is one of this era and it is not closed.
    pub(super) fn take(&self, now: &Era) -> Option<Dialled> {
        let (era, dialled) = self.place().ready.take()?;
        (era == *now && !dialled.is_gone()).then_some(dialled)
    }

    /// Has a connection made for the next client of the guest whose vsock socket is in `directory`, unless there is one.
    pub(super) fn want(self: &Arc<Self>, directory: PathBuf, now: Era) {
        let mut place = self.place();
        if place.ready.is_none() && !std::mem::replace(&mut place.is_making, true) {
            tokio::spawn(make(Arc::downgrade(self), directory, now));
        }
    }
}

/// Makes a connection, and closes it if no client needs it.
async fn make(spare: Weak<Spare>, directory: PathBuf, era: Era) {
    sleep(AFTER).await;
    // If it fails, the next client tries again and hears why.
    let ready = connect(&directory).await.ok().map(|dialled| (era, dialled));
    let made = {
        let Some(spare) = spare.upgrade() else { return };
        let mut place = spare.place();
        let made = place.made + 1;
        *place = Place { ready, made, is_making: false };
        made
    };
    sleep(KEPT).await;
    let Some(spare) = spare.upgrade() else { return };
    let mut place = spare.place();
    if place.made == made {
        place.ready = None;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::time::timeout;

    use super::*;
    use crate::os::paths::vm_files;

    const SOON: Duration = Duration::from_secs(20);

    /// Waits until there is a connection, and takes it.
    async fn taken(spare: &Arc<Spare>, directory: &std::path::Path) -> Dialled {
        let taking = async {
            loop {
                match spare.take(&Era::default()) {
                    Some(dialled) => return dialled,
                    None => spare.want(directory.to_owned(), Era::default()),
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, taking).await.expect("one is made")
    }

    #[tokio::test]
    async fn one_connection_is_made_when_wanted_and_a_closed_one_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(vm_files::VSOCK)).unwrap();
        let spare = Arc::new(Spare::default());
        let now = Era::default();
        assert!(spare.take(&now).is_none(), "nobody wanted one");
        let accepting = tokio::spawn(async move {
            let mut all = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 12];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 201\n");
                stream.write_all(b"OK 1\n").await.unwrap();
                all.push(stream);
            }
            all
        });
        let first = taken(&spare, directory.path()).await;
        assert!(spare.take(&now).is_none(), "there is one at most");
        let second = taken(&spare, directory.path()).await;
        assert!(!first.is_gone() && !second.is_gone());
        spare.place().ready = Some((now.clone(), second));
        drop(timeout(SOON, accepting).await.unwrap().unwrap());
        assert!(first.is_gone());
        assert!(spare.take(&now).is_none(), "the guest has closed it");
    }
}
