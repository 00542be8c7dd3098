//! Passing a call on to the embedded server.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, TRANSFER_ENCODING};
use hyper::{Method, Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::protocol::{Answer, Failure, error_code};

#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
}

impl Upstream {
    pub(crate) fn new(uri: Uri) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { client, uri }
    }

    /// Sends a call with its own headers and waits for the whole answer. Trouble between the
    /// gateway and the server behind it is answered as 500.
    pub(crate) async fn send(&self, headers: &HeaderMap, body: Bytes) -> Answer {
        match self.try_send(headers, body).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::error!(%error, "the embedded DynamoDB did not answer");
                Failure::internal().answer()
            }
        }
    }

    async fn try_send(
        &self,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = headers.clone();
        for own in [HOST, CONTENT_LENGTH, CONNECTION, TRANSFER_ENCODING] {
            request.headers_mut().remove(own);
        }
        let response = self.client.request(request).await?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        let status = parts.status.as_u16();
        let mut headers = parts.headers;
        // The gateway's own connection and time describe its answer.
        for own in [CONNECTION, TRANSFER_ENCODING, hyper::header::DATE] {
            headers.remove(own);
        }
        Ok(Answer {
            status,
            code: if status == 200 {
                None
            } else {
                error_code(&body)
            },
            headers: Some(headers),
            body,
        })
    }
}
