//! Which item a row of a foreign file belongs to.
//!
//! Input: the ids of the rows, or only their number. Output: item indexes. Pure but for the path in its errors.

use std::collections::HashMap;
use std::path::Path;

use learn_dataset::Item;

use super::VectorError;

/// Finds the items of rows by id; each item at most once, and at the end each item exactly once.
pub(super) struct Matching<'a> {
    path: &'a Path,
    items: &'a [Item],
    index: HashMap<&'a str, usize>,
    row_of: Vec<Option<usize>>,
    ignored: usize,
}

impl<'a> Matching<'a> {
    pub(super) fn new(path: &'a Path, items: &'a [Item]) -> Self {
        let index = items.iter().enumerate().map(|(index, item)| (item.id.as_str(), index)).collect();
        Self { path, items, index, row_of: vec![None; items.len()], ignored: 0 }
    }

    /// The item of a row; none if the dataset does not have it.
    pub(super) fn item(&mut self, row: usize, id: &str) -> Result<Option<usize>, VectorError> {
        let Some(&item) = self.index.get(id) else {
            self.ignored += 1;
            return Ok(None);
        };
        if let Some(earlier) = self.row_of[item].replace(row) {
            return Err(VectorError::Invalid {
                path: self.path.into(),
                problem: format!("has item {id:?} twice, in rows {earlier} and {row}; keep one"),
            });
        }
        Ok(Some(item))
    }

    /// Says how many rows belonged to no item, once every item has its row.
    pub(super) fn finish(self) -> Result<usize, VectorError> {
        let mut missing = self.row_of.iter().enumerate().filter(|(_, row)| row.is_none());
        if let Some((first, _)) = missing.next() {
            return Err(VectorError::Invalid {
                path: self.path.into(),
                problem: format!(
                    "has no row for {} of the dataset's {} items, for example item {:?}; add them, or leave the items \
                     out of prepare ({} rows had ids that the dataset does not know)",
                    1 + missing.count(),
                    self.items.len(),
                    self.items[first].id,
                    self.ignored
                ),
            });
        }
        Ok(self.ignored)
    }
}

/// Checks that rows without ids can be taken in item order.
///
/// # Errors
/// The count differs, or the items' ids are themselves row numbers in another order, so that the order is unknown.
pub(super) fn in_item_order(path: &Path, rows: usize, items: &[Item], remedy: &str) -> Result<(), VectorError> {
    let invalid = |problem| Err(VectorError::Invalid { path: path.into(), problem });
    if rows != items.len() {
        return invalid(format!(
            "has {rows} rows but the dataset has {} items; bring one row per item in the order of the dataset's items/ \
             files, or say whose rows they are: {remedy}",
            items.len(),
        ));
    }
    let numbers = || items.iter().map(|item| item.id.parse::<usize>().ok());
    let all_row_numbers = numbers().all(|id| id.is_some_and(|id| id < rows));
    if let Some((index, item)) =
        items.iter().enumerate().find(|(index, item)| item.id.parse() != Ok(*index)).filter(|_| all_row_numbers)
    {
        return invalid(format!(
            "does not say whose rows they are: the item ids are row numbers themselves, but the item at index {index} \
             has id {:?}; add {remedy}",
            item.id,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(ids: &[&str]) -> Vec<Item> {
        let item = |id: &&str| Item {
            id: (*id).into(),
            title: None,
            category: None,
            brand: None,
            price: None,
            keywords: None,
            attributes: None,
        };
        ids.iter().map(item).collect()
    }

    #[test]
    fn rows_find_their_items_whatever_the_order() {
        let items = items(&["a", "b"]);
        let mut matching = Matching::new(Path::new("v.npy"), &items);
        assert_eq!(matching.item(0, "b").unwrap(), Some(1));
        assert_eq!(matching.item(1, "x").unwrap(), None);
        assert_eq!(matching.item(2, "a").unwrap(), Some(0));
        assert_eq!(matching.finish().unwrap(), 1);
    }

    #[test]
    fn twice_and_never_are_named() {
        let items = items(&["a", "b"]);
        let mut matching = Matching::new(Path::new("v.npy"), &items);
        matching.item(0, "b").unwrap();
        assert!(matching.item(5, "b").unwrap_err().to_string().contains("item \"b\" twice, in rows 0 and 5"));
        assert!(
            matching.finish().unwrap_err().to_string().contains("1 of the dataset's 2 items, for example item \"a\"")
        );
    }

    #[test]
    fn order_is_taken_only_when_it_is_known() {
        let path = Path::new("v.npy");
        let check = |rows, ids: &[&str]| in_item_order(path, rows, &items(ids), "ids").map_err(|e| e.to_string());
        assert_eq!(check(2, &["B01", "B02"]), Ok(()));
        assert_eq!(check(3, &["0", "1", "2"]), Ok(()));
        assert_eq!(check(2, &["7", "9"]), Ok(()));
        assert!(check(1, &["B01", "B02"]).unwrap_err().contains("1 rows but the dataset has 2 items"));
        let shuffled = check(3, &["0", "2", "1"]).unwrap_err();
        assert!(shuffled.contains("the item at index 1 has id \"2\""), "{shuffled}");
    }
}
