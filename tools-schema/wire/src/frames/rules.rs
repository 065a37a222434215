//! The rules of which frames may be sent and received, without any IO.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::{CREDIT_MAX, FrameError, HEADER, Kind};

/// Less credit than this is not used up by a part of what there is to send, in bytes. It is far less than a peer consumes before it gives more.
const FLOOR: u32 = 16 << 10;

/// The state that the two ends of a stream share: the credit of both directions.
#[derive(Debug)]
pub(super) struct Flow {
    /// The remaining credit for sending; `None` once nothing can be sent.
    credit: watch::Sender<Option<u32>>,
    /// All credit that the peer was ever given.
    granted: AtomicU64,
    /// The bytes consumed since the peer was last given credit.
    taken: AtomicU64,
    /// The initial credit of each side.
    window: u32,
}

impl Flow {
    /// Creates the state of a stream on which `sent` bytes were sent already.
    pub(super) fn after(window: u32, sent: u32) -> Self {
        Self {
            credit: watch::Sender::new(Some(window.saturating_sub(sent))),
            granted: AtomicU64::new(window.into()),
            taken: AtomicU64::new(0),
            window,
        }
    }

    /// Adds credit from the peer.
    pub(super) fn add(&self, bytes: u32) -> Result<(), FrameError> {
        let mut is_refused = bytes == 0;
        self.credit.send_if_modified(|credit| {
            let Some(credit) = credit else { return false };
            match credit.checked_add(bytes) {
                Some(sum) if sum <= CREDIT_MAX && bytes > 0 => *credit = sum,
                _ => is_refused = true,
            }
            !is_refused
        });
        if is_refused { Err(FrameError::Credit { bytes }) } else { Ok(()) }
    }

    /// Waits for credit that is worth a frame of up to `most` bytes, and returns it.
    pub(super) async fn room(&self, most: u32) -> Result<u32, FrameError> {
        let floor = most.min(FLOOR).min(self.window / 8).max(1);
        let mut credit = self.credit.subscribe();
        // The sender lives as long as `self`.
        let is_enough = |credit: &Option<u32>| credit.is_none_or(|credit| credit >= floor);
        let credit = credit.wait_for(is_enough).await.map_err(|_| FrameError::Closed)?;
        credit.ok_or(FrameError::Closed)
    }

    /// Waits for credit that is worth a frame, and takes up to `most` of it.
    pub(super) async fn take(&self, most: u32) -> Result<u32, FrameError> {
        loop {
            self.room(most).await?;
            let mut taken = 0;
            self.credit.send_if_modified(|credit| {
                if let Some(credit) = credit {
                    taken = most.min(*credit);
                    *credit -= taken;
                }
                // Waiting tasks need not be woken for less credit.
                false
            });
            if taken > 0 {
                return Ok(taken);
            }
        }
    }

    /// Waits for credit for all of `bytes`, at most a quarter of [`super::WINDOW`], and takes it.
    pub(super) async fn take_all(&self, bytes: u32) -> Result<(), FrameError> {
        let mut credit = self.credit.subscribe();
        loop {
            let is_enough = |credit: &Option<u32>| credit.is_none_or(|credit| credit >= bytes);
            let now = *credit.wait_for(is_enough).await.map_err(|_| FrameError::Closed)?;
            now.ok_or(FrameError::Closed)?;
            let mut is_taken = false;
            self.credit.send_if_modified(|credit| {
                if let Some(credit) = credit
                    && *credit >= bytes
                {
                    *credit -= bytes;
                    is_taken = true;
                }
                false
            });
            if is_taken {
                return Ok(());
            }
        }
    }

    /// Ends sending.
    pub(super) fn close(&self) {
        self.credit.send_if_modified(|credit| credit.take().is_some());
    }

    /// Counts consumed bytes of the peer; returns how much new credit to give, if it is worth a frame.
    pub(super) fn took(&self, bytes: usize) -> Option<u32> {
        let bytes = bytes as u64;
        let taken = self.taken.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if taken < u64::from(self.window / 4) {
            return None;
        }
        let taken = self.taken.swap(0, Ordering::AcqRel);
        // Before the peer can use it.
        self.granted.fetch_add(taken, Ordering::AcqRel);
        u32::try_from(taken).ok().filter(|more| *more > 0)
    }
}

/// Checks the frames of one direction by their headers.
#[derive(Debug, Default)]
pub(super) struct Rules {
    received: u64,
    is_ended: bool,
    is_done: bool,
}

impl Rules {
    /// Returns kind and length of the frame with this header, if it is allowed now.
    pub(super) fn check(&mut self, header: [u8; HEADER], flow: &Flow) -> Result<(Kind, usize), FrameError> {
        let (kind, length) = Kind::parse(header)?;
        if self.is_ended && (kind.is_data() || kind == Kind::End) {
            return Err(FrameError::AfterEnd { kind });
        }
        match kind {
            Kind::Data | Kind::Stderr => {
                let credit = flow.granted.load(Ordering::Acquire).saturating_sub(self.received);
                if length as u64 > credit {
                    return Err(FrameError::Overrun { length, credit });
                }
                self.received += length as u64;
            }
            Kind::End => self.is_ended = true,
            Kind::Done => self.is_done = true,
            Kind::Credit | Kind::Control => {}
        }
        Ok((kind, length))
    }

    /// Returns whether the last frame was received.
    pub(super) fn is_done(&self) -> bool {
        self.is_done
    }
}
