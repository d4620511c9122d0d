//! Items and users by number: the Parquet files that hold ids and texts.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};

use crate::error::{DatasetError, MadeBy};
use crate::files::{self, HashingFile};
use crate::manifest::FileEntry;
use crate::progress::Progress;

/// An item: its id and the fields of the prompt that are known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    pub id: String,
    pub title: Option<String>,
    pub category: Option<String>,
    pub brand: Option<String>,
    pub price: Option<String>,
    pub keywords: Option<String>,
    pub attributes: Option<String>,
}

/// Names of the text columns, in the order of [`Item::texts`].
pub(crate) const TEXTS: [&str; 6] = ["title", "category", "brand", "price", "keywords", "attributes"];

impl Item {
    pub(crate) fn texts(&self) -> [&Option<String>; 6] {
        [&self.title, &self.category, &self.brand, &self.price, &self.keywords, &self.attributes]
    }

    pub(crate) fn new(id: String, texts: [Option<String>; 6]) -> Self {
        let [title, category, brand, price, keywords, attributes] = texts;
        Self { id, title, category, brand, price, keywords, attributes }
    }
}

static ITEM_FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    let texts = TEXTS.map(|name| Field::new(name, DataType::Utf8, true));
    std::iter::once(Field::new("id", DataType::Utf8, false)).chain(texts).collect()
});

static USER_FIELDS: LazyLock<Fields> =
    LazyLock::new(|| vec![Field::new("user", DataType::UInt32, false), Field::new("id", DataType::Utf8, false)].into());

/// A Parquet file being written in row groups.
struct TableFile {
    writer: ArrowWriter<HashingFile>,
    schema: Arc<Schema>,
    relative: String,
    rows: u64,
}

impl TableFile {
    fn create(root: &Path, relative: String, fields: &Fields) -> Result<Self, ParquetError> {
        let schema = Arc::new(Schema::new(fields.clone()));
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(Default::default())).build();
        let writer =
            ArrowWriter::try_new(HashingFile::create(&root.join(&relative))?, schema.clone(), Some(properties))?;
        Ok(Self { writer, schema, relative, rows: 0 })
    }

    fn write(&mut self, columns: Vec<ArrayRef>) -> Result<(), ParquetError> {
        let batch = RecordBatch::try_new(self.schema.clone(), columns)?;
        self.rows += batch.num_rows() as u64;
        self.writer.write(&batch)
    }

    fn finish(self) -> Result<FileEntry, ParquetError> {
        Ok(self.writer.into_inner()?.finish()?.entry(self.relative, self.rows))
    }
}

/// Writes `items/part-*.parquet` with at most `file_rows` items each.
pub(crate) fn write_items<'a>(
    root: &Path,
    items: impl Iterator<Item = &'a Item>,
    file_rows: usize,
    progress: &dyn Progress,
) -> Result<Vec<FileEntry>, ParquetError> {
    let mut items = items.peekable();
    let mut entries = Vec::new();
    while items.peek().is_some() {
        let mut file = TableFile::create(root, format!("items/part-{:05}.parquet", entries.len()), &ITEM_FIELDS)?;
        let mut left = file_rows;
        while left > 0 && items.peek().is_some() {
            let rows: Vec<&Item> = items.by_ref().take(left.min(8192)).collect();
            let ids = StringArray::from_iter_values(rows.iter().map(|item| &item.id));
            let texts = (0..TEXTS.len()).map(|text| {
                let column: StringArray = rows.iter().map(|item| item.texts()[text].as_deref()).collect();
                Arc::new(column) as ArrayRef
            });
            file.write(std::iter::once(Arc::new(ids) as ArrayRef).chain(texts).collect())?;
            left -= rows.len();
            progress.advance(rows.len() as u64);
        }
        entries.push(file.finish()?);
    }
    Ok(entries)
}

/// Writes `users/part-*.parquet`; ids arrive in the order of user numbers.
pub(crate) struct UserWriter<'a> {
    root: &'a Path,
    file_rows: u64,
    file: Option<TableFile>,
    entries: Vec<FileEntry>,
    next: u32,
}

impl<'a> UserWriter<'a> {
    pub(crate) fn new(root: &'a Path, file_rows: usize) -> Self {
        Self { root, file_rows: file_rows as u64, file: None, entries: Vec::new(), next: 0 }
    }

    pub(crate) fn write(&mut self, ids: &[&str]) -> Result<(), ParquetError> {
        for ids in ids.chunks(8192) {
            let file = match &mut self.file {
                Some(file) => file,
                none => {
                    let relative = format!("users/part-{:05}.parquet", self.entries.len());
                    none.insert(TableFile::create(self.root, relative, &USER_FIELDS)?)
                }
            };
            let numbers = UInt32Array::from_iter_values(self.next..self.next + ids.len() as u32);
            file.write(vec![Arc::new(numbers), Arc::new(StringArray::from_iter_values(ids))])?;
            self.next += ids.len() as u32;
            if file.rows >= self.file_rows {
                self.entries.extend(self.file.take().map(TableFile::finish).transpose()?);
            }
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Vec<FileEntry>, ParquetError> {
        self.entries.extend(self.file.take().map(TableFile::finish).transpose()?);
        Ok(self.entries)
    }
}

/// Reads the items of all files, in order of their index, after checking the files' SHA-256.
pub(crate) fn read_items<'a>(
    dir: &Path,
    files: impl Iterator<Item = &'a FileEntry>,
) -> Result<Vec<Item>, DatasetError> {
    let mut items: Vec<Item> = Vec::new();
    for entry in files {
        read_table(dir, entry, &ITEM_FIELDS, |batch| {
            let columns: Vec<&StringArray> = batch.columns().iter().map(|column| column.as_string()).collect();
            for row in 0..batch.num_rows() {
                let text = |column: usize| columns[column].is_valid(row).then(|| columns[column].value(row).to_owned());
                let item = Item::new(columns[0].value(row).to_owned(), std::array::from_fn(|i| text(i + 1)));
                if items.last().is_some_and(|before| before.id >= item.id) {
                    return Err(format!("item \"{}\" is out of order", item.id));
                }
                items.push(item);
            }
            Ok(())
        })?;
    }
    Ok(items)
}

/// Reads the ids of all users, in order of their number.
pub(crate) fn read_users<'a>(
    dir: &Path,
    files: impl Iterator<Item = &'a FileEntry>,
) -> Result<Vec<String>, DatasetError> {
    let mut users = Vec::new();
    for entry in files {
        read_table(dir, entry, &USER_FIELDS, |batch| {
            let numbers = batch.column(0).as_primitive::<arrow_array::types::UInt32Type>().values();
            let ids = batch.column(1).as_string::<i32>();
            for (row, &number) in numbers.iter().enumerate() {
                if number as usize != users.len() {
                    return Err(format!("user number {number} is out of order"));
                }
                users.push(ids.value(row).to_owned());
            }
            Ok(())
        })?;
    }
    Ok(users)
}

fn read_table(
    dir: &Path,
    entry: &FileEntry,
    fields: &Fields,
    mut each: impl FnMut(&RecordBatch) -> Result<(), String>,
) -> Result<(), DatasetError> {
    let path = dir.join(&entry.path);
    let damaged = |problem: &dyn ToString| DatasetError::damaged(MadeBy::Prepare, &path, problem.to_string());
    // The Parquet decoder panics on some damaged files, so what it gets is checked first.
    files::verify(MadeBy::Prepare, &path, entry, &())?;
    let file = std::fs::File::open(&path).map_err(DatasetError::io(&path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| damaged(&error))?;
    if reader.schema().fields() != fields {
        return Err(damaged(&format!("its columns are {:?} instead of {fields:?}", reader.schema().fields())));
    }
    let mut rows = 0;
    for batch in reader.with_batch_size(8192).build().map_err(|error| damaged(&error))? {
        let batch = batch.map_err(|error| damaged(&error))?;
        rows += batch.num_rows() as u64;
        each(&batch).map_err(|problem| damaged(&problem))?;
    }
    if rows != entry.rows {
        return Err(damaged(&format!("it has {rows} rows, dataset.json says {}", entry.rows)));
    }
    Ok(())
}
