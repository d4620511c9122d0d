//! Times of any unit, integer or real, as ordered 64-bit integers.
//!
//! A whole number is kept as it is, whatever it was written as (`881250949`, `881250949.0`). A fraction is kept in
//! millionths; when some time of the input has one, all times are brought to millionths after reading, and the
//! manifest says so (`time_scale`).

/// What times with a fraction are multiplied by; finer fractions are rounded.
pub(crate) const SCALE: i64 = 1_000_000;

/// A time as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) value: i64,
    /// In millionths.
    pub(crate) scaled: bool,
}

impl Time {
    pub(crate) fn whole(value: i64) -> Self {
        Self { value, scaled: false }
    }

    /// `None` for NaN, infinities and what 64 bits do not hold.
    pub(crate) fn real(value: f64) -> Option<Self> {
        const LIMIT: f64 = (1_u64 << 63) as f64;
        let scaled = value.is_finite() && value.fract() != 0.0;
        let value = if scaled { (value * SCALE as f64).round() } else { value };
        (value.abs() < LIMIT).then_some(Self { value: value as i64, scaled })
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        text.parse().map(Self::whole).ok().or_else(|| text.parse().ok().and_then(Self::real))
    }

    /// The time in the unit of the whole input; `None` if it does not fit.
    pub(crate) fn at_scale(self, scale: i64) -> Option<i64> {
        if self.scaled { Some(self.value) } else { self.value.checked_mul(scale) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_the_same_however_they_are_written() {
        let expected = Some(Time::whole(881_250_949));
        assert_eq!(Time::parse("881250949"), expected);
        assert_eq!(Time::parse(" 881250949.0 "), expected);
        assert_eq!(Time::parse("8.81250949e8"), expected);
        assert_eq!(Time::real(881_250_949.0), expected);
        assert_eq!(Time::parse("-9223372036854775808").unwrap().value, i64::MIN);
    }

    #[test]
    fn fractions_are_millionths_and_keep_their_order() {
        assert_eq!(Time::real(1.5), Some(Time { value: 1_500_000, scaled: true }));
        assert_eq!(Time::whole(2).at_scale(SCALE), Some(2_000_000));
        assert_eq!(Time::whole(i64::MAX).at_scale(SCALE), None);
        assert!(Time::parse("-1.5").unwrap().value < Time::parse("-1.25").unwrap().value);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "nan", "NaN", "inf", "-inf", "2018-01-01", "1e30", "12x"] {
            assert_eq!(Time::parse(text), None, "{text}");
        }
    }
}
