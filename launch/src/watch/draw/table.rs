//! A table that leaves out the columns that there is no room for.

use ratatui::Frame;
use ratatui::layout::{Constraint, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Row, Table as Rows};

use super::Look;
use crate::watch::view::Tone;

/// A column by its heading.
#[derive(Clone, Copy, Debug)]
pub struct Column<'a> {
    pub name: &'a str,
    /// It stays as wide while its cells change.
    pub least: usize,
    /// Its cells stand right.
    pub right: bool,
    /// The column with the greatest number goes first.
    pub last: usize,
}

/// Rows with their tones, a cell for each column.
pub struct Table<'a> {
    pub columns: &'a [Column<'a>],
    pub rows: Vec<(Tone, Vec<String>)>,
    pub look: Look,
}

/// The first of `all` rows that is seen where `fits` fit and `scroll` are above.
pub fn first(all: usize, fits: usize, scroll: usize) -> usize {
    scroll.min(all.saturating_sub(fits))
}

impl Table<'_> {
    pub fn draw(self, frame: &mut Frame<'_>, area: Rect, scroll: usize) {
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| self.width(column)).collect();
        let shown = shown(self.columns, &widths, usize::from(area.width));
        let pick = |cells: &[String]| -> Vec<Line<'static>> {
            let cell = |column: &usize| {
                let line = Line::raw(cells.get(*column).cloned().unwrap_or_default());
                if self.columns[*column].right { line.right_aligned() } else { line }
            };
            shown.iter().map(cell).collect()
        };
        let row = |(tone, cells): &(Tone, Vec<String>)| {
            let mark = Line::from(Span::raw(tone.mark()));
            Row::new(std::iter::once(mark).chain(pick(cells))).style(self.look.tone(*tone))
        };
        let fits = usize::from(area.height.saturating_sub(1));
        let rows = self.rows.iter().skip(first(self.rows.len(), fits, scroll)).take(fits).map(row);
        let names: Vec<String> = self.columns.iter().map(|column| column.name.to_owned()).collect();
        let heading = Row::new(std::iter::once(Line::default()).chain(pick(&names))).style(self.look.dim());
        let constraints = shown.iter().map(|column| Constraint::Length(widths[*column] as u16));
        let constraints = std::iter::once(Constraint::Length(1)).chain(constraints);
        frame.render_widget(Rows::new(rows, constraints).header(heading).column_spacing(1), area);
    }

    fn width(&self, column: usize) -> usize {
        let Column { name, least, .. } = self.columns[column];
        let cells = self.rows.iter().filter_map(|(_, cells)| cells.get(column));
        cells.map(|cell| Span::raw(cell).width()).chain([name.len(), least]).max().unwrap_or_default()
    }
}

/// The places of the columns that fit, in their order; the first one always does.
fn shown(columns: &[Column<'_>], widths: &[usize], room: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..columns.len()).collect();
    order.sort_by_key(|column| columns[*column].last);
    // the mark before each row
    let mut used = 1;
    let fits = |column: &usize| {
        used += widths[*column] + 1;
        used <= room
    };
    let mut shown: Vec<usize> = order.into_iter().take_while(fits).collect();
    if shown.is_empty() {
        shown.extend(columns.first().map(|_| 0));
    }
    shown.sort_unstable();
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_go_by_their_weight_and_stay_in_their_order() {
        let column = |last| Column { name: "c", least: 4, right: false, last };
        let columns = [column(0), column(3), column(1), column(2)];
        let at = |room| shown(&columns, &[4, 4, 4, 4], room);
        assert_eq!(at(21), [0, 1, 2, 3]);
        assert_eq!(at(20), [0, 2, 3]);
        assert_eq!(at(11), [0, 2]);
        assert_eq!(at(3), [0]);
        assert_eq!((first(10, 4, 2), first(10, 4, 9), first(3, 4, 2)), (2, 6, 0), "the last page is full");
    }
}
