use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const SETTINGS: MembershipSettings = MembershipSettings {
    workers: 3,
    min_workers: 2,
    max_recoveries: 2,
    heartbeat_timeout: Duration::from_secs(10),
    coordinator_timeout: Duration::from_secs(40),
    join_timeout: Duration::from_secs(60),
    stop_timeout: Duration::from_secs(30),
};

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn join(membership: &mut Membership, seconds: u64, name: &str) -> Vec<Effect> {
    membership.step(at(seconds), Event::Join(Incarnation(name.into())))
}

fn ready(worker: u32, generation: u64) -> Event {
    Event::Ready { worker: WorkerId(worker), generation: Generation(generation), broken: None }
}

fn broken(worker: u32, generation: u64) -> Event {
    Event::Ready { worker: WorkerId(worker), generation: Generation(generation), broken: Some("peer lost".into()) }
}

fn formed(generation: u64, members: &[u32]) -> Effect {
    Effect::Formed { generation: Generation(generation), members: members.iter().copied().map(WorkerId).collect() }
}

fn running() -> Membership {
    let mut membership = Membership::new(SETTINGS);
    for (worker, name) in ["a", "b", "c"].into_iter().enumerate() {
        join(&mut membership, 1, name);
        membership.step(at(1), ready(worker as u32, 0));
    }
    membership
}

/// All but the lost one answer that they have left the generation.
fn survivors_ready(membership: &mut Membership, seconds: u64, generation: u64, workers: &[u32]) -> Vec<Effect> {
    workers.iter().flat_map(|&worker| membership.step(at(seconds), ready(worker, generation))).collect()
}

#[test]
fn the_last_ready_worker_forms_a_generation_with_dense_ranks() {
    let mut membership = Membership::new(SETTINGS);
    assert_eq!(join(&mut membership, 1, "a"), [Effect::Admitted(WorkerId(0))]);
    assert_eq!(join(&mut membership, 1, "a"), [Effect::Admitted(WorkerId(0))], "a retry is not a second worker");
    assert_eq!(membership.directive(WorkerId(0)), Directive::Wait);
    join(&mut membership, 1, "b");
    join(&mut membership, 1, "c");
    assert_eq!(join(&mut membership, 1, "d"), [Effect::Refused(Refusal::Full)]);
    assert_eq!(survivors_ready(&mut membership, 1, 0, &[2, 0]), []);
    assert_eq!(membership.step(at(1), ready(1, 0)), [formed(1, &[0, 1, 2])]);
    let run = Directive::Run { generation: Generation(1), rank: Rank(2), world_size: 3, call: Call::Continue };
    assert_eq!(membership.directive(WorkerId(2)), run);
    assert_eq!(membership.step(at(2), ready(1, 0)), [], "a late retry does not take it out of the generation");
}

#[test]
fn survivors_of_a_lost_worker_form_the_next_generation() {
    let mut membership = running();
    let loss = Loss { worker: WorkerId(0), rank: Rank(0), cause: LossCause::Disconnected };
    let effects = membership.step(at(2), Event::Disconnected(WorkerId(0)));
    assert_eq!(effects, [Effect::Lost(loss.clone()), Effect::Regrouping(RegroupCause::Lost(loss))]);
    assert_eq!(membership.directive(WorkerId(1)), Directive::Regroup(Generation(1)));
    assert_eq!(membership.directive(WorkerId(0)), Directive::Unknown, "it may join again");
    assert_eq!(membership.step(at(2), broken(2, 1)), []);
    assert_eq!(membership.directive(WorkerId(2)), Directive::Wait);
    assert_eq!(membership.step(at(2), ready(1, 1)), [formed(2, &[1, 2])]);
    let run = Directive::Run { generation: Generation(2), rank: Rank(0), world_size: 2, call: Call::Continue };
    assert_eq!(membership.directive(WorkerId(1)), run);
}

#[test]
fn a_silent_member_is_lost_with_its_name() {
    let mut membership = running();
    for worker in [0, 2] {
        membership.step(at(10), Event::Heartbeat(WorkerId(worker)));
    }
    assert_eq!(membership.step(at(11), Event::Tick), []);
    let effects = membership.step(at(12), Event::Tick);
    let Effect::Lost(loss) = &effects[0] else { panic!("{effects:?}") };
    assert_eq!(loss.to_string(), "rank 1 (worker 1) was lost: no heartbeat for 11 s");
}

#[test]
fn a_broken_collective_regroups_everybody_without_a_loss() {
    let mut membership = running();
    let effects = membership.step(at(2), broken(1, 1));
    assert!(matches!(&effects[..], [Effect::Regrouping(RegroupCause::Broken { rank: Rank(1), .. })]), "{effects:?}");
    assert_eq!(survivors_ready(&mut membership, 3, 1, &[0, 2]), [formed(2, &[0, 1, 2])]);
}

#[test]
fn a_newcomer_takes_part_after_a_step_boundary() {
    let mut membership = running();
    membership.step(at(2), Event::Disconnected(WorkerId(2)));
    survivors_ready(&mut membership, 2, 1, &[0, 1]);
    assert_eq!(join(&mut membership, 3, "d"), [Effect::Admitted(WorkerId(3))]);
    assert!(
        matches!(membership.directive(WorkerId(0)), Directive::Run { call: Call::Continue, .. }),
        "nobody waits while it prepares"
    );
    assert_eq!(membership.step(at(4), ready(3, 0)), []);
    assert!(matches!(membership.directive(WorkerId(0)), Directive::Run { call: Call::Regroup, .. }));
    assert_eq!(membership.step(at(4), ready(0, 2)), []);
    assert!(
        matches!(membership.directive(WorkerId(1)), Directive::Run { call: Call::Regroup, .. }),
        "the other finishes its step, too"
    );
    assert_eq!(membership.step(at(5), ready(1, 2)), [formed(3, &[0, 1, 3])]);
}

#[test]
fn scaling_down_dismisses_the_last_ranks_and_up_lets_more_in() {
    let mut membership = running();
    assert_eq!(membership.step(at(2), Event::Scale(2)), []);
    let effects = survivors_ready(&mut membership, 3, 1, &[0, 1, 2]);
    assert_eq!(effects, [Effect::Dismissed(WorkerId(2)), formed(2, &[0, 1])]);
    assert_eq!(membership.directive(WorkerId(2)), Directive::Dismissed);
    assert_eq!(join(&mut membership, 4, "d"), [Effect::Refused(Refusal::Full)]);
    membership.step(at(5), Event::Scale(3));
    assert_eq!(join(&mut membership, 5, "d"), [Effect::Admitted(WorkerId(3))]);
    membership.step(at(6), Event::Scale(1));
    assert_eq!(membership.wanted(), 2, "never below min_workers");
}

#[test]
fn too_few_survivors_wait_for_others_and_then_save_what_they_hold() {
    let settings = MembershipSettings { heartbeat_timeout: at(500), ..SETTINGS };
    let lonely = || {
        let mut membership = Membership::new(settings);
        for (worker, name) in ["a", "b", "c"].into_iter().enumerate() {
            join(&mut membership, 1, name);
            membership.step(at(1), ready(worker as u32, 0));
        }
        membership.step(at(2), Event::Disconnected(WorkerId(1)));
        membership.step(at(2), Event::Disconnected(WorkerId(2)));
        assert_eq!(membership.step(at(2), ready(0, 1)), []);
        membership
    };
    let mut membership = lonely();
    join(&mut membership, 9, "d");
    assert_eq!(membership.step(at(10), ready(3, 0)), [formed(2, &[0, 3])]);

    let mut membership = lonely();
    let effects = membership.step(at(63), Event::Tick);
    let cause = StopCause::JoinDeadline { joined: 1, wanted: 2, seconds: 60 };
    assert_eq!(effects, [Effect::Stop(cause.clone()), formed(2, &[0])]);
    assert!(matches!(membership.directive(WorkerId(0)), Directive::Run { call: Call::Stop(_), .. }));
    let end = membership.step(at(64), Event::Leave(WorkerId(0), Departure::Stopped));
    assert_eq!(end, [Effect::Ended(Outcome::Stopped(cause))]);
}

#[test]
fn losing_everybody_ends_the_job_with_the_last_loss() {
    let mut membership = running();
    (0..3).for_each(|worker| drop(membership.step(at(9), Event::Heartbeat(WorkerId(worker)))));
    membership.step(at(10), Event::Disconnected(WorkerId(0)));
    membership.step(at(10), Event::Disconnected(WorkerId(1)));
    assert_eq!(
        membership.step(at(10), Event::Disconnected(WorkerId(2))),
        [],
        "it alone has the state: it may come back"
    );
    assert_eq!(membership.step(at(13), Event::Tick), []);
    let effects = membership.step(at(14), Event::Tick);
    let loss = Loss { worker: WorkerId(2), rank: Rank(2), cause: LossCause::Disconnected };
    let cause = StopCause::Lost(loss.clone());
    let end = [Effect::Lost(loss), Effect::Stop(cause.clone()), Effect::Ended(Outcome::Stopped(cause))];
    assert_eq!(effects, end);
}

#[test]
fn the_last_worker_may_lose_its_connection_for_a_moment() {
    let mut membership = running();
    membership.step(at(2), Event::Disconnected(WorkerId(0)));
    membership.step(at(2), Event::Disconnected(WorkerId(1)));
    membership.step(at(2), Event::Disconnected(WorkerId(2)));
    membership.step(at(4), Event::Heartbeat(WorkerId(2)));
    assert_eq!(membership.step(at(13), Event::Tick), []);
    assert_eq!(membership.directive(WorkerId(2)), Directive::Regroup(Generation(1)));
}

#[test]
fn when_nobody_is_heard_of_the_last_is_waited_for() {
    let mut membership = running();
    let lost = membership.step(at(12), Event::Tick);
    assert_eq!(lost.iter().filter(|effect| matches!(effect, Effect::Lost(_))).count(), 2);
    // its connection breaks later, as connections do that lead nowhere
    assert_eq!(membership.step(at(20), Event::Disconnected(WorkerId(2))), []);
    assert_eq!(membership.step(at(41), Event::Tick), []);
    let mut back = membership.clone();
    assert_eq!(back.step(at(41), ready(2, 1)), []);
    assert_eq!(join(&mut back, 41, "another start"), [Effect::Admitted(WorkerId(3))]);
    assert_eq!(back.step(at(42), ready(3, 0)), [formed(2, &[2, 3])]);
    let effects = membership.step(at(42), Event::Tick);
    assert!(matches!(&effects[0], Effect::Lost(Loss { cause: LossCause::Silent { seconds: 41 }, .. })), "{effects:?}");
}

#[test]
fn recoveries_without_a_step_end_a_hopeless_job() {
    let recover = |membership: &mut Membership, generation: u64| {
        let effects = membership.step(at(2), broken(0, generation));
        survivors_ready(membership, 2, generation, &[1, 2]);
        effects
    };
    let mut membership = running();
    recover(&mut membership, 1);
    membership.step(at(2), Event::Progress(Generation(2)));
    recover(&mut membership, 2);
    membership.step(at(2), Event::Progress(Generation(2)));
    recover(&mut membership, 3);
    let effects = recover(&mut membership, 4);
    let why = |effects: &[Effect]| matches!(&effects[0], Effect::Stop(StopCause::NoProgress { recoveries: 3, .. }));
    assert!(why(&effects) && matches!(&effects[1], Effect::Regrouping(RegroupCause::Stopping(_))), "{effects:?}");
    assert!(
        matches!(membership.directive(WorkerId(1)), Directive::Run { call: Call::Stop(_), .. }),
        "once more, to write down what they hold"
    );
    let effects = recover(&mut membership, 5);
    assert!(matches!(&effects[..], [Effect::Stop(StopCause::NoProgress { recoveries: 4, .. })]), "{effects:?}");
    assert!(matches!(membership.directive(WorkerId(1)), Directive::Stop(_)));
}

#[test]
fn one_that_does_not_let_go_is_lost() {
    let mut membership = running();
    membership.step(at(2), Event::Disconnected(WorkerId(0)));
    membership.step(at(2), ready(1, 1));
    for seconds in [10, 19, 28] {
        for worker in [1, 2] {
            membership.step(at(seconds), Event::Heartbeat(WorkerId(worker)));
        }
    }
    let effects = membership.step(at(33), Event::Tick);
    assert!(matches!(&effects[0], Effect::Lost(Loss { worker: WorkerId(2), cause: LossCause::Stuck { .. }, .. })));
    assert_eq!(membership.step(at(34), Event::Tick), [], "worker 1 waits for a second one");
}

#[test]
fn one_that_does_not_come_back_from_a_step_boundary_is_lost_too() {
    let mut membership = running();
    membership.step(at(2), Event::Scale(2));
    membership.step(at(3), ready(1, 1));
    for seconds in [10, 19, 28, 33] {
        for worker in [0, 1, 2] {
            membership.step(at(seconds), Event::Heartbeat(WorkerId(worker)));
        }
    }
    assert_eq!(membership.step(at(33), Event::Tick), []);
    let effects = membership.step(at(34), Event::Tick);
    assert!(matches!(&effects[0], Effect::Lost(Loss { worker: WorkerId(0), cause: LossCause::Stuck { .. }, .. })));
    assert_eq!(membership.directive(WorkerId(2)), Directive::Regroup(Generation(1)), "hard now");
}

#[test]
fn only_a_tick_looks_at_deadlines() {
    let mut membership = running();
    assert_eq!(membership.step(at(99), Event::Progress(Generation(1))), [], "no loss gets lost among other effects");
    assert_eq!(membership.step(at(99), Event::Join(Incarnation("d".into()))), [Effect::Refused(Refusal::Full)]);
    assert!(matches!(membership.step(at(99), Event::Tick)[0], Effect::Lost(_)));
}

#[test]
fn all_done_is_finished_and_waits_for_the_slowest() {
    let mut membership = running();
    for worker in [2, 0] {
        assert_eq!(membership.step(at(2), Event::Leave(WorkerId(worker), Departure::Done)), []);
    }
    // the ones that are done are not missed
    membership.step(at(11), Event::Heartbeat(WorkerId(1)));
    membership.step(at(12), Event::Disconnected(WorkerId(0)));
    assert_eq!(membership.step(at(15), Event::Tick), []);
    let end = membership.step(at(16), Event::Leave(WorkerId(1), Departure::Done));
    assert_eq!(end, [Effect::Ended(Outcome::Finished)]);
    assert_eq!(membership.directive(WorkerId(1)), Directive::Dismissed);
}

#[test]
fn what_befalls_the_others_when_one_is_done_takes_nothing_away() {
    let ends: [fn(&mut Membership) -> Vec<Effect>; 3] = [
        |membership| membership.step(at(2), broken(2, 1)),
        |membership| membership.step(at(2), Event::Disconnected(WorkerId(0))),
        |membership| {
            membership.step(at(2), Event::Leave(WorkerId(2), Departure::Done));
            membership.step(at(2), Event::Leave(WorkerId(0), Departure::Crashed("x".into())))
        },
    ];
    for end in ends {
        let mut membership = running();
        membership.step(at(2), Event::Leave(WorkerId(1), Departure::Done));
        assert_eq!(end(&mut membership).last(), Some(&Effect::Ended(Outcome::Finished)));
        assert_eq!(membership.directive(WorkerId(2)), Directive::Dismissed);
    }
}

#[test]
fn a_job_that_cannot_gather_ends_with_the_reason() {
    let message = || "worker process 1 ended with exit code 1".to_owned();
    let cause = StopCause::NeverJoined { message: message() };
    let mut membership = Membership::new(SETTINGS);
    join(&mut membership, 0, "a");
    let ended = membership.step(at(1), Event::NeverJoined(message()));
    assert_eq!(ended, [Effect::Ended(Outcome::Stopped(cause.clone()))]);
    assert_eq!(cause.to_string(), message());
    // all have joined in the meantime, by whatever way: nothing is thrown away
    let mut membership = running();
    assert_eq!(membership.step(at(2), Event::NeverJoined(message())), [Effect::Stop(cause)]);
    assert!(matches!(membership.directive(WorkerId(1)), Directive::Run { call: Call::Stop(_), .. }));
}

#[test]
fn an_operator_stop_is_graceful_even_through_a_loss() {
    let mut membership = running();
    assert_eq!(membership.step(at(2), Event::OperatorStop), [Effect::Stop(StopCause::Operator)]);
    assert!(matches!(membership.directive(WorkerId(1)), Directive::Run { call: Call::Stop(_), .. }));
    assert_eq!(join(&mut membership, 2, "d"), [Effect::Refused(Refusal::Over)]);
    membership.step(at(3), Event::Disconnected(WorkerId(0)));
    assert_eq!(survivors_ready(&mut membership, 3, 1, &[1, 2]), [formed(2, &[1, 2])]);
    assert!(matches!(membership.directive(WorkerId(1)), Directive::Run { call: Call::Stop(_), .. }));
    membership.step(at(4), Event::Leave(WorkerId(1), Departure::Stopped));
    let end = membership.step(at(4), Event::Leave(WorkerId(2), Departure::Stopped));
    assert!(matches!(&end[..], [Effect::Ended(Outcome::Stopped(StopCause::Operator))]), "{end:?}");
}

#[test]
fn a_failure_that_others_would_repeat_stops_when_the_others_have_saved() {
    let failed = |message: &str| Departure::Failed(message.into());
    let mut membership = running();
    let effects = membership.step(at(3), Event::Leave(WorkerId(1), failed("no memory")));
    assert!(matches!(&effects[0], Effect::Stop(StopCause::Failed { message, .. }) if message == "no memory"));
    assert_eq!(survivors_ready(&mut membership, 3, 1, &[0, 2]), [formed(2, &[0, 2])]);
    assert!(matches!(membership.directive(WorkerId(2)), Directive::Run { call: Call::Stop(_), .. }));
    membership.step(at(4), Event::Leave(WorkerId(0), Departure::Stopped));
    let end = membership.step(at(4), Event::Leave(WorkerId(2), Departure::Stopped));
    assert!(matches!(&end[..], [Effect::Ended(Outcome::Stopped(StopCause::Failed { rank: Rank(1), .. }))]), "{end:?}");

    let mut membership = running();
    for worker in [1, 0] {
        membership.step(at(3), Event::Leave(WorkerId(worker), failed("no such file")));
    }
    let end = membership.step(at(4), Event::Leave(WorkerId(2), failed("no such file")));
    assert!(matches!(end.last(), Some(Effect::Ended(Outcome::Stopped(StopCause::Failed { .. })))), "{end:?}");
}

#[test]
fn a_checkpoint_that_could_not_be_written_counts_whoever_leaves_first() {
    let gave_up = || Departure::GaveUp(GiveUp::Unsaved, "disk full".into());
    for order in [[0, 1, 2], [1, 0, 2], [1, 2, 0]] {
        let mut membership = running();
        for worker in order {
            let departure = if worker == 0 { gave_up() } else { Departure::Done };
            membership.step(at(2), Event::Leave(WorkerId(worker), departure));
        }
        let cause = StopCause::GaveUp { why: GiveUp::Unsaved, message: "disk full".into() };
        assert_eq!(membership.state(), &State::Ended(Outcome::Stopped(cause)), "{order:?}");
    }
}

#[test]
fn a_job_that_is_given_up_says_why() {
    let mut membership = running();
    membership.step(at(2), Event::OperatorStop);
    for worker in [1, 0, 2] {
        membership.step(at(3), Event::Leave(WorkerId(worker), Departure::GaveUp(GiveUp::Unsaved, "disk full".into())));
    }
    let cause = StopCause::GaveUp { why: GiveUp::Unsaved, message: "disk full".into() };
    assert_eq!(membership.state(), &State::Ended(Outcome::Stopped(cause)));
}

#[test]
fn a_job_whose_workers_never_come_ends() {
    let mut membership = Membership::new(SETTINGS);
    join(&mut membership, 58, "a");
    let end = membership.step(at(61), Event::Tick);
    let cause = StopCause::JoinDeadline { joined: 1, wanted: 3, seconds: 60 };
    assert_eq!(end, [Effect::Ended(Outcome::Stopped(cause))]);
}

#[test]
fn a_taken_over_membership_goes_on_with_a_new_clock() {
    let mut membership = running();
    membership.step(at(900), Event::Heartbeat(WorkerId(0)));
    let stored = serde_json::to_string(&running()).unwrap();
    let mut membership: Membership = serde_json::from_str(&stored).unwrap();
    membership.restart_clock(at(0));
    assert_eq!(membership.step(at(9), Event::Tick), []);
    let run = Directive::Run { generation: Generation(1), rank: Rank(2), world_size: 3, call: Call::Continue };
    assert_eq!(membership.directive(WorkerId(2)), run);
}

fn event() -> impl Strategy<Value = (u64, Event)> {
    let worker = || (0_u32..9).prop_map(WorkerId);
    let departure = prop_oneof![
        2 => Just(Departure::Done),
        1 => Just(Departure::Stopped),
        1 => Just(Departure::Failed("x".into())),
        2 => Just(Departure::Crashed("y".into())),
    ];
    let left = (worker(), 0_u64..5, any::<bool>()).prop_map(|(worker, generation, broke)| Event::Ready {
        worker,
        generation: Generation(generation),
        broken: broke.then(|| "z".into()),
    });
    let event = prop_oneof![
        6 => "[a-i]".prop_map(|name| Event::Join(Incarnation(name))),
        12 => left,
        3 => worker().prop_map(Event::Heartbeat),
        3 => worker().prop_map(Event::Disconnected),
        2 => (worker(), departure).prop_map(|(worker, departure)| Event::Leave(worker, departure)),
        2 => (1_u32..6).prop_map(Event::Scale),
        2 => (0_u64..5).prop_map(|generation| Event::Progress(Generation(generation))),
        1 => Just(Event::OperatorStop),
        1 => Just(Event::NeverJoined("no GPU".into())),
        3 => Just(Event::Tick),
    ];
    (0_u64..5, event)
}

proptest! {
    #[test]
    fn no_two_generations_live_at_once_and_every_history_has_a_way_on(
        events in prop::collection::vec(event(), 0..120),
    ) {
        let mut membership = Membership::new(SETTINGS);
        // who was told to run which generation, and has not said that it left
        let mut inside: BTreeMap<WorkerId, Generation> = BTreeMap::new();
        let mut now = 0;
        let mut count = 0;
        let mut ended = 0;
        let mut watch = |membership: &Membership, effects: Vec<Effect>, inside: &mut BTreeMap<WorkerId, Generation>| {
            for effect in effects {
                if let Effect::Formed { generation, members } = effect {
                    count += 1;
                    prop_assert_eq!(generation, Generation(count));
                    let distinct: BTreeSet<_> = members.iter().copied().collect();
                    prop_assert_eq!(distinct.len(), members.len(), "a worker has one rank");
                    let known = membership.members().cloned().unwrap_or_default();
                    for (worker, old) in inside.iter() {
                        prop_assert!(!known.contains_key(worker), "worker {} is still in generation {}", worker, old);
                    }
                    inside.clear();
                    inside.extend(members.iter().map(|&worker| (worker, generation)));
                } else if let Effect::Ended(_) = effect {
                    ended += 1;
                }
            }
            let ranks: Vec<u32> = inside.keys().filter_map(|&worker| match membership.directive(worker) {
                Directive::Run { generation, rank, .. } => {
                    assert_eq!(generation, membership.generation(), "the only one that runs");
                    Some(rank.0)
                }
                _ => None,
            }).collect();
            let distinct: BTreeSet<_> = ranks.iter().collect();
            prop_assert!(distinct.len() == ranks.len() && ranks.iter().all(|&rank| rank < membership.world_size()));
            Ok(())
        };
        for (pause, event) in events {
            now += pause;
            match &event {
                Event::Ready { worker, generation, .. } if inside.get(worker) == Some(generation) => {
                    inside.remove(worker);
                }
                Event::Leave(worker, _) => drop(inside.remove(worker)),
                _ => {}
            }
            let effects = membership.step(at(now), event);
            watch(&membership, effects, &mut inside)?;
        }
        // workers that do as they are told bring every history to its end
        for round in 0..400 {
            now += 1;
            let workers: Vec<WorkerId> = membership.members().into_iter().flatten().map(|(&worker, _)| worker).collect();
            for worker in workers {
                let generation = membership.generation();
                let answer = match membership.directive(worker) {
                    Directive::Wait => Event::Ready { worker, generation: Generation(0), broken: None },
                    Directive::Regroup(_) => Event::Ready { worker, generation, broken: Some("aborted".into()) },
                    Directive::Run { call: Call::Regroup, .. } => Event::Ready { worker, generation, broken: None },
                    Directive::Run { call: Call::Stop(_), .. } => Event::Leave(worker, Departure::Stopped),
                    Directive::Run { call: Call::Continue, .. } if round > 200 => Event::Leave(worker, Departure::Done),
                    Directive::Run { call: Call::Continue, .. } => Event::Heartbeat(worker),
                    Directive::Stop(_) => Event::Leave(worker, Departure::Failed("aborted".into())),
                    Directive::Dismissed | Directive::Unknown => continue,
                };
                let mut effects = membership.step(at(now), Event::Heartbeat(worker));
                if !matches!(answer, Event::Heartbeat(_)) {
                    inside.remove(&worker);
                }
                effects.extend(membership.step(at(now), answer));
                watch(&membership, effects, &mut inside)?;
            }
            let effects = membership.step(at(now), Event::Tick);
            watch(&membership, effects, &mut inside)?;
        }
        prop_assert_eq!(ended, 1);
        prop_assert!(matches!(membership.state(), State::Ended(_)));
    }

    #[test]
    fn silence_alone_ends_every_history(events in prop::collection::vec(event(), 0..60)) {
        let mut membership = Membership::new(SETTINGS);
        let mut now = 0;
        for (pause, event) in events {
            now += pause;
            membership.step(at(now), event);
        }
        for _ in 0..20 {
            now += 61;
            membership.step(at(now), Event::Tick);
        }
        prop_assert!(matches!(membership.state(), State::Ended(_)), "{:?}", membership.state());
    }
}

#[test]
fn every_cause_of_a_loss_has_a_label_that_is_listed() {
    let causes = [
        LossCause::Silent { seconds: 1 },
        LossCause::Disconnected,
        LossCause::Crashed { message: "gone".into() },
        LossCause::Stuck { seconds: 1 },
        LossCause::Stalled { phase: Phase::Loss, seconds: 1 },
    ];
    assert_eq!(causes.map(|cause| cause.label()), LossCause::LABELS);
}
