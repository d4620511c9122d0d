//! Data servers as the coordinator sees them: told what to serve, refused, named to workers and to any Flight client.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use arrow_flight::FlightDescriptor;
use learn_domain::Config;
use learn_proto::convert::{DataOffer, OfferedServer};
use learn_proto::v1::{OfferDataRequest, OfferDataResponse};
use support::{Control, Ground, join, millis, train};
use tonic::{Code, Status};

async fn ask(control: &mut Control, offer: &DataOffer) -> Result<OfferDataResponse, Status> {
    Ok(control.offer_data(OfferDataRequest::from(offer.clone())).await?.into_inner())
}

#[tokio::test]
async fn a_data_server_with_the_jobs_dataset_is_named_and_no_other() {
    let mut ground = Ground::new(2);
    ground.config.cluster.heartbeat_interval = millis(10);
    let running = ground.start(train()).await;
    let mut control = running.control();
    let nothing = DataOffer { fingerprint: String::new(), embeddings_fingerprint: String::new(), server: None };
    let terms = ask(&mut control, &nothing).await.unwrap();
    let config: Config = serde_json::from_str(&terms.config_json).unwrap();
    assert_eq!((config, terms.over), (ground.config.clone(), false));
    let coordinator = running.address.grpc.clone();
    assert_eq!(terms.data_locations, std::slice::from_ref(&coordinator));

    let facts = ground.dataset().facts();
    let mine = DataOffer {
        fingerprint: facts.fingerprint.clone(),
        embeddings_fingerprint: facts.embeddings_fingerprint.clone(),
        server: None,
    };
    ask(&mut control, &mine).await.unwrap();
    let other = DataOffer { fingerprint: "other".into(), ..mine.clone() };
    let refused = ask(&mut control, &other).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("other") && refused.message().contains(&facts.fingerprint), "{refused}");
    let other = DataOffer { embeddings_fingerprint: "vectors".into(), ..mine.clone() };
    let refused = ask(&mut control, &other).await.unwrap_err();
    assert!(refused.message().contains("its embeddings"), "{refused}");

    let serving = |location: &str, config_json: &str| {
        let server = OfferedServer {
            location: location.into(),
            metrics_url: format!("{location}/metrics"),
            host: "there".into(),
            pid: 8,
            config_json: config_json.into(),
        };
        DataOffer { server: Some(server), ..mine.clone() }
    };
    let refused = ask(&mut control, &serving("http://a:1", "{}")).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("another configuration"));
    for location in ["http://a:1", "http://b:1"] {
        ask(&mut control, &serving(location, &terms.config_json)).await.unwrap();
    }
    let admitted = [join(&mut control, "first").await, join(&mut control, "second").await];
    for admission in admitted {
        let mut expected = ["http://a:1", "http://b:1", coordinator.as_str()];
        expected[..2].rotate_left(admission.worker.0 as usize % 2);
        assert_eq!(admission.data_locations, expected, "{}", admission.worker);
    }
    let info = running.flight().get_flight_info(FlightDescriptor::new_path(vec!["train".into()])).await.unwrap();
    let named: Vec<Vec<String>> = info
        .into_inner()
        .endpoint
        .into_iter()
        .map(|endpoint| endpoint.location.into_iter().map(|location| location.uri).collect())
        .collect();
    let last = coordinator.replace("http", "grpc+tcp");
    assert_eq!(
        named,
        [["grpc+tcp://a:1", "grpc+tcp://b:1", last.as_str()], ["grpc+tcp://b:1", "grpc+tcp://a:1", last.as_str()]]
    );
    let status = running.api("job").await;
    assert_eq!(status["data_servers"][1]["location"], "http://b:1", "{status}");
}
