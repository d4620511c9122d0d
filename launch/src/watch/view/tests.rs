use learn_domain::Phase;
use learn_domain::ids::{Generation, Rank, Step, WorkerId};
use learn_domain::membership::LossCause;

use super::*;
use crate::watch::tests::{NOW, scene, worker};

fn changed(change: impl FnOnce(&mut JobStatus)) -> Scene {
    let mut scene = scene();
    change(&mut scene.current.as_mut().unwrap().status);
    scene
}

fn seen(scene: &Scene) -> View {
    view("run-7", scene, false)
}

#[test]
fn what_somebody_should_look_at_comes_first() {
    let view = seen(&scene());
    assert_eq!((view.name.as_str(), view.state.as_str(), view.tone), ("shop", "running", Tone::Good));
    assert_eq!((view.steps.as_str(), view.epoch.as_str()), ("step 1,200 of 4,000", "epoch 3 of 10"));
    assert_eq!(view.left, "21m 00s left");
    assert_eq!(view.facts, ["generation 2", "4 workers", "shop: 102,400 users, 20,033 items"]);
    assert!(view.alarm.as_deref().unwrap().contains("rank 1 (worker 1) holds the others up"));
    assert_eq!(view.ranks.iter().map(|row| row.rank.as_str()).collect::<Vec<_>>(), ["1", "0", "2", "3"]);
    let row = &view.ranks[0];
    assert_eq!((row.tone, row.step.as_str(), row.since.as_str()), (Tone::Bad, "1,199 (-1)", "31s"));
    assert_eq!((row.lag.as_str(), row.own_time.as_str(), row.step_time.as_str()), ("1.62x data", "350 ms", "412 ms"));
    assert_eq!(row.memory, "1.16 GiB");
    assert!(view.events[0].text.starts_with("rank 1 lags"), "the newest event is the first");
    assert_eq!(view.evaluations.iter().map(|row| row.best).collect::<Vec<_>>(), [true, false]);
    assert_eq!(view.metrics, ["ndcg@10", "recall@10", "mrr"], "what the best is best by comes first");
    assert_eq!(view.held_out.title, "ndcg@10 0.0439, best 0.0439 at 800");
    assert_eq!((view.held_out.line.len(), view.held_out.best.map(|best| best.0)), (2, Some(800.0)));
    let rates: Vec<_> = view.rates.iter().map(|rate| (rate.name, rate.now.as_str())).collect();
    assert_eq!(rates, [("users/s", "640"), ("tokens/s", "37,500")]);
    assert_eq!((view.checkpoints[0].step.as_str(), view.checkpoints[0].best), ("800", true));
    assert!(view.loss.line.first().unwrap().1 > view.loss.line.last().unwrap().1 && !view.over);
}

#[test]
fn a_rank_lags_until_it_keeps_up_or_ranks_are_given_anew() {
    let mut scene = changed(|status| status.stall = None);
    let tones = |scene: &Scene| seen(scene).ranks.iter().map(|row| row.tone).collect::<Vec<_>>();
    assert_eq!(tones(&scene), [Tone::Warn, Tone::Plain, Tone::Plain, Tone::Plain]);
    let event = |happening| JobEvent { time: NOW, generation: Generation(2), happening };
    for end in [Happening::KeepsUp { rank: Rank(1), ratio: 1.1 }, Happening::Formed { world_size: 4 }] {
        let mut better = scene.clone();
        better.events.push(event(end));
        assert_eq!(tones(&better), [Tone::Plain; 4]);
        assert_eq!(seen(&better).ranks[1].lag, "1.62x", "the ratio is there, and its cause is not");
    }
    scene.current.as_mut().unwrap().status.workers[2].seconds_since_heartbeat = 7.6;
    assert_eq!(seen(&scene).ranks[0].rank, "2", "half of the time after which it would be lost");
    assert_eq!(tones(&scene)[..2], [Tone::Bad, Tone::Warn]);
}

#[test]
fn a_lost_worker_is_news_at_first_and_then_goes_to_the_end() {
    let lose = |ago: f64| {
        let mut scene = changed(|status| {
            status.stall = None;
            let lost = &mut status.workers[3];
            (lost.rank, lost.phase, lost.left) = (None, Phase::Lost, true);
            lost.seconds_since_heartbeat = ago;
            status.workers.push(worker(4, Phase::Gather, 1.0));
            status.workers[4].rank = Some(Rank(3));
        });
        let happening = Happening::WorkerLost { worker: WorkerId(3), rank: Rank(3), cause: LossCause::Disconnected };
        scene.events.push(JobEvent { time: NOW - ago, generation: Generation(2), happening });
        scene
    };
    let view = seen(&lose(4.0));
    let row = &view.ranks[0];
    assert_eq!(
        (row.tone, row.rank.as_str(), row.phase.as_str(), row.heard.as_str()),
        (Tone::Bad, "was 3", "lost", "4s ago")
    );
    assert_eq!((row.worker, row.memory.as_str()), (None, "-"), "nobody asks it any more");
    let mut comes = lose(4.0);
    let newcomer = &mut comes.current.as_mut().unwrap().status.workers[4];
    (newcomer.rank, newcomer.step) = (None, Step(0));
    assert_eq!(seen(&comes).ranks.last().unwrap().step, "0", "who has no rank yet is not behind");
    let view = seen(&lose(400.0));
    let row = view.ranks.last().unwrap();
    assert_eq!((row.tone, row.rank.as_str()), (Tone::Faint, "was 3"));
    let gone = changed(|status| {
        status.workers.extend((10..50).map(|number| {
            let mut gone = worker(number, Phase::Lost, 1.0);
            (gone.rank, gone.left, gone.seconds_since_heartbeat) = (None, true, 900.0);
            gone
        }));
    });
    assert_eq!(seen(&gone).ranks.len(), 4 + 8);
    assert_eq!(seen(&gone).ranks[4].worker, None);
}

#[test]
fn a_job_that_begins_fails_or_was_left_is_told_so() {
    let begins = seen(&Scene::default());
    assert_eq!((begins.name.as_str(), begins.state.as_str()), ("run-7", "starting"));
    assert_eq!((begins.loss.empty.as_str(), begins.ranks.len()), ("no finished step yet", 0));
    let mut failed = changed(|status| {
        (status.state, status.stall) = (JobState::Failed, None);
        status.cause = Some("worker 1 was silent for 15 s".into());
    });
    failed.current.as_mut().unwrap().freshness = Freshness::Ended;
    let view = seen(&failed);
    assert_eq!((view.tone, view.over, view.left.as_str()), (Tone::Bad, true, ""));
    assert!(view.running_for.starts_with("ran ") && view.ranks.iter().all(|row| row.heard == "-"), "{view:?}");
    assert_eq!(view.alarm.as_deref(), Some("worker 1 was silent for 15 s"));
    let mut left = scene();
    left.current.as_mut().unwrap().freshness = Freshness::Stale;
    let view = seen(&left);
    assert_eq!((view.state.as_str(), view.tone), ("running, stale", Tone::Bad));
    assert!(view.ranks.iter().all(|row| row.heard == "-"), "{view:?}");
    assert!(view.alarm.unwrap().contains("learn-launch resume"));
    let early = changed(|status| (status.evaluations, status.best) = (vec![], None));
    assert_eq!(seen(&early).held_out.empty, "no evaluation yet; an epoch has 400 steps");
    let growing = changed(|status| (status.wanted_workers, status.restarts) = (6, 2));
    assert_eq!(seen(&growing).facts[1..3], ["4 workers of 6 wanted", "restart 2"]);
}

#[test]
fn the_newest_part_of_a_run_can_be_had_alone() {
    let whole = seen(&scene());
    let newest = view("x", &scene(), true);
    assert_eq!((whole.loss.line[0].0, newest.loss.line[0].0), (4.0, 1001.0));
    assert!(newest.loss.title.ends_with("from step 1,001"));
    assert_eq!((newest.held_out.line.len(), newest.held_out.empty.as_str()), (0, "no evaluation in these steps"));
    assert_eq!(newest.held_out.best, None);
    assert_eq!(newest.ranks, whole.ranks);
    let short = changed(|status| status.last_step.as_mut().unwrap().step = Step(3));
    assert_eq!(seen(&short).steps, "step 3 of 4,000");
}
