//! Ends responses when the token of their caller stops working.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Response;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::Body;

/// A body that ends early when it is cancelled.
struct Until {
    body: Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl HttpBody for Until {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The same response; an event stream ends when `ended` is cancelled.
pub(super) fn until(response: Response<Body>, ended: &CancellationToken) -> Response<Body> {
    // What is whole is written at once.
    if response.body().size_hint().exact().is_some() {
        return response;
    }
    let ended = Box::pin(ended.clone().cancelled_owned());
    response.map(|body| Until { body, ended }.boxed())
}
