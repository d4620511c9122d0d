//! Conversion labels: truth values, 0 and 1, or numbers with a threshold.

use super::input::Cells;

/// What counts as a conversion.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LabelRule {
    /// A number of at least this; `None` = 1 is a conversion, 0 is none, anything else is no label.
    pub(crate) at_least: Option<f64>,
}

impl LabelRule {
    /// `None` for a number that says neither yes nor no.
    pub(crate) fn number(self, value: f64) -> Option<bool> {
        match self.at_least {
            Some(at_least) => value.is_finite().then_some(value >= at_least),
            None if value == 0.0 => Some(false),
            None if value == 1.0 => Some(true),
            None => None,
        }
    }

    /// A truth value counts as 1 or 0.
    pub(crate) fn parse(self, text: &str) -> Option<bool> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("true") {
            self.number(1.0)
        } else if text.eq_ignore_ascii_case("false") {
            self.number(0.0)
        } else {
            text.parse().ok().and_then(|value| self.number(value))
        }
    }

    /// The label of each cell; `None` where there is none.
    pub(crate) fn all(self, cells: &Cells) -> Vec<Option<bool>> {
        match cells {
            Cells::Int(cells) => cells.iter().map(|cell| cell.and_then(|value| self.number(value as f64))).collect(),
            Cells::Real(cells) => cells.iter().map(|cell| cell.and_then(|value| self.number(value))).collect(),
            Cells::Since1970(cells, _) => vec![None; cells.len()],
            Cells::Text(cells) => cells.iter().map(|cell| cell.and_then(|text| self.parse(text))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_threshold_only_yes_and_no_are_labels() {
        let rule = LabelRule { at_least: None };
        let yes = ["1", "1.0", " true ", "True"];
        let no = ["0", "-0.0", "false", "0e3"];
        assert!(yes.iter().all(|text| rule.parse(text) == Some(true)));
        assert!(no.iter().all(|text| rule.parse(text) == Some(false)));
        assert!(["", "2", "0.5", "nan", "inf", "yes"].iter().all(|text| rule.parse(text).is_none()));
    }

    #[test]
    fn a_threshold_belongs_to_the_conversions() {
        let rule = LabelRule { at_least: Some(4.0) };
        assert_eq!(["3.99", "4", "5.0", "-1"].map(|text| rule.parse(text)), [false, true, true, false].map(Some));
        assert_eq!(["nan", "inf", "-inf", "x"].map(|text| rule.parse(text)), [None; 4]);
        assert_eq!(rule.parse("true"), Some(false), "a truth value is 1, and 1 is below 4");
    }
}
