//! Looks whether disk and memory of the host are scarce, and tells it by events.

use std::sync::Weak;
use std::time::Duration;

use tokio::time::sleep;

use super::system::LITTLE;
use crate::context::Shared;
use crate::os::{disk, meminfo};

/// Interval between two looks.
const LOOK: Duration = Duration::from_secs(5);

/// Whether something is scarce. It is again enough only when there is clearly more, so that it is not told over and over.
#[derive(Debug, Default)]
struct Scarce(bool);

impl Scarce {
    /// Takes a measurement in; whether that changed something. `few` is what counts as scarce, twice as much as enough.
    fn look(&mut self, left: u64, few: u64) -> bool {
        let is_scarce = left < if self.0 { few.saturating_mul(2) } else { few };
        std::mem::replace(&mut self.0, is_scarce) != is_scarce
    }
}

/// Looks as long as the daemon runs.
pub(super) async fn watch(shared: Weak<Shared>) {
    let (mut of_disk, mut of_memory) = (Scarce::default(), Scarce::default());
    loop {
        let Some(now) = shared.upgrade() else { return };
        let root = now.paths.root().to_owned();
        let looked = tokio::task::spawn_blocking(move || (disk::free_bytes(&root), meminfo::read()));
        if let Ok((free, memory)) = looked.await {
            if let Ok(free) = free
                && of_disk.look(free, LITTLE)
            {
                let text = format!("the disk of the state directory has {} MiB free", free >> 20);
                now.events.pressure(of_disk.0, &text);
            }
            if let Ok(memory) = memory
                && of_memory.look(memory.available, memory.total / 20)
            {
                let text = format!(
                    "the host has {} of {} MiB of memory available",
                    memory.available >> 20,
                    memory.total >> 20
                );
                now.events.pressure(of_memory.0, &text);
            }
        }
        drop(now);
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scarce_is_told_once_until_there_is_clearly_more() {
        let mut scarce = Scarce::default();
        let told: Vec<_> =
            [100, 99, 50, 120, 199, 200, 150, 100, 99].map(|left| scarce.look(left, 100)).into();
        assert_eq!(told, [false, true, false, false, false, true, false, false, true]);
    }
}
