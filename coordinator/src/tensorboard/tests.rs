use learn_domain::Generation;
use learn_domain::event::Happening;
use learn_domain::report::Split;

use super::wire::Content;
use super::wire::tests::read_events;
use super::*;
use crate::files::{JsonLines, retain_lines};
use crate::journal::{Entry, Journal};

/// A run directory whose coordinators come and go.
struct Ground {
    folder: tempfile::TempDir,
    config: Config,
}

fn step(step: u64) -> Timed<StepRecord> {
    let record = StepRecord {
        step: Step(step),
        loss: 1.0 / step as f64,
        users: 16,
        tokens: 64,
        seconds: 0.5,
        cvr_loss: Some(0.25),
        ..StepRecord::default()
    };
    Timed { time: Some(1000.0 + step as f64), value: record }
}

fn evaluated(step: u64, split: Split) -> Timed<Evaluation> {
    let metrics = [("recall@10".to_owned(), 0.5)].into();
    let value = Evaluation {
        split,
        step: Step(step),
        epoch: 1,
        users: 9,
        metrics,
        seconds: 1.0,
        segments: vec![],
        comparisons: vec![],
    };
    Timed { time: Some(1000.25 + step as f64), value }
}

fn taken_over(time: f64) -> JobEvent {
    JobEvent { time, generation: Generation(3), happening: Happening::TakenOver }
}

impl Ground {
    fn new() -> Self {
        let mut config = Config::default();
        config.objective.cvr_weight = 2.0;
        Self { folder: tempfile::tempdir().unwrap(), config }
    }

    fn run_dir(&self) -> RunDir {
        RunDir::new(self.folder.path())
    }

    fn open(&self) -> TensorBoard {
        let lines = RunLines::now(&self.run_dir()).unwrap();
        TensorBoard::make(lines, &self.run_dir(), &self.config).unwrap()
    }

    /// Appends a line to its file, and `to` TensorBoard if a coordinator comes that far.
    fn line(&self, file: LineFile, value: &impl serde::Serialize, to: Option<&mut TensorBoard>) {
        let path = match file {
            LineFile::Steps => self.run_dir().metrics(),
            LineFile::Evaluations => self.run_dir().evaluations(),
            LineFile::Events => self.run_dir().events(),
        };
        JsonLines::open(path).unwrap().append(value).unwrap();
        if let Some(to) = to {
            to.add(&Line { file, text: serde_json::to_string(value).unwrap() }).unwrap();
        }
    }

    /// The one file, as bytes.
    fn file(&self) -> (PathBuf, Vec<u8>) {
        let [path] = event_files(&self.run_dir().tensorboard()).unwrap().try_into().unwrap();
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    }

    /// (step, time, value) of a tag.
    fn points(&self, tag: &str) -> Vec<(i64, f64, f32)> {
        let events = read_events(&self.file().1);
        let mut points = Vec::new();
        for event in events {
            let Some(What::Summary(summary)) = event.what else { continue };
            for value in summary.value.into_iter().filter(|value| value.tag == tag) {
                if let Some(Content::Scalar(scalar)) = value.content {
                    points.push((event.step, event.wall_time, scalar));
                }
            }
        }
        points
    }
}

#[test]
fn steps_evaluations_and_events_become_points_at_their_times() {
    let ground = Ground::new();
    let mut board = ground.open();
    ground.line(LineFile::Steps, &step(1), Some(&mut board));
    ground.line(LineFile::Evaluations, &evaluated(1, Split::Valid), Some(&mut board));
    ground.line(LineFile::Events, &taken_over(1001.5), Some(&mut board));
    assert_eq!(ground.points("loss/total"), [(1, 1001.0, 1.0)]);
    assert_eq!(ground.points("loss/cvr"), [(1, 1001.0, 0.25)]);
    assert_eq!(ground.points("loss/contrastive"), [(1, 1001.0, 0.5)], "less the weighted loss of the head");
    assert_eq!(ground.points("throughput/users_per_second"), [(1, 1001.0, 32.0)]);
    assert_eq!(ground.points("valid/recall@10"), [(1, 1001.25, 0.5)]);
    let events = read_events(&ground.file().1);
    assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())), "readers ask for it first");
    let texts: Vec<_> = events.iter().filter_map(|event| text(event, "events")).collect();
    assert_eq!(texts, [(1, "generation 3: the coordinator was lost, and another has taken the job over".to_owned())]);
    let config = events.iter().find_map(|event| text(event, "config")).unwrap();
    assert!(config.1.contains("\"cvr_weight\": 2.0"), "{}", config.1);
}

fn text(event: &Event, tag: &str) -> Option<(i64, String)> {
    let Some(What::Summary(summary)) = &event.what else { return None };
    let value = summary.value.iter().find(|value| value.tag == tag)?;
    assert_eq!(value.metadata.as_ref()?.plugin.as_ref()?.name, "text");
    let Some(Content::Tensor(tensor)) = &value.content else { return None };
    Some((event.step, String::from_utf8(tensor.strings[0].clone()).unwrap()))
}

#[test]
fn a_coordinator_that_takes_over_loses_and_repeats_no_point() {
    let ground = Ground::new();
    let mut board = ground.open();
    (1..=3).for_each(|number| ground.line(LineFile::Steps, &step(number), Some(&mut board)));
    ground.line(LineFile::Events, &taken_over(1002.5), Some(&mut board));
    drop(board);
    // killed in the midst of a write, and before it came to the last line
    let (old, bytes) = ground.file();
    fs::write(&old, &bytes[..bytes.len() - 7]).unwrap();
    ground.line(LineFile::Steps, &step(4), None);
    let mut board = ground.open();
    ground.line(LineFile::Steps, &step(5), Some(&mut board));
    let wanted = [1, 2, 3, 4, 5].map(|number| (number, 1000.0 + number as f64, 1.0 / number as f32));
    assert_eq!(ground.points("loss/total"), wanted);
    let (new, bytes) = ground.file();
    assert!(new > old, "TensorBoard reads files in the order of their names");
    let events = read_events(&bytes);
    assert_eq!(events[1].what, Some(What::SessionLog(SessionLog { status: 1 })), "the old points are forgotten");
    assert_eq!(events.iter().filter_map(|event| text(event, "events")).map(|text| text.0).collect::<Vec<_>>(), [2]);
}

#[test]
fn a_resume_drops_the_points_beyond_its_checkpoint() {
    let ground = Ground::new();
    let mut board = ground.open();
    (1..=4).for_each(|number| ground.line(LineFile::Steps, &step(number), Some(&mut board)));
    ground.line(LineFile::Evaluations, &evaluated(4, Split::Valid), Some(&mut board));
    drop(board);
    retain_lines(&ground.run_dir().metrics(), |line: &StepRecord| line.step <= Step(2)).unwrap();
    retain_lines(&ground.run_dir().evaluations(), |line: &Evaluation| line.step <= Step(2)).unwrap();
    let mut board = ground.open();
    let again = Timed { time: Some(2000.0), ..step(3) };
    ground.line(LineFile::Steps, &again, Some(&mut board));
    let points = ground.points("loss/total");
    assert_eq!(
        points.iter().map(|point| (point.0, point.1)).collect::<Vec<_>>(),
        [(1, 1001.0), (2, 1002.0), (3, 2000.0)]
    );
    assert_eq!(ground.points("valid/recall@10"), []);
}

#[test]
fn lines_of_older_versions_are_dated_by_their_seconds() {
    let dated = |number| Dated { step: Step(number), time: Some(1000.0 + number as f64), seconds: 0.5 };
    let mut steps: Vec<_> = (1..=4).map(dated).collect();
    steps.iter_mut().take(2).for_each(|step| step.time = None);
    date(&mut steps, 9000.0);
    let times: Vec<_> = steps.iter().map(|step| step.time.unwrap()).collect();
    assert_eq!(times, [1002.0, 1002.5, 1003.0, 1004.0]);
    steps.iter_mut().for_each(|step| step.time = None);
    date(&mut steps, 9000.0);
    assert_eq!(steps[3].time, Some(9000.0));
    assert_eq!(steps[0].time, Some(8998.5));
}

#[test]
fn a_file_that_is_made_anew_says_what_its_lines_said_one_by_one_and_leaves_a_cut_one_out() {
    let ground = Ground::new();
    let mut board = ground.open();
    (1..=300).for_each(|number| ground.line(LineFile::Steps, &step(number), Some(&mut board)));
    ground.line(LineFile::Evaluations, &evaluated(200, Split::Valid), Some(&mut board));
    ground.line(LineFile::Evaluations, &evaluated(300, Split::Test), Some(&mut board));
    ground.line(LineFile::Events, &taken_over(1300.5), Some(&mut board));
    drop(board);
    let one_by_one = read_events(&ground.file().1);
    for path in [ground.run_dir().metrics(), ground.run_dir().evaluations(), ground.run_dir().events()] {
        let text = fs::read_to_string(&path).unwrap();
        let cut = text.lines().last().unwrap();
        fs::write(&path, format!("{text}{}", &cut[..cut.len() - 5])).unwrap();
    }
    assert_eq!(ground.open().last_step, 300);
    let anew = read_events(&ground.file().1);
    assert_eq!(anew[..2].iter().map(|event| event.wall_time).collect::<Vec<_>>(), [1001.0; 2], "of the first step");
    // behind the three that head a file
    assert_eq!(anew[3..], one_by_one[3..]);
}

#[test]
fn evaluations_and_events_of_older_versions_stand_where_their_steps_do() {
    let ground = Ground::new();
    for number in 1..=4 {
        let time = step(number).time.filter(|_| number > 2);
        ground.line(LineFile::Steps, &Timed { time, ..step(number) }, None);
    }
    ground.line(LineFile::Evaluations, &Timed { time: None, ..evaluated(2, Split::Valid) }, None);
    ground.line(LineFile::Evaluations, &evaluated(4, Split::Valid), None);
    for time in [900.0, 1002.6, 2000.0] {
        ground.line(LineFile::Events, &taken_over(time), None);
    }
    ground.open();
    let times: Vec<_> = ground.points("loss/total").iter().map(|point| (point.0, point.1)).collect();
    assert_eq!(times, [(1, 1002.0), (2, 1002.5), (3, 1003.0), (4, 1004.0)]);
    assert_eq!(ground.points("valid/recall@10"), [(2, 1002.5, 0.5), (4, 1004.25, 0.5)]);
    let events = read_events(&ground.file().1);
    let happened: Vec<_> = events.iter().filter_map(|event| text(event, "events")).map(|text| text.0).collect();
    assert_eq!(happened, [0, 2, 4]);
}

#[test]
fn a_journal_shows_each_line_once_also_when_lines_are_dropped_meanwhile() {
    let ground = Ground::new();
    (1..=4).for_each(|number| ground.line(LineFile::Steps, &step(number), None));
    let (entries, journal) = Journal::open(ground.run_dir(), "f".into(), &ground.config).unwrap();
    let line = |number| Line { file: LineFile::Steps, text: serde_json::to_string(&step(number)).unwrap() };
    entries.blocking_send(Entry::Line(0, line(5))).unwrap();
    entries.blocking_send(Entry::Beyond(1, Step(2))).unwrap();
    entries.blocking_send(Entry::Line(2, line(3))).unwrap();
    entries.blocking_send(Entry::Line(3, line(4))).unwrap();
    drop(entries);
    journal.write_all().unwrap();
    let steps: Vec<_> = ground.points("loss/total").iter().map(|point| point.0).collect();
    assert_eq!(steps, [1, 2, 3, 4], "all points are there when the journal has ended");
}
