//! Counts the bytes that pass through a connection, and limits their rate.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::bucket::Bucket;

/// One end of a connection, and the counter of its bytes.
pub(super) struct Passed<'a, T> {
    inner: T,
    count: &'a AtomicU64,
    bucket: &'a Bucket,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<'a, T> Passed<'a, T> {
    pub(super) const fn new(inner: T, count: &'a AtomicU64, bucket: &'a Bucket) -> Self {
        Self { inner, count, bucket, pause: None }
    }

    fn add(&self, bytes: usize) {
        self.count.fetch_add(bytes as u64, Ordering::Relaxed);
        self.bucket.take(bytes);
    }

    /// Waits until the limit allows more bytes.
    fn poll_free(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
            }
            self.pause = self.bucket.pause(Instant::now()).map(|pause| Box::pin(sleep(pause)));
            if self.pause.is_none() {
                return Poll::Ready(());
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Passed<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_free(cx));
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.add(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Passed<'_, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_free(cx));
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.add(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
