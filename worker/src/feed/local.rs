//! The dataset's own files, for a worker that can open them: its rows are mapped, and none is sent.
//!
//! Input: where the data service has its files, and what they are. Output: the mapped content embeddings, or why they
//! are not used. Invariants: files are used only if the dataset and the content embeddings are the job's by their
//! fingerprints, each file is as long and as old as the server's, and a sample of rows is what the service sends, bit
//! by bit; in any doubt rows are sent. A mapped file that is written to later is an error. What is used and why not is
//! logged once.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use half::f16;
use learn_dataset::{Dataset, DatasetError, Embeddings, RowError};
use learn_domain::report::DatasetFacts;
use learn_proto::flight::RowFiles;
use tokio::sync::OnceCell;

use super::answers::{FlightClientError, unexpected};
use super::flight::DataClient;

/// Rows that are compared with what the service sends.
const SAMPLE: usize = 64;
/// How often mapped files are looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// Why rows are sent and not mapped.
#[derive(Debug, thiserror::Error)]
pub enum NotMapped {
    #[error("the data service offers no files")]
    NotOffered,
    #[error("{path} cannot be opened here: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} is another file here than at the data service: {what}")]
    OtherFile { path: PathBuf, what: &'static str },
    #[error("{path} is another dataset than the job's: its {what} differs")]
    OtherDataset { path: PathBuf, what: &'static str },
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error("row {item} is another one in {path} than at the data service")]
    OtherRow { path: PathBuf, item: u32 },
}

/// What the job's dataset is, and its files once they have been looked for.
#[derive(Debug)]
pub struct LocalRows {
    dataset: DatasetFacts,
    found: OnceCell<Option<Mapped>>,
}

/// Mapped rows and the files that they lie in.
#[derive(Debug)]
struct Mapped {
    embeddings: Arc<Embeddings>,
    files: Arc<[Watched]>,
    /// When the files were looked at.
    looked: Mutex<Instant>,
}

/// A mapped file as it was before it was mapped.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    stamp: Stamp,
}

/// Which file it is, and in what state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    bytes: u64,
    modified_nanos: u128,
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let file = (metadata.dev(), metadata.ino());
        Ok(Self { file, bytes: metadata.len(), modified_nanos: modified.as_nanos() })
    }
}

impl Watched {
    /// Whether it was written to. Another file under its name, or none, changes nothing of what is mapped.
    fn has_changed(&self) -> bool {
        Stamp::of(&self.path).is_ok_and(|now| now.file == self.stamp.file && now != self.stamp)
    }
}

impl Mapped {
    /// Looks at the files, if that is due.
    async fn check(&self) -> Result<(), FlightClientError> {
        {
            let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
            if looked.elapsed() < LOOK_AGAIN {
                return Ok(());
            }
            *looked = Instant::now();
        }
        let files = Arc::clone(&self.files);
        let changed = tokio::task::spawn_blocking(move || changed(&files)).await;
        match changed.map_err(|error| unexpected(format!("the dataset's files: {error}")))? {
            Some(path) => Err(FlightClientError::Changed { path }),
            None => Ok(()),
        }
    }
}

/// The first file that was written to.
fn changed(files: &[Watched]) -> Option<PathBuf> {
    files.iter().find(|file| file.has_changed()).map(|file| file.path.clone())
}

impl LocalRows {
    pub(super) fn of(dataset: &DatasetFacts) -> Self {
        Self { dataset: dataset.clone(), found: OnceCell::new() }
    }

    /// The mapped rows; the first call looks for them.
    pub(super) async fn get(&self, client: &DataClient) -> Result<Option<Arc<Embeddings>>, FlightClientError> {
        let Some(mapped) = self.found.get_or_try_init(|| self.look(client)).await? else { return Ok(None) };
        mapped.check().await?;
        Ok(Some(Arc::clone(&mapped.embeddings)))
    }

    async fn look(&self, client: &DataClient) -> Result<Option<Mapped>, FlightClientError> {
        let offered = match client.row_files().await {
            Err(FlightClientError::Refused(reason)) => {
                tracing::debug!(reason, "the data service does not say what its files are");
                None
            }
            answered => answered?,
        };
        let Some((dirs, files)) = offered else {
            tracing::info!(reason = %NotMapped::NotOffered, "content embeddings are sent by the data service");
            return Ok(None);
        };
        for dir in dirs {
            let (dataset, files) = (self.dataset.clone(), files.clone());
            let path = dir.clone();
            let opened = tokio::task::spawn_blocking(move || open(&path, &files, &dataset)).await;
            let opened = opened.map_err(|error| unexpected(format!("the dataset's files: {error}")))?;
            let compared = match opened {
                Ok((embeddings, files)) => compare(client, embeddings, &dir).await?.map(|same| (same, files)),
                Err(reason) => Err(reason),
            };
            match compared {
                Ok((embeddings, files)) => {
                    tracing::info!(dataset = %dir.display(), "content embeddings are mapped here; none is sent");
                    let (embeddings, looked) = (Arc::new(embeddings), Mutex::new(Instant::now()));
                    return Ok(Some(Mapped { embeddings, files: files.into(), looked }));
                }
                Err(reason) => tracing::info!(%reason, "content embeddings are sent by the data service"),
            }
        }
        Ok(None)
    }
}

/// Opens a directory that should be the job's dataset.
fn open(dir: &Path, files: &RowFiles, wanted: &DatasetFacts) -> Result<(Embeddings, Vec<Watched>), NotMapped> {
    let mut watched = Vec::new();
    for file in &files.files {
        let path = dir.join(&file.path);
        let stamp = Stamp::of(&path).map_err(|source| NotMapped::Unreadable { path: path.clone(), source })?;
        let other = |what| Err(NotMapped::OtherFile { path: path.clone(), what });
        if stamp.bytes != file.bytes {
            return other("it has another size");
        }
        if stamp.modified_nanos != u128::from(file.modified_nanos) {
            return other("it was written at another time");
        }
        watched.push(Watched { path, stamp });
    }
    let dataset = Dataset::open(dir)?;
    let facts = dataset.facts();
    let other = |what| Err(NotMapped::OtherDataset { path: dir.to_owned(), what });
    if facts.fingerprint != wanted.fingerprint || facts.fingerprint != files.fingerprint {
        return other("fingerprint");
    }
    let embeddings = &facts.embeddings_fingerprint;
    if *embeddings != wanted.embeddings_fingerprint || *embeddings != files.embeddings_fingerprint {
        return other("content embeddings' fingerprint");
    }
    let named = dataset.manifest().embeddings.iter().flat_map(|info| &info.files).map(|entry| &entry.path);
    if !named.eq(files.files.iter().map(|file| &file.path)) {
        return other("list of files");
    }
    let embeddings = dataset.embeddings()?;
    // what was looked at is what was mapped
    match watched.iter().find(|file| Stamp::of(&file.path).ok() != Some(file.stamp)) {
        Some(file) => Err(NotMapped::OtherFile { path: file.path.clone(), what: "it changes while it is opened" }),
        None => Ok((embeddings, watched)),
    }
}

/// Compares rows from all over the table with those that the service sends.
async fn compare(
    client: &DataClient,
    embeddings: Embeddings,
    dir: &Path,
) -> Result<Result<Embeddings, NotMapped>, FlightClientError> {
    let items = sample(embeddings.rows());
    let sent = client.rows(embeddings.dim()).fetch(&items).await?;
    let here = embeddings.gather(&items, client.row_format());
    Ok(first_other(&items, here, &sent)?
        .map_or(Ok(embeddings), |item| Err(NotMapped::OtherRow { path: dir.to_owned(), item })))
}

/// The first of these items whose row is another one here than the one that was sent, or is damaged here; the service
/// has others, or says that its own are damaged.
fn first_other(items: &[u32], here: Result<Vec<f16>, RowError>, sent: &[f16]) -> Result<Option<u32>, RowError> {
    let here = match here {
        Err(RowError::NotFinite { item, .. }) => return Ok(Some(item)),
        here => here?,
    };
    // as many as were asked for: the exchange and `Embeddings::gather` see to it
    let dim = (sent.len() / items.len().max(1)).max(1);
    let bits = |row: &[f16]| row.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let mut rows = items.iter().zip(here.chunks_exact(dim).zip(sent.chunks_exact(dim)));
    Ok(rows.find(|(_, (here, sent))| bits(here) != bits(sent)).map(|(item, _)| *item))
}

/// Items from the first to the last.
fn sample(rows: usize) -> Vec<u32> {
    let count = SAMPLE.min(rows);
    // rows are numbered by u32 everywhere
    (0..count).map(|number| (number * rows.saturating_sub(1) / (count - 1).max(1)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use learn_dataset::embeddings::int8;
    use learn_domain::config::RowFormat;
    use learn_proto::flight::RowFile;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_jobs_own_files_are_opened() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1");
        let dataset = Dataset::open(&dir).unwrap();
        let facts = dataset.facts();
        let file = |path: &String| {
            let metadata = std::fs::metadata(dir.join(path)).unwrap();
            let modified = metadata.modified().unwrap().duration_since(UNIX_EPOCH).unwrap();
            let modified_nanos = modified.as_nanos().try_into().unwrap();
            RowFile { path: path.clone(), bytes: metadata.len(), modified_nanos }
        };
        let entries = &dataset.manifest().embeddings.as_ref().unwrap().files;
        let files = RowFiles {
            fingerprint: facts.fingerprint.clone(),
            embeddings_fingerprint: facts.embeddings_fingerprint.clone(),
            files: entries.iter().map(|entry| file(&entry.path)).collect(),
        };
        let (opened, watched) = open(&dir, &files, &facts).unwrap();
        assert_eq!((watched.len(), changed(&watched)), (files.files.len(), None));
        assert_eq!((opened.dim(), opened.rows()), (2, 5));

        let refused = |change: &dyn Fn(&mut RowFiles, &mut DatasetFacts)| {
            let (mut files, mut facts) = (files.clone(), facts.clone());
            change(&mut files, &mut facts);
            open(&dir, &files, &facts).unwrap_err().to_string()
        };
        assert!(refused(&|files, _| files.files[1].bytes += 1).contains("another size"));
        assert!(refused(&|files, _| files.files[0].modified_nanos -= 1).contains("another time"));
        assert!(refused(&|files, _| files.files[0].path = "gone".into()).contains("cannot be opened here"));
        assert!(refused(&|files, _| drop(files.files.pop())).contains("list of files"));
        assert!(refused(&|_, facts| facts.fingerprint = "x".into()).contains("its fingerprint differs"));
        assert!(refused(&|files, _| files.fingerprint = "x".into()).contains("its fingerprint differs"));
        assert!(refused(&|_, facts| facts.embeddings_fingerprint = "x".into()).contains("content embeddings'"));
        assert!(refused(&|files, _| files.embeddings_fingerprint = "x".into()).contains("content embeddings'"));
    }

    #[test]
    fn a_mapped_file_that_is_written_to_is_noticed_and_one_that_is_replaced_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part.arrow");
        std::fs::write(&path, "rows").unwrap();
        let watched = [Watched { path: path.clone(), stamp: Stamp::of(&path).unwrap() }];
        assert_eq!(changed(&watched), None);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let later = file.metadata().unwrap().modified().unwrap() + Duration::from_nanos(1);
        file.set_modified(later).unwrap();
        assert_eq!(changed(&watched), Some(path.clone()));
        std::fs::write(folder.path().join("aside"), "others").unwrap();
        std::fs::rename(folder.path().join("aside"), &path).unwrap();
        assert_eq!(changed(&watched), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(changed(&watched), None);
    }

    #[test]
    fn a_row_that_is_another_one_or_damaged_is_found() {
        let rows = |values: [f32; 6]| values.map(f16::from_f32).to_vec();
        let sent = rows([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let other = |here| first_other(&[7, 8, 9], here, &sent).unwrap();
        assert_eq!(other(Ok(sent.clone())), None);
        assert_eq!(other(Ok(rows([1.0, 2.0, 3.0, -4.0, 5.0, -6.0]))), Some(8));
        // equal as numbers is not enough
        assert_eq!(first_other(&[7], Ok(vec![f16::NEG_ZERO]), &[f16::ZERO]).unwrap(), Some(7));
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/dataset/tests/data/v1");
        let table = Dataset::open(&dir).unwrap().embeddings().unwrap();
        assert!(first_other(&[5], table.gather(&[5], RowFormat::F16), &sent[..2]).is_err());
        let source = int8::quantize(&[f16::NAN, f16::ONE], &mut [0, 0]).unwrap_err();
        assert_eq!(other(Err(RowError::NotFinite { item: 9, source })), Some(9));
    }

    proptest! {
        #[test]
        fn a_sample_reaches_from_end_to_end(rows in 0_usize..100_000) {
            let items = sample(rows);
            prop_assert_eq!(items.len(), SAMPLE.min(rows));
            prop_assert!(items.windows(2).all(|pair| pair[0] < pair[1]));
            if rows > 0 {
                prop_assert_eq!((items[0], *items.last().unwrap() as usize), (0, if rows == 1 { 0 } else { rows - 1 }));
            }
        }
    }
}
