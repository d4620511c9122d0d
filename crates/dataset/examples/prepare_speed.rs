//! How fast `prepare` reads Parquet: `cargo run --release -p learn-dataset --example prepare_speed -- N`.
//!
//! Writes N synthetic interactions (a user per 100 of them, popular and rare items, shuffled users, as dumps by date
//! are) to a temporary directory, prepares them in a process of its own and prints one line of JSON: interactions per
//! second of wall-clock, the same per core of the machine and per second of processor time, and the peak memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arrow_array::{ArrayRef, Int64Array, RecordBatch};
use learn_dataset::{Progress, Unit, prepare};
use learn_domain::config::PrepareConfig;
use parquet::arrow::ArrowWriter;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--prepare", input, out] => measure(Path::new(input), Path::new(out)),
        [count] => {
            let dir = tempfile::tempdir()?;
            let input = dir.path().join("interactions.parquet");
            generate(&input, count.parse()?)?;
            // A process of its own, so that its peak memory is that of `prepare` alone.
            let status = Command::new(std::env::current_exe()?)
                .arg("--prepare")
                .args([&input, &dir.path().join("dataset")])
                .status()?;
            if status.success() { Ok(()) } else { Err("the measured process failed".into()) }
        }
        _ => Err("usage: prepare_speed INTERACTIONS".into()),
    }
}

fn generate(path: &Path, count: u64) -> Result<(), Failure> {
    let users = (count / 100).max(10);
    let items = (count / 500).max(10) as f64;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut writer: Option<ArrowWriter<std::fs::File>> = None;
    for start in (0..count).step_by(1 << 17) {
        let rows = start..count.min(start + (1 << 17));
        let user = rows.clone().map(|_| (random() % users) as i64);
        let user = Int64Array::from_iter_values(user.collect::<Vec<_>>());
        // The square of a uniform share: few items have most interactions.
        let item = rows.clone().map(|_| ((random() >> 11) as f64 / (1_u64 << 53) as f64).powi(2) * items);
        let item = Int64Array::from_iter_values(item.map(|item| item as i64).collect::<Vec<_>>());
        let time = Int64Array::from_iter_values(rows.map(|row| 1_500_000_000 + row as i64));
        let columns: [(&str, ArrayRef); 3] =
            [("user_id", Arc::new(user)), ("item_id", Arc::new(item)), ("timestamp", Arc::new(time))];
        let batch = RecordBatch::try_from_iter(columns)?;
        match &mut writer {
            Some(writer) => writer.write(&batch)?,
            none => {
                none.insert(ArrowWriter::try_new(std::fs::File::create(path)?, batch.schema(), None)?).write(&batch)?
            }
        }
    }
    writer.map_or(Ok(()), |writer| writer.close().map(|_| ()))?;
    Ok(())
}

/// When each stage began.
#[derive(Default)]
struct Stages(Mutex<Vec<(String, Instant)>>);

impl Progress for Stages {
    fn stage(&self, name: &str, _total: Option<u64>, _unit: Unit) {
        if let Ok(mut stages) = self.0.lock() {
            stages.push((name.to_owned(), Instant::now()));
        }
    }

    fn advance(&self, _amount: u64) {}
}

impl Stages {
    /// Seconds of each stage until the next; equal names together.
    fn seconds(self) -> BTreeMap<String, f64> {
        let stages = self.0.into_inner().unwrap_or_default();
        let ends = stages.iter().skip(1).map(|stage| stage.1).chain([Instant::now()]);
        let mut seconds = BTreeMap::new();
        for ((name, start), end) in stages.iter().zip(ends) {
            *seconds.entry(name.clone()).or_default() += end.duration_since(*start).as_secs_f64();
        }
        seconds
    }
}

fn measure(input: &Path, out: &Path) -> Result<(), Failure> {
    let mut config = PrepareConfig::default();
    config.interactions.files = vec![input.to_path_buf()];
    config.k_core = 5;
    let stages = Stages::default();
    let start = Instant::now();
    let report = prepare(&config, "speed", out, &stages)?;
    let seconds = start.elapsed().as_secs_f64();
    let read = report.steps.first().map_or(0, |step| step.interactions);
    let cores = std::thread::available_parallelism()?.get();
    let processor_seconds = processor_seconds()?;
    let line = serde_json::json!({
        "interactions": read,
        "users": report.manifest.counts.users,
        "items": report.manifest.counts.items,
        "seconds": seconds,
        "stages": stages.seconds(),
        "cores": cores,
        "interactions_per_second": read as f64 / seconds,
        "interactions_per_second_per_core": read as f64 / seconds / cores as f64,
        "interactions_per_processor_second": read as f64 / processor_seconds,
        "peak_memory_bytes": peak_memory_bytes()?,
    });
    println!("{line}");
    Ok(())
}

/// User and system time of this process, from `/proc` (Linux counts them in hundredths of a second).
fn processor_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').ok_or("/proc/self/stat has no name")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

fn peak_memory_bytes() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("/proc/self/status has no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
