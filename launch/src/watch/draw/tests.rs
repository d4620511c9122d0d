use std::path::Path;

use learn_domain::Phase;
use learn_domain::event::{Happening, JobEvent};
use learn_domain::ids::{Generation, Rank, Step, WorkerId};
use learn_domain::membership::LossCause;
use learn_domain::report::{JobState, JobStatus};
use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::Color;

use super::*;
use crate::render::Freshness;
use crate::watch::scene::Scene;
use crate::watch::tests::{NOW, evaluation, scene, worker};
use crate::watch::view::view;

fn drawn(scene: &Scene, choice: &Choice, (width, height): (u16, u16), colour: bool) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let view = view("shop", scene, choice.newest);
    terminal.draw(|frame| draw(frame, &view, choice, Look { colour })).unwrap();
    terminal.backend().buffer().clone()
}

fn text(buffer: &Buffer) -> String {
    let row = |y| (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|y| row(y).trim_end().to_owned() + "\n").collect()
}

fn screen(scene: &Scene, pane: Pane, size: (u16, u16)) -> String {
    text(&drawn(scene, &Choice { pane, ..Choice::default() }, size, true))
}

fn changed(change: impl FnOnce(&mut JobStatus)) -> Scene {
    let mut scene = scene();
    change(&mut scene.current.as_mut().unwrap().status);
    scene
}

fn lagging() -> Scene {
    changed(|status| {
        status.stall = None;
        (status.workers[1].seconds_in_phase, status.workers[1].step) = (0.1, Step(1200));
    })
}

/// A worker was lost four seconds ago; the others go on, and another came in its place.
fn lost() -> Scene {
    let mut scene = changed(|status| {
        (status.stall, status.generation, status.world_size) = (None, Generation(3), 3);
        (status.workers[1].seconds_in_phase, status.workers[1].step, status.workers[1].work_ratio) =
            (0.1, Step(1200), Some(1.01));
        let lost = &mut status.workers[3];
        (lost.rank, lost.phase, lost.left, lost.work_ratio) = (None, Phase::Lost, true, None);
        (lost.seconds_since_heartbeat, lost.step) = (4.0, Step(1197));
        let mut comes = worker(4, Phase::Starting, 1.0);
        (comes.rank, comes.work_ratio, comes.step, comes.seconds_in_phase) = (None, None, Step(0), 2.0);
        status.workers.push(comes);
    });
    let event =
        |ago: f64, generation, happening| JobEvent { time: NOW - ago, generation: Generation(generation), happening };
    let lost = Happening::WorkerLost { worker: WorkerId(3), rank: Rank(3), cause: LossCause::Disconnected };
    scene.events.push(event(4.0, 2, lost));
    scene.events.push(event(3.0, 3, Happening::Formed { world_size: 3 }));
    scene.gauges.remove(&WorkerId(3));
    scene
}

fn evaluating() -> Scene {
    changed(|status| {
        status.stall = None;
        status.evaluations.insert(0, evaluation(200, 0.0512));
        for worker in &mut status.workers {
            (worker.phase, worker.seconds_in_phase, worker.step) = (Phase::Evaluation, 3.2, Step(1200));
        }
    })
}

fn ended() -> Scene {
    let mut scene = changed(|status| {
        (status.state, status.stall) = (JobState::Finished, None);
        status.total_steps = 1200;
        status.last_checkpoint = Some(Step(1200));
        status.evaluations.push(evaluation(1200, 0.0913));
        for worker in &mut status.workers {
            (worker.phase, worker.left, worker.rank, worker.step) = (Phase::Done, true, None, Step(1200));
            worker.seconds_since_heartbeat = 12.0;
        }
    });
    scene.current.as_mut().unwrap().freshness = Freshness::Ended;
    scene.gauges.clear();
    scene
}

/// The screens to the letter; `UPDATE=1` writes them.
#[test]
fn screens_are_as_they_were_approved() {
    let screens = [
        ("starting-80x24", screen(&Scene::default(), Pane::All, (80, 24))),
        ("lagging-110x34", screen(&lagging(), Pane::All, (110, 34))),
        ("stalled-80x24", screen(&scene(), Pane::All, (80, 24))),
        ("lost-100x28", screen(&lost(), Pane::All, (100, 28))),
        ("evaluation-80x30", screen(&evaluating(), Pane::All, (80, 30))),
        ("ended-80x24", screen(&ended(), Pane::All, (80, 24))),
        ("phone-60x20", screen(&lagging(), Pane::All, (60, 20))),
        ("wide-160x50", screen(&lagging(), Pane::All, (160, 50))),
        ("curves-80x24", screen(&lagging(), Pane::Curves, (80, 24))),
        ("ranks-160x20", screen(&lost(), Pane::Ranks, (160, 20))),
        ("events-80x24", screen(&lost(), Pane::Events, (80, 24))),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/watch/draw/screens");
    for (name, drawn) in screens {
        let path = folder.join(name).with_extension("txt");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &drawn).unwrap();
        }
        let approved = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(drawn == approved, "{name} has changed; UPDATE=1 if that is meant:\n{drawn}");
    }
}

#[test]
fn nothing_is_told_by_colour_alone() {
    let choice = Choice::default();
    let (coloured, plain) = (drawn(&lost(), &choice, (110, 34), true), drawn(&lost(), &choice, (110, 34), false));
    assert_eq!(text(&coloured), text(&plain));
    assert!(plain.content().iter().all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset));
    let lines = text(&plain);
    let place = lines.lines().position(|line| line.contains("was 3")).unwrap();
    assert!(lines.lines().nth(place).unwrap().starts_with("✖ was 3"), "{lines}");
    let cell = &coloured[(2, place as u16)];
    assert_eq!((cell.fg, plain[(2, place as u16)].modifier), (Color::Red, Modifier::BOLD));
    let lag = drawn(&lagging(), &choice, (110, 34), true);
    let lines = text(&lag);
    let place = lines.lines().position(|line| line.contains("1.62x data")).unwrap();
    assert_eq!((lag[(0, place as u16)].symbol(), lag[(0, place as u16)].fg), ("▲", Color::Yellow));
}

#[test]
fn how_to_leave_and_what_that_does_is_on_every_screen() {
    for size in [LEAST, (60, 20), (80, 24), (160, 50)] {
        for pane in Pane::EACH {
            for scene in [scene(), lagging()] {
                let going = screen(&scene, pane, size);
                assert!(going.contains("q leave, the job goes on"), "{size:?}, {pane:?}:\n{going}");
                assert!(going.contains("shop running") && going.contains("step 1,200 of 4,000"), "{going}");
            }
            assert!(screen(&ended(), pane, size).contains("q leave: the job has ended"), "{size:?}, {pane:?}");
        }
    }
    let paused = Choice { paused: true, newest: true, ..Choice::default() };
    let paused = text(&drawn(&scene(), &paused, (100, 30), true));
    for part in ["[paused: p goes on]", "p go on", "z whole curve", "from step 1,001"] {
        assert!(paused.contains(part), "{part} is not in:\n{paused}");
    }
}

#[test]
fn a_thousand_ranks_are_scrolled() {
    let many = changed(|status| {
        status.stall = None;
        status.workers = (0..1000).map(|number| worker(number, Phase::Gather, 1.0)).collect();
    });
    let at = |scroll| {
        let choice = Choice { pane: Pane::Ranks, scroll, ..Choice::default() };
        text(&drawn(&many, &choice, (100, 24), true))
    };
    // rank 1 lags, and is the first
    assert!(at(0).contains(" ranks 1 to 19 of 1000 "), "{}", at(0));
    assert!(at(500).contains("\n  500  node1") && at(500).contains("ranks 501 to 519"), "{}", at(500));
    assert!(
        at(999).contains("ranks 982 to 1000") && at(999).contains("\n  999  node1"),
        "the last page is full: {}",
        at(999)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_size_can_be_drawn(
        width in 1..220_u16,
        height in 1..80_u16,
        pane in prop::sample::select(Pane::EACH.to_vec()),
        scroll in 0..20_usize,
        kind in 0..5_usize,
    ) {
        let scene = [Scene::default as fn() -> Scene, scene, lost, evaluating, ended][kind]();
        let choice = Choice { pane, scroll, ..Choice::default() };
        let text = text(&drawn(&scene, &choice, (width, height), true));
        if kind > 0 && width >= LEAST.0 && height >= LEAST.1 {
            prop_assert!(text.starts_with(if kind == 4 { "● shop finished" } else { "● shop running" }), "{}", text);
        }
    }
}
