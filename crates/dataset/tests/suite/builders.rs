//! Small inputs and what is read back of the datasets made of them.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use flate2::Compression;
use flate2::write::GzEncoder;
use learn_dataset::{Dataset, KeepOut, Preparation, PrepareError, PrepareOptions, PrepareReport, prepare_with};
use learn_domain::config::PrepareConfig;
use learn_domain::report::Split;
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;

/// An interaction: user, item, time.
pub type Row = (String, String, i64);

/// A folder with inputs; the dataset is made at `out`.
pub struct Fixture {
    pub dir: TempDir,
    pub config: PrepareConfig,
    pub options: PrepareOptions,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, config: PrepareConfig::default(), options: PrepareOptions::default() }
    }

    /// With one CSV file of interactions.
    pub fn with_rows(rows: &[Row]) -> Self {
        let mut this = Self::new();
        this.interactions("interactions.csv", csv(rows));
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn out(&self) -> PathBuf {
        self.path("out")
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).unwrap();
        path
    }

    pub fn interactions(&mut self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.write(name, contents);
        self.config.interactions.files.push(path);
    }

    pub fn items(&mut self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.write(name, contents);
        self.config.items.files.push(path);
    }

    pub fn try_prepare(&self) -> Result<PrepareReport, PrepareError> {
        self.try_prepare_with(None)
    }

    pub fn try_prepare_with(&self, keep_out: Option<KeepOut>) -> Result<PrepareReport, PrepareError> {
        let (out, options) = (self.out(), self.options);
        prepare_with(&Preparation { config: &self.config, name: "small", out: &out, options, keep_out }, &())
    }

    pub fn prepare(&self) -> (PrepareReport, Dataset) {
        let report = self.try_prepare().unwrap_or_else(|error| panic!("{error}"));
        let dataset = Dataset::open(&self.out()).unwrap();
        dataset.verify(&()).unwrap();
        (report, dataset)
    }

    /// The message of the error, with the folder left out.
    pub fn refused(&self) -> String {
        let error = self.try_prepare().unwrap_err().to_string();
        assert!(!self.out().exists(), "nothing may be there after an error");
        assert_eq!(temporary(self.dir.path()), Vec::<PathBuf>::new());
        error.replace(&format!("{}/", self.dir.path().display()), "")
    }
}

/// Temporary directories of `out`.
pub fn temporary(dir: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("out.tmp-")).collect()
}

pub fn row(user: impl ToString, item: impl ToString, time: i64) -> Row {
    (user.to_string(), item.to_string(), time)
}

/// `users` users with `length` interactions each, over `items` items.
pub fn grid(users: usize, length: usize, items: usize) -> Vec<Row> {
    let interactions = (0..users).flat_map(|user| (0..length).map(move |at| (user, at)));
    interactions
        .map(|(user, at)| row(format!("u{user}"), format!("i{}", (user * 7 + at * 3) % items), at as i64))
        .collect()
}

pub fn csv(rows: &[Row]) -> String {
    let lines = rows.iter().map(|(user, item, time)| format!("{user},{item},{time}\n"));
    std::iter::once("user_id,item_id,timestamp\n".to_owned()).chain(lines).collect()
}

pub fn json_lines(rows: &[Row]) -> String {
    let line = |(user, item, time): &Row| {
        format!("{}\n", serde_json::json!({"user_id": user, "rating": 5.0, "item_id": item, "timestamp": time}))
    };
    rows.iter().map(line).collect()
}

pub fn gzip(contents: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(contents.as_ref()).unwrap();
    encoder.finish().unwrap()
}

pub fn text_column(values: impl IntoIterator<Item = impl AsRef<str>>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

pub fn parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

pub fn parquet_rows(path: &Path, rows: &[Row]) {
    let times = Int64Array::from_iter_values(rows.iter().map(|row| row.2));
    let user = text_column(rows.iter().map(|row| &row.0));
    parquet(
        path,
        vec![
            ("rating", Arc::new(Int64Array::from(vec![1; rows.len()])) as ArrayRef),
            ("user_id", user),
            ("item_id", text_column(rows.iter().map(|row| &row.1))),
            ("timestamp", Arc::new(times)),
        ],
    );
}

/// A user's part of a dataset, in ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UserView {
    pub id: String,
    pub train: Vec<(String, i64)>,
    /// History and targets.
    pub valid: Option<(Vec<String>, Vec<String>)>,
    pub test: Option<(Vec<String>, Vec<String>)>,
}

/// A dataset as its users, sorted by id.
pub fn view(dataset: &Dataset) -> Vec<UserView> {
    let items: Vec<String> = dataset.items().unwrap().into_iter().map(|item| item.id).collect();
    let ids = dataset.user_ids().unwrap();
    let name = |indices: &[u32]| -> Vec<String> { indices.iter().map(|&item| items[item as usize].clone()).collect() };
    let mut users: Vec<UserView> = ids.into_iter().map(|id| UserView { id, ..UserView::default() }).collect();
    let train = dataset.train();
    for row in 0..train.len() {
        let sequence = name(train.items(row)).into_iter().zip(train.times(row).iter().copied());
        users[train.user(row) as usize].train = sequence.collect();
    }
    for split in [Split::Valid, Split::Test] {
        let held_out = dataset.held_out(split);
        for row in 0..held_out.len() {
            let user = &mut users[held_out.user(row) as usize];
            let part = if split == Split::Valid { &mut user.valid } else { &mut user.test };
            *part = Some((name(held_out.history(row)), name(held_out.targets(row))));
        }
    }
    users.sort();
    users
}
