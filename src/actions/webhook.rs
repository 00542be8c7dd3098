//! Posts JSON, signed.
//!
//! `Farshore-Signature: t=SECONDS,v1=HEX`, where HEX is the HMAC-SHA256 of `SECONDS.BODY` under the
//! secret. SECONDS is the time of the attempt: who checks it refuses what was recorded and is sent
//! again later. `Idempotency-Key` is the same for all attempts of one epoch.

use std::io::Read;

use aws_smithy_runtime_api::client::http::HttpConnector;
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::http::HttpError;
use aws_smithy_types::body::SdkBody;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;

use super::describe::origin;
use super::{Moment, Trouble, delivery_id, hex};
use crate::config::actions::{Secret, Webhook};
use crate::dynamo::clock::host_ms;
use crate::dynamo::transmit;
use crate::error::source_chain;

/// A secret longer than that is no secret but some other file.
const SECRET_BYTES_MAX: u64 = 64 * 1_024;

pub(super) async fn post(
    webhook: &Webhook,
    name: &str,
    moment: &Moment<'_>,
) -> Result<(), Trouble> {
    let body = match &webhook.body {
        Some(body) => body.fill_json(moment),
        None => own_body(moment),
    };
    let signature = match &webhook.secret {
        None => None,
        Some(secret) => {
            let secret = read_secret(secret).await?;
            Some(sign(&secret, host_ms() / 1_000, body.as_bytes())?)
        }
    };
    let place = origin(webhook);
    let request =
        request(webhook, body, signature, &delivery_id(name, moment)).map_err(|error| {
            Trouble::lasting(
                format!("The request to {place} could not be made: {error}"),
                "Correct `url`",
            )
        })?;
    let answer = transmit::connector().call(request).await.map_err(|error| {
        Trouble::passing(
            format!("{place} did not answer: {}", source_chain(Some(&error))),
            "Check that this host reaches it (DNS, route, proxy) and trusts its certificate",
        )
    })?;
    judge(answer.status().as_u16(), &place)
}

/// What is sent where the configuration writes no body.
fn own_body(moment: &Moment<'_>) -> String {
    json!({
        "version": 1,
        "event": "failover",
        "group": moment.group,
        "region": moment.region,
        "previous": moment.previous,
        "epoch": moment.epoch,
        "reason": moment.reason,
        "text": moment.sentence(),
    })
    .to_string()
}

fn request(
    webhook: &Webhook,
    body: String,
    signature: Option<String>,
    delivery: &str,
) -> Result<HttpRequest, HttpError> {
    let mut request = HttpRequest::new(SdkBody::from(body));
    request.set_method("POST")?;
    request.set_uri(webhook.url.clone())?;
    let headers = request.headers_mut();
    headers.try_insert("content-type", "application/json")?;
    let agent = concat!("farshore/", env!("CARGO_PKG_VERSION"));
    headers.try_insert("user-agent", agent)?;
    headers.try_insert("idempotency-key", delivery.to_owned())?;
    if let Some(signature) = signature {
        headers.try_insert("farshore-signature", signature)?;
    }
    Ok(request)
}

fn judge(status: u16, place: &str) -> Result<(), Trouble> {
    let why = format!("{place} answered {status}");
    match status {
        200..=299 => Ok(()),
        300..=399 => Err(Trouble::lasting(
            why,
            "Set `url` to where it redirects: a signed request follows nobody",
        )),
        408 | 425 | 429 | 500..=599 => Err(Trouble::passing(why, "See why it is not well")),
        401 | 403 => Err(Trouble::lasting(
            why,
            "Check the secret that it and this host know, and both clocks",
        )),
        _ => Err(Trouble::lasting(
            why,
            "Check `url` and `body` against what it wants",
        )),
    }
}

async fn read_secret(secret: &Secret) -> Result<Vec<u8>, Trouble> {
    let (bytes, place) = match secret {
        Secret::Env(name) => {
            use std::os::unix::ffi::OsStringExt;

            let value = std::env::var_os(name).map(OsStringExt::into_vec);
            let value = value.ok_or_else(|| {
                Trouble::lasting(
                    format!("The variable {name}, which is to hold the secret, is not set"),
                    "Set it where this command runs",
                )
            })?;
            (value, format!("the variable {name}"))
        }
        Secret::File(path) => {
            let shown = path.display().to_string();
            let path = path.clone();
            let read = move || {
                let mut bytes = Vec::new();
                let file = std::fs::File::open(path)?;
                file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes)?;
                match bytes.len() as u64 > SECRET_BYTES_MAX {
                    true => Err(std::io::Error::other(
                        "it is longer than 64 KiB, so it is no secret",
                    )),
                    false => std::io::Result::Ok(bytes),
                }
            };
            let read = tokio::task::spawn_blocking(read).await;
            let bytes = read
                .unwrap_or_else(|error| Err(error.into()))
                .map_err(|error| {
                    Trouble::lasting(
                        format!("The secret file {shown} could not be read: {error}"),
                        "Put the secret there, and let this user read it",
                    )
                })?;
            (bytes, format!("the file {shown}"))
        }
    };
    // Editors end a file with a line feed, which nobody means to be part of a secret.
    let bytes = bytes.trim_ascii_end().to_vec();
    match bytes.is_empty() {
        true => Err(Trouble::lasting(
            format!("There is no secret in {place}"),
            "Put the secret there, the same that the receiver knows",
        )),
        false => Ok(bytes),
    }
}

/// The value of the signature's header.
fn sign(secret: &[u8], seconds: i64, body: &[u8]) -> Result<String, Trouble> {
    // HMAC takes keys of every length; its type does not know it.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret)
        .map_err(|error| Trouble::lasting(error.to_string(), "Use another secret"))?;
    mac.update(seconds.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    let code = hex(&mac.finalize().into_bytes());
    Ok(format!("t={seconds},v1={code}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Held against `printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac secret`.
    #[test]
    fn a_signature_is_what_other_programs_compute() {
        assert_eq!(
            sign(b"secret", 1_700_000_000, br#"{"a":1}"#).unwrap(),
            "t=1700000000,v1=49f24e537407743fa4a0242bb63b94b9a47ee99cbbe071ccd8a22550ae411686"
        );
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_will_not_is_not() {
        for status in [200, 201, 204, 299] {
            assert!(judge(status, "x").is_ok());
        }
        for status in [408, 425, 429, 500, 503, 599] {
            assert!(!judge(status, "x").unwrap_err().lasts, "{status}");
        }
        for status in [100, 301, 307, 400, 401, 403, 404, 410] {
            assert!(judge(status, "x").unwrap_err().lasts, "{status}");
        }
    }

    #[test]
    fn the_own_body_is_json_whatever_the_reason_is() {
        let moment = Moment {
            reason: "\"fire\"\n",
            ..Moment::SAMPLE
        };
        let body: serde_json::Value = serde_json::from_str(&own_body(&moment)).unwrap();
        assert_eq!(body["reason"], moment.reason);
        assert_eq!(body["epoch"], 1);
    }
}
