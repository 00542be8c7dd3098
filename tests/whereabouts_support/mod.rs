//! `/active` and `/region` without a worker behind them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore::config::read::parse;
use farshore::dynamo::clock::uptime;
use farshore::observe::health::Health;
use farshore::observe::server;
use farshore::observe::whereabouts::{Endpoint, Known, Whereabouts};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::common::stand::{SOURCE, TARGET};

/// A server of this process, with nothing behind it but what the test tells it.
pub struct Served {
    pub whereabouts: Whereabouts,
    pub port: u16,
    pub stop: CancellationToken,
    pub task: tokio::task::JoinHandle<()>,
}

impl Served {
    /// In the region `here`, with leases of that length.
    pub async fn start(here: &str, lease: &str) -> Self {
        let text = format!(
            "group = \"orders\"\nactive = \"{SOURCE}\"\nhere = \"{here}\"\n[regions.{SOURCE}]\n[regions.{TARGET}]\n\
             [leases]\nduration = \"{lease}\"\n[[tables]]\nname = \"t\"\n[dead_letters]\ndirectory = \"/x\"\n"
        );
        let config = parse("x", &text, &[]).unwrap().config;
        let endpoint = Endpoint {
            region: SOURCE.to_owned(),
            url: None,
        };
        let endpoints = BTreeMap::from([(SOURCE.to_owned(), endpoint)]);
        let whereabouts = Whereabouts::with(&config, here, endpoints);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let health = Arc::new(Health::default());
        let served = server::serve(
            listener,
            health,
            None,
            Default::default(),
            whereabouts.clone(),
            stop.clone(),
        );
        Self {
            task: tokio::spawn(served),
            whereabouts,
            port,
            stop,
        }
    }

    pub fn tell(&self, active: &str, epoch: u64, state: &str) {
        self.whereabouts.set(Known {
            active: active.to_owned(),
            epoch,
            state: state.to_owned(),
            read: uptime(),
        });
    }

    pub fn get(&self, path: &str) -> impl Future<Output = String> + use<> {
        let (port, path) = (self.port, path.to_owned());
        async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        }
    }
}
