//! The exporter as a client sees it.

use std::error::Error;

use learn_telemetry::WorkerMetrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn get(address: std::net::SocketAddr, path: &str) -> Result<String, Box<dyn Error>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn metrics_and_health_are_served_until_shutdown() -> Result<(), Box<dyn Error>> {
    let metrics = WorkerMetrics::new();
    metrics.exposition.set_label("rank", 3);
    metrics.users_total.inc_by(7);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        let _closed = stopped.await;
    };
    let server = tokio::spawn(learn_telemetry::serve(listener, metrics.exposition.clone(), shutdown));

    let page = get(address, "/metrics").await?;
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert!(page.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{page}");
    assert!(page.contains("# TYPE learn_worker_users_total counter\n"), "{page}");
    assert!(page.contains("learn_worker_users_total{rank=\"3\"} 7\n"), "{page}");
    assert!(get(address, "/healthz").await?.ends_with("ok\n"));
    assert!(get(address, "/nothing").await?.starts_with("HTTP/1.1 404"));

    drop(stop);
    server.await??;
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed after shutdown");
    Ok(())
}
