use learn_domain::membership::StopCause;

use super::*;

fn applicant() -> Applicant {
    Applicant {
        incarnation: Incarnation("i".into()),
        host: "h".into(),
        pid: 7,
        device: "cpu".into(),
        metrics_url: "http://h:1/metrics".into(),
    }
}

#[test]
fn an_applicant_is_checked() {
    let request = JoinRequest::from(applicant());
    assert_eq!(Applicant::try_from(request.clone()).unwrap(), applicant());
    for protocol in [0, PROTOCOL + 1] {
        let error = Applicant::try_from(JoinRequest { protocol, ..request.clone() }).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("version {protocol}")) && text.contains(&format!("speaks {PROTOCOL}")));
        assert_eq!(tonic::Status::from(error).code(), tonic::Code::FailedPrecondition);
    }
    let long = JoinRequest { host: "h".repeat(MAX_TEXT_BYTES + 1), ..request.clone() };
    assert!(Applicant::try_from(long).unwrap_err().to_string().contains("`host`"));
    assert!(Applicant::try_from(JoinRequest { incarnation: String::new(), ..request }).is_err());
}

#[test]
fn an_admission_survives_the_wire() {
    let admission = Admission {
        worker: WorkerId(3),
        config: Config::default(),
        dataset: DatasetFacts { items: 5, ..DatasetFacts::default() },
        task: Task::Train { resume_from: Some("c".into()) },
        data_locations: vec!["http://a:1".into()],
        run_dir: "runs/x".into(),
    };
    let response = JoinResponse::try_from(admission.clone()).unwrap();
    assert_eq!(Admission::try_from(response.clone()).unwrap(), admission);
    let error = Admission::try_from(JoinResponse { task_json: "{".into(), ..response }).unwrap_err();
    assert!(error.to_string().contains("`task_json`"));
}

#[test]
fn directives_become_orders() {
    let order = |directive| Order::try_from(directive_message(WorkerId(1), directive).unwrap()).unwrap();
    assert_eq!(order(Directive::Wait), Order::Wait);
    let calls = [
        (Call::Continue, AfterStep::Continue),
        (Call::Regroup, AfterStep::Regroup),
        (Call::Stop(StopCause::Operator), AfterStep::Stop),
    ];
    for (call, after) in calls {
        let (generation, rank) = (Generation(2), Rank(1));
        let run = Directive::Run { generation, rank, world_size: 3, call };
        assert_eq!(order(run), Order::Run { generation, rank, world_size: 3, after });
    }
    assert_eq!(order(Directive::Regroup(Generation(4))), Order::Regroup(Generation(4)));
    assert_eq!(order(Directive::Dismissed), Order::Dismissed);
    let stop = Order::Stop { cause: StopCause::Operator.to_string() };
    assert_eq!(order(Directive::Stop(StopCause::Operator)), stop);
    assert!(directive_message(WorkerId(1), Directive::Unknown).unwrap_err().to_string().contains("worker 1"));
}

#[test]
fn departures_and_reports_survive_the_wire() {
    let gave_up = |why| Departure::GaveUp(why, "nan".into());
    let simple = [Departure::Done, Departure::Stopped];
    let with_message = [Departure::Failed("why".into()), Departure::Crashed("how".into())];
    let gave_up = [gave_up(GiveUp::Diverged), gave_up(GiveUp::Unsaved)];
    for departure in simple.into_iter().chain(with_message).chain(gave_up) {
        let message = leave_request::Departure::from(departure.clone());
        assert_eq!(departure_from(Some(message)).unwrap(), departure);
    }
    assert!(departure_from(None).is_err());
    let long = leave_request::Departure::from(Departure::Failed("é".repeat(MAX_TEXT_BYTES)));
    assert!(departure_from(Some(long)).is_ok(), "a long cause is cut at a character, not refused");
    let record = StepRecord {
        step: Step(4),
        epoch: 1,
        generation: Generation(2),
        loss: 0.5,
        cvr_loss: Some(0.25),
        ..Default::default()
    };
    let report = StepReport {
        worker: WorkerId(1),
        generation: Generation(2),
        step: Step(4),
        epoch: 1,
        users: vec![UserIndex(9)],
        work: Work { data_seconds: 0.25, compute_seconds: 1.5 },
        record: Some(record.clone()),
    };
    assert_eq!(StepReport::from(ReportStepRequest::from(report.clone())), report);
    let before = StepRecord { step: Step(3), generation: Generation(1), ..record.clone() };
    for last in [vec![before, record], Vec::new()] {
        let beginning = Beginning { worker: WorkerId(1), generation: Generation(3), step: Step(4), last };
        assert_eq!(Beginning::from(BeginGenerationRequest::from(beginning.clone())), beginning);
    }
}

#[test]
fn heartbeats_survive_the_wire_and_a_phase_of_another_version_is_no_error() {
    let heartbeat = Heartbeat {
        worker: WorkerId(3),
        generation: Generation(2),
        step: Step(7),
        phase: Phase::DataWait,
        entered: 9,
        inside: true,
        since: Duration::from_millis(1500),
    };
    let message = HeartbeatRequest::from(heartbeat.clone());
    assert_eq!(message.phase, "data_wait");
    assert_eq!(Heartbeat::try_from(message.clone()).unwrap(), heartbeat);
    for phase in ["", "of another version"] {
        let read = Heartbeat::try_from(HeartbeatRequest { phase: phase.into(), ..message.clone() }).unwrap();
        assert_eq!(read, Heartbeat { phase: Phase::Unknown, ..heartbeat.clone() });
    }
    let long = HeartbeatRequest { phase: "x".repeat(MAX_TEXT_BYTES + 1), ..message };
    assert!(Heartbeat::try_from(long).unwrap_err().to_string().contains("`phase`"));
}
