//! One embedded DynamoDB "region": dynoxide over HTTP on a loopback port.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use dynoxide::Database;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Threads of a server: its database serves one call at a time, the others decode and encode.
const THREADS: usize = 2;

/// Why an embedded server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The in-memory database could not be opened or indexed.
    #[error("the embedded DynamoDB could not open its in-memory database: {0}")]
    Database(String),
    /// No loopback port could be bound.
    #[error("the embedded DynamoDB could not listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// A running embedded DynamoDB. It serves tables and streams on one port until it is dropped.
pub struct EmbeddedServer {
    address: SocketAddr,
    database: Database,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
    runtime: Option<Runtime>,
}

impl EmbeddedServer {
    /// Starts a server with an empty database on a free port of the loopback interface.
    pub async fn start() -> Result<Self, StartError> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts a server with an empty database on `address` (port 0 takes a free one).
    pub async fn start_on(address: SocketAddr) -> Result<Self, StartError> {
        let database = open_database()?;
        Self::serve(address, database).await
    }

    /// Serves a database that another server may serve too, on a free loopback port.
    pub async fn around(database: Database) -> Result<Self, StartError> {
        Self::serve(SocketAddr::from(([127, 0, 0, 1], 0)), database).await
    }

    async fn serve(address: SocketAddr, database: Database) -> Result<Self, StartError> {
        let listen = |source| StartError::Listen { address, source };
        // A runtime of its own: its handlers block their thread for as long as the database does,
        // which must not hold up the timers of whoever embeds it.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("embedded-dynamodb")
            .enable_all()
            .build()
            .map_err(listen)?;
        let listener = {
            let _inside = runtime.enter();
            listen_on(address).map_err(listen)?
        };
        let bound = listener.local_addr().map_err(listen)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let served = database.clone();
        let task = runtime.spawn(async move {
            // A dropped sender ends the server like a sent message does.
            let shutdown = async move {
                let _ = stopped.await;
            };
            if let Err(error) =
                dynoxide::server::serve_with_shutdown(listener, served, shutdown).await
            {
                tracing::error!(%error, "embedded DynamoDB ended");
            }
        });
        Ok(Self {
            address: bound,
            database,
            stop: Some(stop),
            task,
            runtime: Some(runtime),
        })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint URL for SDK clients, tables and streams alike.
    pub fn endpoint_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The database behind it, for a caller that looks at data without the protocol.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// Ends the service as an outage would: once open requests are answered, connections are
    /// refused. The data stays, and [`resume`](Self::resume) serves it again on the same port.
    pub async fn cut(&mut self) {
        self.stop.take();
        // The task ends when its last connection does; a panic in it has been logged by tokio.
        let _ = (&mut self.task).await;
    }

    /// Serves the same data on the same port again after [`cut`](Self::cut).
    pub async fn resume(&mut self) -> Result<(), StartError> {
        *self = Self::serve(self.address, self.database.clone()).await?;
        Ok(())
    }
}

impl Drop for EmbeddedServer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(runtime) = self.runtime.take() {
            // Waiting for its threads is not allowed in an asynchronous context.
            runtime.shutdown_background();
        }
    }
}

/// Listens without Nagle's algorithm: accepted connections inherit the setting, and with it on
/// every answer would wait for the client's delayed acknowledgement.
fn listen_on(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_nodelay(true)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// Opens an in-memory database with the indexes that dynoxide 3.2 lacks: without them its stream
/// writes slow down with the square of the records (1,100 puts/s after 5 s instead of 15,500).
fn open_database() -> Result<Database, StartError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // A name of its own for each database of this process: shared-cache databases are found by
    // name, and two regions must not be one.
    let name = format!(
        "file:farshore-{}-{}?mode=memory&cache=shared",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let failed = |error: &dyn std::fmt::Display| StartError::Database(error.to_string());
    let database = Database::new(&name).map_err(|e| failed(&e))?;
    let indexer = rusqlite::Connection::open(&name).map_err(|e| failed(&e))?;
    indexer
        .execute_batch(
            // One index for both of its questions, the newest number of a table and the records of
            // a shard after a number: each further one costs every write.
            "CREATE INDEX IF NOT EXISTS farshore_stream_by_number
                 ON _stream_records(table_name, CAST(sequence_number AS INTEGER), shard_id);",
        )
        .map_err(|e| failed(&e))?;
    Ok(database)
}
