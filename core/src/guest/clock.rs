//! Keeps a guest's clock correct: compares it with the host's every few seconds, and corrects it if it is certainly wrong.
//!
//! ```text
//! host    t0 ── nexus/clock { time } ──> guest
//!         t1 <── its time ──────────────         ahead by: its time - (t0 + t1) / 2, error at most (t1 - t0) / 2
//!            ── nexus/clock { time, add } ──>    if that is too much
//! ```
//! The guest receives a difference, not a time. The correction therefore remains right if the guest is paused before it reads it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nexus_schema::link::{CLOCK_REQUEST, ClockAnswer, ClockParams};
use serde_json::value::to_raw_value;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::{Link, LinkError};

/// Interval between two checks of the clock.
const PERIOD: Duration = Duration::from_secs(10);
/// Timeout for the guest's answer.
const ANSWER_MAX: Duration = Duration::from_secs(8);
/// Largest tolerated error of a clock, in nanoseconds.
const TOLERANCE_NS: i128 = 400_000_000;
/// The same for a clock that is known to have stood still, in nanoseconds.
const TOLERANCE_AFTER_PAUSE_NS: i128 = 5_000_000;
/// Timeout of a guest that runs again to let its clock be set.
const SET_MAX: Duration = Duration::from_secs(5);
/// JSON-RPC's error code for an unknown method.
const METHOD_NOT_FOUND: i64 = -32601;

/// Keeps the clock of a link's guest correct until it is dropped.
#[derive(Debug)]
pub(crate) struct ClockKeeper(JoinHandle<()>);

impl ClockKeeper {
    /// Starts the task; `directory` is the VM's, for the log.
    pub(crate) fn start(link: Link, directory: &Path) -> Self {
        Self(tokio::spawn(keep(link, directory.to_owned(), PERIOD)))
    }
}

/// Sets the clock of a guest that was paused. Failures are logged: the clock's keeper corrects it later.
pub(crate) async fn set_clock(link: &Link) {
    match tokio::time::timeout(SET_MAX, look(link, TOLERANCE_AFTER_PAUSE_NS)).await {
        Ok(Ok(_) | Err(LinkError::Refused { code: METHOD_NOT_FOUND, .. })) => {}
        Ok(Err(error)) => tracing::info!(%error, "the clock of a resumed guest is not set yet"),
        Err(_) => tracing::info!("a resumed guest does not answer yet: its clock is not set"),
    }
}

impl Drop for ClockKeeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn keep(link: Link, directory: PathBuf, period: Duration) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match look(&link, TOLERANCE_NS).await {
            Ok(None) => {}
            Ok(Some(ahead)) => {
                tracing::info!(directory = %directory.display(), ahead_ms = ahead / 1_000_000, "corrected the guest's clock");
            }
            // The agent is older than this request.
            Err(LinkError::Refused { code: METHOD_NOT_FOUND, .. }) => return,
            Err(error) => {
                tracing::debug!(%error, directory = %directory.display(), "cannot read the guest's clock")
            }
        }
    }
}

/// Checks the clock once. Returns by how much it was ahead, in nanoseconds, if it had to be corrected.
async fn look(link: &Link, tolerance_ns: i128) -> Result<Option<i64>, LinkError> {
    let begun = Instant::now();
    let sent = now_ns();
    let answer = ask(link, ClockParams { time_unix_ns: sent, add_ns: None }).await?;
    let took = begun.elapsed();
    let Some(ahead) = ahead(sent, took, answer.time_unix_ns, tolerance_ns) else { return Ok(None) };
    ask(link, ClockParams { time_unix_ns: now_ns(), add_ns: Some(ahead.saturating_neg()) }).await?;
    Ok(Some(ahead))
}

async fn ask(link: &Link, params: ClockParams) -> Result<ClockAnswer, LinkError> {
    let params =
        to_raw_value(&params).map_err(|_| LinkError::Misbehaved { what: "cannot encode the request" })?;
    let answer = link.request(CLOCK_REQUEST, &params, ANSWER_MAX).await?;
    serde_json::from_str(answer.get())
        .map_err(|_| LinkError::Misbehaved { what: "a malformed answer about its clock" })
}

/// Returns how far a guest's clock is ahead, in nanoseconds, if that exceeds both the tolerance and the time that the request took.
fn ahead(sent_ns: u64, took: Duration, theirs_ns: u64, tolerance_ns: i128) -> Option<i64> {
    let took = i128::try_from(took.as_nanos()).unwrap_or(i128::MAX);
    let ahead = i128::from(theirs_ns) - (i128::from(sent_ns) + took / 2);
    (ahead.abs() > tolerance_ns.max(took))
        .then(|| i64::try_from(ahead).unwrap_or(if ahead < 0 { i64::MIN } else { i64::MAX }))
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;
    use crate::os::{paths::vm_files, socket};

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn only_what_is_certainly_wrong_is_set() {
        let quick = Duration::from_millis(2);
        for (theirs, is) in [
            (100 * SECOND, None),
            (100 * SECOND + 300_000_000, None),
            (101 * SECOND, Some(999_000_000)),
            (99 * SECOND, Some(-1_001_000_000)),
            (0, Some(-100_001_000_000)),
            (u64::MAX, Some(i64::MAX)),
        ] {
            assert_eq!(ahead(100 * SECOND, quick, theirs, TOLERANCE_NS), is, "{theirs}");
        }
        // A slow answer makes the measurement less exact.
        let slow = Duration::from_secs(3);
        assert_eq!(ahead(100 * SECOND, slow, 104 * SECOND, TOLERANCE_NS), None);
        assert_eq!(ahead(100 * SECOND, slow, 105 * SECOND, TOLERANCE_NS), Some(3_500_000_000));
        // A clock that has stood still is set more exactly.
        let theirs = 100 * SECOND - 50_000_000;
        assert_eq!(ahead(100 * SECOND, quick, theirs, TOLERANCE_NS), None);
        assert_eq!(ahead(100 * SECOND, quick, theirs, TOLERANCE_AFTER_PAUSE_NS), Some(-51_000_000));
    }

    /// A guest whose clock is off by `skew_ns`. It supports `nexus/clock` if `knows` is set.
    async fn guest(skew_ns: i64, knows: bool) -> (tempfile::TempDir, Arc<Mutex<(i64, u32)>>) {
        let directory = tempfile::tempdir().unwrap();
        let listener = socket::bind_in_tokio(directory.path(), vm_files::VSOCK).unwrap();
        let state = Arc::new(Mutex::new((skew_ns, 0)));
        let shared = state.clone();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let mut lines = BufReader::new(read).lines();
            lines.next_line().await.unwrap();
            write.write_all(b"OK 1\n").await.unwrap();
            while let Ok(Some(line)) = lines.next_line().await {
                let message: Value = serde_json::from_str(&line).unwrap();
                let result = match message["method"].as_str() {
                    Some("initialize") => json!({ "result": { "protocolVersion": "2025-11-25" } }),
                    Some("nexus/clock") => {
                        let mut state = shared.lock().unwrap();
                        state.1 += 1;
                        state.0 += message["params"]["add_ns"].as_i64().unwrap_or_default();
                        let time = now_ns().saturating_add_signed(state.0);
                        match knows {
                            true => json!({ "result": { "time_unix_ns": time } }),
                            false => json!({ "error": { "code": -32601, "message": "nexus/clock" } }),
                        }
                    }
                    _ => continue,
                };
                let mut answer = json!({ "jsonrpc": "2.0", "id": message["id"] });
                answer.as_object_mut().unwrap().extend(result.as_object().unwrap().clone());
                write.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        });
        (directory, state)
    }

    #[tokio::test]
    async fn a_clock_that_is_wrong_is_set_whenever_it_gets_so() {
        for skew in [-3600_i64, 3600, 2] {
            let (directory, state) = guest(skew * 1_000_000_000, true).await;
            let link = Link::start(directory.path(), 200);
            let keeper = tokio::spawn(keep(link, directory.path().to_owned(), Duration::from_millis(20)));
            let right = async {
                for jump in [0, 90_000_000_000_i64] {
                    state.lock().unwrap().0 += jump;
                    while state.lock().unwrap().0.abs() > 400_000_000 {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(60), right).await.expect("it is set right");
            keeper.abort();
        }
    }

    #[tokio::test]
    async fn an_older_agent_is_not_asked_again() {
        let (directory, state) = guest(0, false).await;
        let link = Link::start(directory.path(), 200);
        let kept = keep(link, directory.path().to_owned(), Duration::from_millis(1));
        tokio::time::timeout(Duration::from_secs(60), kept).await.expect("it ends");
        assert_eq!(state.lock().unwrap().1, 1);
    }
}
