//! The body of an answer: whole, or broken off in the middle.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

pub(crate) struct AnswerBody {
    left: Bytes,
    /// The connection breaks once `left` is sent.
    cut: bool,
    length: u64,
}

impl AnswerBody {
    pub(crate) fn full(bytes: Bytes) -> Self {
        let length = bytes.len() as u64;
        Self {
            left: bytes,
            cut: false,
            length,
        }
    }

    /// Promises all of `bytes` and breaks the connection after half of them.
    pub(crate) fn cut(bytes: Bytes) -> Self {
        let length = bytes.len() as u64;
        Self {
            left: bytes.slice(..bytes.len() / 2),
            cut: true,
            length,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(left))));
        }
        Poll::Ready(self.cut.then(|| {
            self.cut = false;
            Err(io::Error::from(io::ErrorKind::ConnectionReset))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty() && !self.cut
    }

    fn size_hint(&self) -> SizeHint {
        if self.cut {
            SizeHint::with_exact(self.length)
        } else {
            SizeHint::with_exact(self.left.len() as u64)
        }
    }
}
