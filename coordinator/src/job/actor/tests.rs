//! Commands one by one, in time that stands still but for what a test lets pass. The owner's loop does not run.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use learn_domain::{Incarnation, Phase};

use super::*;
use crate::job::tests;
use crate::state::StateFile;

/// What the owner writes into, and the owner.
async fn owner(job: Job) -> ((tempfile::TempDir, mpsc::Receiver<Entry>), JobOwner) {
    let folder = tempfile::tempdir().unwrap();
    let state = StateFile::create(&folder.path().join("coordinator.redb")).unwrap();
    let (journal, entries) = mpsc::channel(QUEUE);
    let parts = OwnerParts {
        task: Task::Train { resume_from: None },
        keeping: Keeping { state, journal, written: Arc::new(AtomicU64::new(0)) },
        metrics: CoordinatorMetrics::new(STATES),
        store: Store::default(),
        earlier: Duration::ZERO,
        taken_over: false,
    };
    let (_handle, owner) = JobOwner::new(job, parts).await.unwrap();
    ((folder, entries), owner)
}

/// Has a command taken whose answer nobody wants.
fn take<T>(owner: &mut JobOwner, command: impl FnOnce(Reply<T>) -> Command) {
    let (reply, _answer) = oneshot::channel();
    owner.take(command(reply)).unwrap();
}

/// Gives the number of the attendance.
fn attend(owner: &mut JobOwner, worker: u32) -> u64 {
    let number = owner.attendances.next();
    take(owner, |reply| Command::Attend(WorkerId(worker), reply));
    number
}

fn beat(owner: &mut JobOwner, worker: u32) {
    let (worker, generation, phase) = (WorkerId(worker), Generation(1), Phase::Forward);
    let beat = Heartbeat { worker, generation, phase, ..Heartbeat::default() };
    take(owner, |reply| Command::Heartbeat(beat, reply));
}

fn disconnect(owner: &mut JobOwner, worker: u32, attendance: u64) {
    owner.take(Command::Disconnected(WorkerId(worker), attendance)).unwrap();
}

async fn stand_still(owner: &mut JobOwner) {
    tokio::time::advance(Duration::from_secs(9)).await;
    owner.stood_still();
    tokio::time::advance(Duration::from_millis(1)).await;
}

fn phases(owner: &JobOwner) -> Vec<Phase> {
    owner.job.status(owner.now()).workers.iter().map(|worker| worker.phase).collect()
}

#[tokio::test(start_paused = true)]
async fn after_a_stall_who_comes_back_is_kept_and_who_does_not_is_lost_heard_of_before_or_not() {
    let (_kept, mut owner) = owner(tests::running(4)).await;
    let attendances: Vec<u64> = (0..4).map(|worker| attend(&mut owner, worker)).collect();
    stand_still(&mut owner).await;
    // heartbeats that had come meanwhile are read first, then the ends of the connections
    for worker in 0..3 {
        beat(&mut owner, worker);
    }
    for worker in 1..4 {
        disconnect(&mut owner, worker, attendances[worker as usize]);
    }
    assert_eq!(owner.job.state(), JobState::Running, "all may come back");
    attend(&mut owner, 1);
    tokio::time::advance(Duration::from_millis(3200)).await;
    owner.miss_absent().unwrap();
    let lost: Vec<bool> = phases(&owner).iter().map(|phase| *phase == Phase::Lost).collect();
    assert_eq!(lost, [false, false, true, true], "long before they count as silent");
    assert_eq!(owner.job.state(), JobState::Regrouping);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_was_made_after_a_stall_breaks_like_any_other() {
    let (_kept, mut owner) = owner(tests::running(2)).await;
    let (first, second) = (attend(&mut owner, 0), attend(&mut owner, 1));
    stand_still(&mut owner).await;
    beat(&mut owner, 0);
    let again = attend(&mut owner, 1);
    disconnect(&mut owner, 1, second);
    assert_eq!(owner.job.state(), JobState::Running, "another took its place");
    disconnect(&mut owner, 1, again);
    assert_eq!((owner.job.state(), phases(&owner)[1]), (JobState::Regrouping, Phase::Lost));
    disconnect(&mut owner, 0, first);
    tokio::time::advance(Duration::from_millis(3200)).await;
    owner.miss_absent().unwrap();
    assert_eq!(phases(&owner)[0], Phase::Forward, "the last one may still come back");
}

#[tokio::test(start_paused = true)]
async fn effects_of_commands_that_are_answered_are_carried_out() {
    let ((_folder, mut entries), mut owner) = owner(Job::new(tests::settings(2))).await;
    for name in ["a", "b"] {
        let applicant = Applicant {
            incarnation: Incarnation(name.into()),
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
            metrics_url: String::new(),
        };
        take(&mut owner, |reply| Command::Join(applicant, reply));
    }
    for worker in [WorkerId(0), WorkerId(1)] {
        take(&mut owner, |reply| Command::Ready { worker, generation: Generation(0), broken: None, reply });
    }
    take(&mut owner, |reply| Command::Leave(WorkerId(1), Departure::Crashed("it broke".into()), reply));
    take(&mut owner, |reply| Command::Leave(WorkerId(9), Departure::Done, reply));
    take(&mut owner, |reply| Command::Ready { worker: WorkerId(0), generation: Generation(1), broken: None, reply });
    take(&mut owner, |reply| Command::Stop(Asked::ByCall, reply));
    owner.close_turn().await.unwrap();
    let metrics = owner.metrics.exposition.render();
    for line in ["learn_job_workers_joined_total 2", r#"learn_job_workers_lost_total{cause="crashed"} 1"#] {
        assert!(metrics.lines().any(|said| said == line), "{line} is not in\n{metrics}");
    }
    let mut events = String::new();
    while let Ok(entry) = entries.try_recv() {
        if let Entry::Line(_, line) = entry {
            events.push_str(&line.text);
        }
    }
    let told = ["\"formed\"", "\"worker_lost\"", "\"regrouping\""].map(|kind| events.matches(kind).count());
    assert_eq!(told, [2, 1, 1], "{events}");
}
