//! Ends what follows something once nobody reads its output any more, as in `nexusctl audit -f | head`. A write would fail then, but there
//! may be nothing to write for a long time.

use std::io;
use std::time::Duration;

use super::error::Error;
use crate::duplex;

/// How often standard output is checked.
const CHECK: Duration = Duration::from_millis(200);

/// Runs work until it ends or the reader of standard output is gone.
pub(crate) async fn while_read<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::select! {
        done = work => done,
        () = unread() => Err(Error::Output { source: io::ErrorKind::BrokenPipe.into() }),
    }
}

async fn unread() {
    while !duplex::is_unread(io::stdout()) {
        tokio::time::sleep(CHECK).await;
    }
}
