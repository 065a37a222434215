//! Ensures that each thing is made only once at a time. Others who want it wait, and see the progress of its maker.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use nexus_schema::tools::op::OpProgress;
use tokio::sync::{OwnedMutexGuard, watch};

use crate::progress::{Cancelled, Progress};

/// Shown until the maker's progress is known.
const WAITING: &str = "waiting for the same download";

/// Everything that is being made, by name. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct InFlight(Arc<Mutex<HashMap<String, Arc<Thing>>>>);

#[derive(Debug)]
struct Thing {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The progress of the current maker.
    maker: watch::Sender<Option<watch::Receiver<OpProgress>>>,
}

impl Default for Thing {
    fn default() -> Self {
        Self { turn: Arc::default(), maker: watch::Sender::new(None) }
    }
}

/// The right to make a thing, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    thing: Arc<Thing>,
    _guard: OwnedMutexGuard<()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.thing.maker.send_replace(None);
    }
}

impl InFlight {
    /// Waits for the turn to make the thing called `what`; meanwhile `progress` shows the maker's progress.
    pub(super) async fn turn(&self, what: &str, progress: &Progress) -> Result<Turn, Cancelled> {
        let thing = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, thing| Arc::strong_count(thing) > 1);
            all.entry(what.to_owned()).or_default().clone()
        };
        let guard = match thing.turn.clone().try_lock_owned() {
            Ok(guard) => guard,
            Err(_) => {
                progress.step(WAITING);
                let following = follow(thing.maker.subscribe(), progress);
                tokio::select! {
                    guard = thing.turn.clone().lock_owned() => guard,
                    () = progress.cancelled() => return Err(Cancelled),
                    never = following => match never {},
                }
            }
        };
        thing.maker.send_replace(Some(progress.watch()));
        Ok(Turn { thing, _guard: guard })
    }
}

/// Shows the progress of one maker after another; never returns.
async fn follow(
    mut makers: watch::Receiver<Option<watch::Receiver<OpProgress>>>,
    progress: &Progress,
) -> Infallible {
    loop {
        let maker = makers.borrow_and_update().clone();
        let shown = async {
            let Some(mut steps) = maker else { return std::future::pending().await };
            loop {
                let step = steps.borrow_and_update().clone();
                if !step.step.is_empty() {
                    progress.show(step);
                }
                if steps.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            () = shown => {}
            changed = makers.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::*;

    async fn until(progress: &Progress, step: &str) {
        let mut steps = progress.watch();
        let shown = steps.wait_for(|now| now.step == step);
        tokio::time::timeout(Duration::from_secs(30), shown).await.expect("the step is shown").unwrap();
    }

    #[tokio::test]
    async fn a_second_one_shows_the_progress_of_the_first() {
        let all = InFlight::default();
        let (first, second) = (Progress::default(), Progress::default());
        let turn = all.turn("kernel", &first).await.unwrap();
        let waiting = tokio::spawn({
            let (all, second) = (all.clone(), second.clone());
            async move { all.turn("kernel", &second).await.map(drop) }
        });
        first.step("downloading the kernel");
        first.advance(30, Some(120));
        until(&second, "downloading the kernel").await;
        let mut steps = second.watch();
        steps.wait_for(|now| (now.done, now.total) == (Some(30), Some(120))).await.unwrap();
        // Other things are not affected.
        drop(all.turn("image", &Progress::default()).await.unwrap());
        drop(turn);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_is_cancelled_does_not_wait() {
        let all = InFlight::default();
        let _turn = all.turn("kernel", &Progress::default()).await.unwrap();
        let cancel = CancellationToken::new();
        let second = Progress::new(cancel.clone());
        cancel.cancel();
        assert_eq!(all.turn("kernel", &second).await.map(drop), Err(Cancelled));
    }
}
