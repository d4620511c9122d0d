//! What an operator asks of a running job: to stop, and to have another number of workers.
//!
//! Input: a run directory and the address of its coordinator. Output: the coordinator's answer, or an error that says what to
//! do. Invariants: the job's secret goes to the coordinator's gRPC port alone, encrypted where the job is (`cluster.tls`); a
//! call ends within [`DEADLINE`], connecting included.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use learn_domain::report::CoordinatorAddress;
use learn_domain::run_dir::RunDir;
use learn_proto::auth::BearerInterceptor;
use learn_proto::connect::{ConnectError, Pass, chain};
use learn_proto::tls::is_refusal;
use learn_proto::v1::operator_client::OperatorClient;
use learn_proto::v1::{ScaleRequest, StopRequest};
use tokio::time::timeout;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for an answer, from the first attempt to connect.
const DEADLINE: Duration = Duration::from_secs(10);

/// The coordinator has not done what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error(transparent)]
    Client(#[from] ConnectError),
    #[error("no call can be made from here: {0}")]
    Runtime(#[from] io::Error),
    #[error(
        "the coordinator at {url} cannot be reached: {reason}; does this machine reach that one, and does the job still run?"
    )]
    Unreachable { url: String, reason: String },
    #[error(
        "the coordinator at {url} and this user do not take each other's certificates: {reason}; is this the run directory that \
         it serves?"
    )]
    Certificates { url: String, reason: String },
    #[error(
        "the coordinator at {url} has not answered within {seconds} s; ask again: a request that has come already does no harm twice"
    )]
    Silent { url: String, seconds: u64 },
    #[error(
        "the coordinator at {url} is of an older version than this learn-launch and does not know this call; use the learn-launch \
         that has started the job, or stop it with `kill {pid}` on {host}, after which it can be resumed"
    )]
    Older { url: String, pid: u32, host: String },
    #[error("the coordinator at {url} refuses: {message}")]
    Refused { url: String, message: String },
}

type Client = OperatorClient<InterceptedService<Channel, BearerInterceptor>>;

/// Asks a job to end: a training after the step it is in, with a checkpoint, an embed job at once.
///
/// # Errors
/// No answer, or a refusal.
pub fn stop(run: &RunDir, address: &CoordinatorAddress) -> Result<(), OperatorError> {
    call(run, address, DEADLINE, async |client| client.stop(StopRequest::default()).await).map(|_| ())
}

/// Ends a training that cannot begin, for a reason that is kept: a worker has ended before all had joined.
///
/// # Errors
/// No answer, or a refusal.
pub fn never_joined(run: &RunDir, address: &CoordinatorAddress, reason: &str) -> Result<(), OperatorError> {
    let request = StopRequest { never_joined: reason.to_owned() };
    call(run, address, DEADLINE, async |client| client.stop(request).await).map(|_| ())
}

/// Asks for so many workers; gives how many are wanted now.
///
/// # Errors
/// No answer, or a refusal.
pub fn scale(run: &RunDir, address: &CoordinatorAddress, workers: u32) -> Result<u32, OperatorError> {
    let answer = call(run, address, DEADLINE, async |client| client.scale(ScaleRequest { workers }).await)?;
    Ok(answer.wanted_workers)
}

fn call<T>(
    run: &RunDir,
    address: &CoordinatorAddress,
    deadline: Duration,
    ask: impl AsyncFnOnce(&mut Client) -> Result<Response<T>, Status>,
) -> Result<T, OperatorError> {
    let url = || address.grpc.clone();
    let pass = Pass::read(&run.secret())?;
    let endpoint = pass.endpoint(&address.grpc)?.connect_timeout(CONNECT);
    let bearer = pass.bearer().map_err(ConnectError::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let asked = async {
        let channel = endpoint.connect().await.map_err(|error| match (is_refusal(&error), chain(&error)) {
            (true, reason) => OperatorError::Certificates { url: url(), reason },
            (false, reason) => OperatorError::Unreachable { url: url(), reason },
        })?;
        let mut client = OperatorClient::with_interceptor(channel, bearer);
        ask(&mut client).await.map(Response::into_inner).map_err(|status| refusal(address, &status))
    };
    let silent = || OperatorError::Silent { url: url(), seconds: deadline.as_secs() };
    runtime.block_on(async { timeout(deadline, asked).await }).unwrap_or_else(|_elapsed| Err(silent()))
}

/// What a status means to an operator.
fn refusal(address: &CoordinatorAddress, status: &Status) -> OperatorError {
    let url = address.grpc.clone();
    match (status.code(), status.source()) {
        _ if is_refusal(status) => OperatorError::Certificates { url, reason: chain(status) },
        (Code::Unimplemented, _) => {
            let host = if address.host.is_empty() { "its machine" } else { &address.host };
            OperatorError::Older { url, pid: address.pid, host: host.to_owned() }
        }
        // made here, of a connection that broke
        (_, Some(source)) => OperatorError::Unreachable { url, reason: chain(source) },
        (code, None) => {
            let message = if status.message().is_empty() { code.description() } else { status.message() };
            OperatorError::Refused { url, message: message.to_owned() }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use learn_domain::Config;
    use learn_domain::config::TlsMode;
    use tokio::sync::oneshot;
    use tonic::service::Routes;
    use tonic::transport::server::TcpIncoming;

    use super::*;
    use crate::runs;

    fn run(folder: &tempfile::TempDir, tls: TlsMode) -> RunDir {
        let mut config = Config::default();
        config.cluster.tls.mode = tls;
        runs::create(&folder.path().join("run"), &config).unwrap()
    }

    fn at(scheme: &str, port: u16) -> CoordinatorAddress {
        let grpc = format!("{scheme}://127.0.0.1:{port}");
        CoordinatorAddress { pid: 4711, host: "node1".into(), grpc, ..CoordinatorAddress::default() }
    }

    #[test]
    fn an_older_coordinator_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let run = run(&folder, TlsMode::Off);
        let (bound, port) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        // a gRPC server without this service
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
                bound.send(incoming.local_addr().unwrap().port()).unwrap();
                let router = tonic::transport::Server::builder().add_routes(Routes::default());
                router.serve_with_incoming_shutdown(incoming, async { ended.await.unwrap() }).await
            })
        });
        let address = at("http", port.recv().unwrap());
        for text in [stop(&run, &address).unwrap_err().to_string(), scale(&run, &address, 2).unwrap_err().to_string()] {
            assert!(text.contains("older version") && text.contains("`kill 4711` on node1"), "{text}");
        }
        end.send(()).unwrap();
        server.join().unwrap().unwrap();
    }

    #[test]
    fn nobody_and_somebody_silent_are_told_apart_within_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let run = run(&folder, TlsMode::Off);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = at("http", listener.local_addr().unwrap().port());
        let ask = async |client: &mut Client| client.stop(StopRequest::default()).await;
        let silent = call(&run, &address, Duration::from_millis(200), ask).unwrap_err();
        assert!(matches!(silent, OperatorError::Silent { .. }), "{silent}");
        drop(listener);
        let text = stop(&run, &address).unwrap_err().to_string();
        assert!(text.contains("cannot be reached") && text.contains("refused"), "{text}");
    }

    #[test]
    fn a_job_with_certificates_is_not_asked_in_plain_text() {
        let folder = tempfile::tempdir().unwrap();
        let run = run(&folder, TlsMode::Auto);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = stop(&run, &at("http", port)).unwrap_err().to_string();
        assert!(text.contains("encrypted (cluster.tls)"), "{text}");
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody has connected");
    }

    #[test]
    fn refusals_say_what_the_coordinator_says() {
        let address = at("http", 1);
        let text = refusal(&address, &Status::unavailable("the coordinator is ending")).to_string();
        assert!(text.ends_with("the coordinator is ending"), "{text}");
        let text = refusal(&address, &Status::new(Code::Internal, "")).to_string();
        assert!(text.ends_with(Code::Internal.description()), "{text}");
    }
}
