//! Bytes that have arrived and wait to be passed on.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

/// Frames of at least this size are queued as they are; smaller ones are combined.
const WHOLE: usize = 16 << 10;

/// A queue of bytes for one consumer. Its memory is at most a few times the bytes: each frame keeps the whole buffer that it was read into, so small
/// frames are copied together.
#[derive(Debug, Default)]
pub struct Waiting {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<Bytes>,
    /// Small frames after the pieces.
    small: BytesMut,
    is_over: bool,
}

impl Waiting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds bytes.
    pub fn push(&self, bytes: Bytes) {
        let mut state = self.state();
        if bytes.len() >= WHOLE {
            let small = std::mem::take(&mut state.small);
            if !small.is_empty() {
                state.pieces.push_back(small.freeze());
            }
            state.pieces.push_back(bytes);
        } else {
            state.small.extend_from_slice(&bytes);
        }
        drop(state);
        self.news.notify_one();
    }

    /// Marks the end.
    pub fn end(&self) {
        self.state().is_over = true;
        self.news.notify_one();
    }

    /// Returns the next piece; `None` at the end. Cancel-safe: nothing is lost.
    pub async fn next(&self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.state();
                if let Some(piece) = state.pieces.pop_front() {
                    return Some(piece);
                }
                if !state.small.is_empty() {
                    return Some(std::mem::take(&mut state.small).freeze());
                }
                if state.is_over {
                    return None;
                }
            }
            self.news.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_comes_in_order_and_small_pieces_come_together() {
        let waiting = Waiting::default();
        let mut expected = Vec::new();
        for number in 0..2000_u32 {
            let length = if number % 500 == 499 { WHOLE } else { 1 };
            let piece = vec![number as u8; length];
            expected.extend_from_slice(&piece);
            waiting.push(piece.into());
        }
        waiting.end();
        let (mut all, mut pieces) = (Vec::new(), 0);
        while let Some(piece) = waiting.next().await {
            all.extend_from_slice(&piece);
            pieces += 1;
        }
        assert!(all == expected);
        assert_eq!(pieces, 8, "four large ones, and what was between them");
    }

    #[tokio::test]
    async fn a_taker_waits_for_what_comes() {
        let waiting = std::sync::Arc::new(Waiting::default());
        let taker = tokio::spawn({
            let waiting = waiting.clone();
            async move { (waiting.next().await, waiting.next().await) }
        });
        tokio::task::yield_now().await;
        waiting.push(Bytes::from_static(b"a"));
        tokio::task::yield_now().await;
        waiting.end();
        assert_eq!(taker.await.unwrap(), (Some(Bytes::from_static(b"a")), None));
    }
}
