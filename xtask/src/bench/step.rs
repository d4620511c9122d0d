//! Training steps: beside PyTorch, with several workers, while checkpoints are written.
//!
//! The shape is the official one: 4 layers, hidden 768, content embeddings of 4096 dimensions that are the targets too,
//! dropout 0.1. Everybody has the same lengths, threads and precision, and the loss is the same function.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::results::{Results, Row, Unit, VERSION, Wanted, ratios};
use super::turns::{Contestant, take};
use super::{Bench, Options, Part, machine::Machine, number};

pub const PRECISIONS: [&str; 2] = ["bf16", "f32"];
pub const SCRIPTS: [&str; 2] = ["padded", "packed"];
/// The flags of the official task and of what differs in its shape from `bench step`'s own.
pub const OFFICIAL: [&str; 6] = ["--item-tower", "content", "--output-dim", "4096", "--targets", "10"];

/// What is wanted at the first batch: users/s over padded.py and over packed.py.
fn wanted(device: &str, precision: &str) -> [Option<f64>; 2] {
    match (device, precision) {
        ("cpu", "bf16") => [Some(6.0), Some(1.25)],
        ("cpu", _) => [Some(8.0), None],
        (_, "bf16") => [Some(5.0), Some(1.2)],
        _ => [None, None],
    }
}

/// Of the ceiling of bf16 products on a CPU, at the last batch.
const CEILING_WANTED: f64 = 0.75;

/// Users per second of every round: ours and the scripts'.
pub struct Measured {
    pub precision: &'static str,
    pub batch: u32,
    pub ours: Vec<f64>,
    /// Our share of what the products alone reach in the same turns.
    pub ceiling_share: Vec<f64>,
    /// What they reach.
    pub ceiling: Vec<f64>,
    /// In the order of [`SCRIPTS`].
    pub scripts: [Vec<f64>; 2],
}

impl Measured {
    /// Ratios over each script.
    fn over(&self) -> [Vec<f64>; 2] {
        self.scripts.each_ref().map(|theirs| ratios(&self.ours, theirs))
    }
}

/// The precisions to measure.
fn chosen(options: &Options) -> impl Iterator<Item = &'static str> {
    PRECISIONS.into_iter().filter(|precision| options.precision.iter().any(|chosen| chosen == precision))
}

/// The precision, if there is only one to measure.
pub fn single(options: &Options) -> Option<&'static str> {
    let mut chosen = chosen(options);
    chosen.next().filter(|_| chosen.next().is_none())
}

pub fn beside_pytorch(bench: &Bench<'_>) -> Result<Results> {
    let (options, threads) = (bench.options, bench.threads.to_string());
    // what is compared is the same function
    eprintln!("{}", bench.output("check.py", &[])?.trim_end());
    let mut all = Vec::new();
    for precision in chosen(options) {
        for &batch in &options.batch {
            eprintln!(" {precision}, batch {batch}");
            all.push(measure(bench, precision, batch, &threads)?);
        }
    }
    let machine = Machine::describe(&options.device, bench.workspace.root());
    let mut results = summary(&all, &options.device, machine, bench.command(Part::Step));
    if let Some(precision) = single(options) {
        results.name.push_str(&format!("-{precision}"));
        results.title.push_str(&format!(", {precision} alone"));
    }
    results.more.insert("lengths".into(), if options.lengths == "amazon" { "amazon".into() } else { "a file".into() });
    results.more.insert("threads".into(), bench.threads.into());
    Ok(results)
}

fn measure(bench: &Bench<'_>, precision: &'static str, batch: u32, threads: &str) -> Result<Measured> {
    let options = bench.options;
    let (batch_text, repetitions) = (batch.to_string(), options.repetitions.to_string());
    let words = [
        ["--device", &options.device],
        ["--threads", threads],
        ["--precision", precision],
        ["--batch", &batch_text],
        ["--lengths", &options.lengths],
        ["--repetitions", &repetitions],
    ]
    .concat();
    let ours = [&["step"], &OFFICIAL[..], &words[..]].concat();
    // compiling and choosing kernels is over before the steps that count
    let warm: &[&str] = if options.device == "cuda" { &["--warmup", "8"] } else { &[] };
    let theirs = [&words[..], warm].concat();
    let script = |name: &'static str, file: &'static str| Contestant {
        name,
        measure: Box::new({
            let words = &theirs;
            move || bench.script(file, words)
        }),
    };
    let contestants = [
        Contestant { name: "ours", measure: Box::new(|| bench.ours(&ours)) },
        script("padded", "padded.py"),
        script("packed", "packed.py"),
    ];
    let shown = |answer: &Value| {
        let rate = answer.get("median_users_per_second").and_then(Value::as_f64).unwrap_or(f64::NAN);
        format!("{rate:.1} users/s")
    };
    let answers = take(options.rounds, &contestants, shown)?;
    let column = |answers: &[Value], name: &str| -> Result<Vec<f64>> {
        answers.iter().map(|answer| number(answer, name)).collect()
    };
    let rates = |answers: &[Value]| column(answers, "median_users_per_second");
    Ok(Measured {
        precision,
        batch,
        ours: rates(&answers[0])?,
        ceiling_share: column(&answers[0], "ceiling_share")?,
        ceiling: column(&answers[0], "ceiling_users_per_second")?,
        scripts: [rates(&answers[1])?, rates(&answers[2])?],
    })
}

/// The rows, and the figures under the names that others look for: ratios at the first batch, the ceiling at the last.
pub fn summary(all: &[Measured], device: &str, machine: Machine, command: String) -> Results {
    let on_cpu = device == "cpu";
    let mut rows = Vec::new();
    let mut more = Map::new();
    for precision in PRECISIONS {
        let mine: Vec<&Measured> = all.iter().filter(|one| one.precision == precision).collect();
        let mut figures = Map::new();
        for (place, one) in mine.iter().enumerate() {
            for (name, (ratios, wanted)) in SCRIPTS.iter().zip(one.over().iter().zip(wanted(device, precision))) {
                let what = format!("users/s over `{name}.py`, {precision}, batch {}", one.batch);
                let mut row = Row::of(what, Unit::Ratio, ratios);
                if place == 0 {
                    figures.insert(format!("over_{name}"), row.median.into());
                    row.wanted = wanted.map(Wanted::AtLeast);
                }
                rows.push(row);
            }
            let what = format!("share of the matrix products' ceiling, {precision}, batch {}", one.batch);
            let mut row = Row::of(what, Unit::Share, &one.ceiling_share);
            if place + 1 == mine.len() {
                figures.insert("ceiling_share".into(), row.median.into());
                row.wanted = (on_cpu && precision == "bf16").then_some(Wanted::AtLeast(CEILING_WANTED));
            }
            rows.push(row);
            let [padded, packed] = &one.scripts;
            for (name, rates) in [
                ("ours", &one.ours),
                ("our products alone", &one.ceiling),
                ("`padded.py`", padded),
                ("`packed.py`", packed),
            ] {
                rows.push(Row::of(format!("{name}, {precision}, batch {}", one.batch), Unit::UsersPerSecond, rates));
            }
        }
        if !figures.is_empty() {
            more.insert(precision.into(), Value::Object(figures));
        }
    }
    let rounds = all.iter().map(|one| {
        json!({
            "precision": one.precision,
            "batch": one.batch,
            "users_per_second": {
                "ours": one.ours, "ceiling": one.ceiling, "padded": one.scripts[0], "packed": one.scripts[1],
            },
            "ceiling_share": one.ceiling_share,
        })
    });
    more.insert("rounds".into(), rounds.collect());
    Results {
        version: VERSION,
        name: if on_cpu { "cpu-official" } else { "gpu-official" }.into(),
        title: format!("A training step beside PyTorch{}", if on_cpu { "" } else { ", on a GPU" }),
        command,
        machine,
        rows,
        more,
    }
}

/// What all-reduce adds to a step of four workers.
pub fn reduction(bench: &Bench<'_>) -> Result<Results> {
    let repetitions = (2 * bench.options.repetitions).to_string();
    // four ranks with 64 users each, one thread a rank
    let words = ["step", "--device", "cpu", "--workers", "4", "--threads", "1", "--batch", "256"];
    let words = [&words[..], &OFFICIAL, &["--precision", "bf16", "--repetitions", &repetitions]].concat();
    let by_sockets = [&words[..], &["--sockets"]].concat();
    let (mut added, mut between, mut afterwards) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.options.rounds {
        added.push(number(&bench.ours(&words)?, "reduction.added_share")?);
        let answer = bench.ours_on_link(&by_sockets)?;
        between.push(number(&answer, "reduction.added_share")?);
        afterwards.push(number(&answer, "reduction.added_share_afterwards")?);
        let [one, two, three] = [&added, &between, &afterwards].map(|shares| 100.0 * shares[shares.len() - 1]);
        eprintln!(
            "  round {round} of {}: {one:.1} % added; by sockets {two:.1} %, after the backward {three:.1} %",
            bench.options.rounds
        );
    }
    let (name, link) = match &bench.options.link {
        Some(rate) => ("reduction-link", format!(" that share a link of {rate}")),
        None => ("reduction", String::new()),
    };
    Ok(Results {
        version: VERSION,
        name: name.into(),
        title: format!("Summing gradients over four workers{link}"),
        command: bench.command(Part::Reduction),
        machine: Machine::describe("cpu", bench.workspace.root()),
        rows: vec![
            Row::of("time that all-reduce adds to a step of 4 CPU workers with 64 users each", Unit::Share, &added)
                .wanted(Wanted::AtMost(0.1)),
            Row::of("the same by sockets, as between machines", Unit::Share, &between).wanted(Wanted::AtMost(0.1)),
            Row::of("by sockets, if it begins when the backward has ended", Unit::Share, &afterwards),
        ],
        more: Map::from_iter([
            ("added_share".into(), added.into()),
            ("added_share_by_sockets".into(), between.into()),
            ("added_share_afterwards".into(), afterwards.into()),
        ]),
    })
}

/// What a step loses while a checkpoint is written. The steps are small, so that there are many to compare.
pub fn checkpoint(bench: &Bench<'_>) -> Result<Results> {
    let (threads, device) = (bench.threads.to_string(), bench.options.device.as_str());
    let checkpoints = bench.options.repetitions.to_string();
    let words = ["checkpoint", "--device", device, "--threads", &threads, "--precision", "bf16", "--batch", "16"];
    let words = [&words[..], &["--checkpoints", &checkpoints], &OFFICIAL].concat();
    let (mut middle, mut lost, mut error) = (Vec::new(), Vec::new(), Vec::new());
    let (mut share, mut over, mut writing) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.options.rounds {
        let answer = bench.ours(&words)?;
        let numbers = |key: &str| -> Vec<f64> {
            answer[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        for (column, name) in
            [(&mut middle, "lost_share_middle"), (&mut lost, "lost_share"), (&mut error, "lost_share_error")]
        {
            column.push(number(&answer, name)?);
        }
        share.extend(numbers("writer_share"));
        over.extend(numbers("handing_over"));
        writing.extend(numbers("writing"));
        let [middle, lost, error] = [&middle, &lost, &error].map(|shares| 100.0 * shares[shares.len() - 1]);
        eprintln!(
            "  round {round} of {}: {middle:.2} % lost in the middle half of the pairs, {lost:.2} % in the mean, \
             give or take {error:.2}",
            bench.options.rounds
        );
    }
    Ok(Results {
        version: VERSION,
        name: "checkpoint".into(),
        title: "Writing a checkpoint".into(),
        command: bench.command(Part::Checkpoint),
        machine: Machine::describe(device, bench.workspace.root()),
        rows: vec![
            Row::of("step time lost while a checkpoint is written, the middle half of pairs", Unit::Share, &middle)
                .wanted(Wanted::AtMost(0.01)),
            Row::of("the same, mean of all pairs", Unit::Share, &lost).wanted(Wanted::AtMost(0.01)),
            Row::of("standard error of this mean", Unit::Share, &error),
            Row::of("of a processor that the writer takes meanwhile", Unit::Share, &share),
            Row::of("the training thread copies the state (part of what is lost)", Unit::Seconds, &over),
            Row::of("until it is durable", Unit::Seconds, &writing),
        ],
        more: Map::from_iter([("lost_share_middle".into(), middle.into()), ("lost_share".into(), lost.into())]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(precision: &'static str, batch: u32, speed: f64) -> Measured {
        Measured {
            precision,
            batch,
            ours: vec![6.0 * speed, 3.0 * speed, 12.0 * speed],
            ceiling_share: vec![0.5, 0.7, 0.6],
            ceiling: vec![12.0 * speed, 5.0 * speed, 20.0 * speed],
            scripts: [vec![speed, 0.5 * speed, speed], vec![4.0 * speed, 2.0 * speed, 8.0 * speed]],
        }
    }

    #[test]
    fn the_summary_has_ratios_of_the_first_batch_and_the_ceiling_of_the_last() {
        let all = [measured("bf16", 64, 1.0), measured("bf16", 128, 7.0), measured("f32", 64, 1.0)];
        let results = summary(&all, "cpu", Machine::default(), "c".into());
        assert_eq!(results.more["bf16"], json!({ "over_padded": 6.0, "over_packed": 1.5, "ceiling_share": 0.6 }));
        assert_eq!(results.more["f32"]["over_padded"], 6.0);
        let wanted = |what: &str| results.rows.iter().find(|row| row.what.contains(what)).unwrap().wanted;
        assert_eq!(wanted("`padded.py`, bf16, batch 64"), Some(Wanted::AtLeast(6.0)));
        assert_eq!(wanted("`padded.py`, bf16, batch 128"), None);
        assert_eq!(wanted("ceiling, bf16, batch 128"), Some(Wanted::AtLeast(CEILING_WANTED)));
        assert_eq!(wanted("ceiling, f32, batch 64"), None);
        assert_eq!(results.more["rounds"].as_array().unwrap().len(), 3);
        assert_eq!(results.rows[0].max, 12.0, "{:?}", results.rows[0]);
        // a GPU has other aims, and its share of the products another benchmark
        let on_gpu = summary(&all, "cuda", Machine::default(), "c".into());
        assert_eq!((on_gpu.name.as_str(), on_gpu.rows[0].wanted), ("gpu-official", Some(Wanted::AtLeast(5.0))));
        assert!(on_gpu.rows.iter().all(|row| !row.what.contains("ceiling") || row.wanted.is_none()));
    }
}
