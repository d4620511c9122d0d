//! The items files: ids and texts, in memory (memory may grow with items).

use learn_domain::config::ItemsConfig;

use super::error::{BadRows, Defect, DefectKind, PrepareError, shown};
use super::input::{self, Cells, Chunk, Role};
use super::interner::Interner;
use crate::catalogue::Item;
use crate::progress::{Progress, Unit};

/// The items that interactions may name.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) ids: Interner,
    /// By number; empty when there are no items files.
    items: Vec<Item>,
    /// Every item is known; an interaction with another one is a bad row.
    pub(crate) closed: bool,
}

impl Catalogue {
    /// The item of a number.
    pub(crate) fn item(&mut self, number: u32) -> Item {
        match self.items.get_mut(number as usize) {
            Some(item) => std::mem::take(item),
            None => Item { id: self.ids.get(number).to_owned(), ..Item::default() },
        }
    }
}

impl Catalogue {
    /// Adds the items of a chunk; rows that cannot be used go to `defects`.
    fn take(&mut self, chunk: &Chunk, defects: &mut Vec<Defect>) -> Result<(), PrepareError> {
        for position in 0..chunk.len {
            let cell = |column: &Option<Cells>| column.as_ref().and_then(|cells| cells.text(position));
            let row = chunk.rows.at(position);
            let Some(id) = cell(&chunk.columns[0]) else {
                defects.push(Defect { row, kind: DefectKind::MissingId, problem: "it has no item id".into() });
                continue;
            };
            if !self.ids.intern(&id)?.1 {
                let problem = format!("item \"{}\" was there before", shown(&id));
                defects.push(Defect { row, kind: DefectKind::DuplicateItem, problem });
                continue;
            }
            self.items.push(Item::new(id, std::array::from_fn(|text| cell(&chunk.columns[text + 1]))));
        }
        Ok(())
    }
}

/// Reads all items files; without any the catalogue is open and empty.
pub(crate) fn read(
    config: &ItemsConfig,
    bad: &mut BadRows,
    progress: &dyn Progress,
) -> Result<Catalogue, PrepareError> {
    let mut catalogue = Catalogue { ids: Interner::new("items"), items: Vec::new(), closed: !config.files.is_empty() };
    if !catalogue.closed {
        return Ok(catalogue);
    }
    progress.stage("read items", Some(super::check::total_bytes(&config.files)?), Unit::Bytes);
    for path in &config.files {
        input::stream(path, Role::Items(config), |mut chunk| {
            super::refuse_stop(progress)?;
            let mut defects = std::mem::take(&mut chunk.defects);
            catalogue.take(&chunk, &mut defects)?;
            bad.take(path, defects)?;
            progress.advance(chunk.bytes);
            Ok(())
        })?;
    }
    Ok(catalogue)
}
