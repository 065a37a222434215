//! Exports a span of each call to a collector of OpenTelemetry: OTLP over HTTP, as JSON. Off unless a collector is configured.
//!
//! ```text
//! a call ends ──> the queue (QUEUE_MAX) ──> batches ──> POST /v1/traces
//!                   │ full: lost                        │ not taken: lost
//! ```
//! No call waits for it, and nothing is sent twice. What is lost is counted in `/metrics`. A span has what the audit log has, and none of a call's contents.

mod collector;
mod span;

use std::time::{Duration, SystemTime};

use nexus_core::CallRecord;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

pub use collector::Collector;

use crate::host::Counters;

/// How many calls may be queued.
const QUEUE_MAX: usize = 4096;
/// How many spans are sent at once.
const BATCH_MAX: usize = 512;
/// How long a batch waits for more spans.
const GATHER: Duration = Duration::from_secs(1);
/// How long what is queued when the daemon stops may take.
const LAST: Duration = Duration::from_secs(2);

/// A call that has ended.
#[derive(Debug)]
pub(crate) struct Call {
    /// What the audit log has of it.
    pub(crate) record: CallRecord,
    /// When it started; the record has it by the millisecond.
    pub(crate) started: SystemTime,
}

/// Where calls go.
#[derive(Debug)]
pub(crate) struct Exporter(mpsc::Sender<Call>);

/// What has come and is to be sent.
#[derive(Debug)]
pub(crate) struct Queue(mpsc::Receiver<Call>);

impl Exporter {
    /// An exporter, and what [`send`] takes from.
    pub(crate) fn new() -> (Self, Queue) {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        (Self(sender), Queue(receiver))
    }

    /// Adds a call, if there is room and its trace wants it; never waits.
    pub(crate) fn add(&self, call: Call, counters: &Counters) {
        let is_wanted = call.record.trace.as_deref().is_none_or(span::is_sampled);
        if is_wanted && self.0.try_send(call).is_err() {
            counters.spans_lost.add();
        }
    }
}

/// Sends what comes until the daemon stops.
pub(crate) async fn send(collector: Collector, queue: Queue, counters: &Counters, stop: CancellationToken) {
    let Queue(mut queue) = queue;
    let mut batch = Vec::new();
    let mut is_failing = false;
    loop {
        let is_over = tokio::select! {
            count = queue.recv_many(&mut batch, BATCH_MAX) => count == 0,
            () = stop.cancelled() => true,
        };
        if is_over {
            break;
        }
        let until = Instant::now() + GATHER;
        while batch.len() < BATCH_MAX && !stop.is_cancelled() {
            let room = BATCH_MAX - batch.len();
            match timeout_at(until, queue.recv_many(&mut batch, room)).await {
                Ok(count) if count > 0 => {}
                Ok(_) | Err(_) => break,
            }
        }
        let outcome = post(&collector, &mut batch, counters).await;
        // One line when it begins to fail, and one when that is over.
        match (outcome, is_failing) {
            (Err(error), false) => {
                tracing::warn!(%collector, error, "spans are lost: the collector does not take them");
                is_failing = true;
            }
            (Ok(()), true) => {
                tracing::info!(%collector, "the collector takes spans again");
                is_failing = false;
            }
            (Ok(()), false) | (Err(_), true) => {}
        }
    }
    queue.close();
    let until = Instant::now() + LAST;
    while queue.recv_many(&mut batch, BATCH_MAX).await > 0 && Instant::now() < until {
        let count = batch.len() as u64;
        match timeout_at(until, post(&collector, &mut batch, counters)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => break,
            Err(_) => {
                counters.spans_lost.add_many(count);
                break;
            }
        }
    }
    let mut left = batch.len() as u64;
    while queue.try_recv().is_ok() {
        left += 1;
    }
    counters.spans_lost.add_many(left);
}

/// Sends a batch and empties it.
async fn post(collector: &Collector, batch: &mut Vec<Call>, counters: &Counters) -> Result<(), String> {
    let count = batch.len() as u64;
    let body = span::request(batch);
    batch.clear();
    let outcome = collector.post(body).await;
    match &outcome {
        Ok(()) => counters.spans_sent.add_many(count),
        Err(_) => counters.spans_lost.add_many(count),
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_lost_and_counted() {
        let (exporter, queue) = Exporter::new();
        let counters = Counters::default();
        for _ in 0..QUEUE_MAX + 3 {
            exporter.add(span::tests::call(None), &counters);
        }
        assert_eq!((counters.spans_lost.get(), queue.0.len()), (3, QUEUE_MAX));
        // One that its trace does not want is not lost.
        exporter.add(span::tests::call(Some("00")), &counters);
        assert_eq!(counters.spans_lost.get(), 3);
    }
}
