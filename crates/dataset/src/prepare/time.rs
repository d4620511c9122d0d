//! Times as ordered 64-bit integers: numbers of any unit, or dates and timestamps.
//!
//! A whole number is kept as it is, whatever it was written as (`881250949`, `881250949.0`). A fraction is kept in
//! millionths; when some time of the input has one, all times are brought to millionths after reading, and the
//! manifest says so (`time_scale`).
//!
//! A time that brings its unit, a timestamp or a date of Parquet or the text of one (ISO 8601), is kept in microseconds
//! since 1970 in UTC, whatever unit its file counts in: so the same moment is the same number in every file. What is
//! finer is cut off. A number has no unit to compare it with them, so one input has either ([`Clock`]).

use std::fmt;

use chrono::format::{Parsed, StrftimeItems, parse};
use chrono::{NaiveDate, NaiveTime};

/// What times with a fraction are multiplied by; finer fractions are rounded.
pub(crate) const SCALE: i64 = 1_000_000;

/// A time as it is kept while reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) value: i64,
    /// In millionths.
    pub(crate) scaled: bool,
}

/// What the times of an input count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// Numbers, in a unit that only the input's owner knows.
    Numbers,
    /// Microseconds since 1970 in UTC.
    Calendar,
}

/// What a date or a timestamp counts since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tick {
    Days,
    Seconds,
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

impl fmt::Display for Tick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Days => "days",
            Self::Seconds => "seconds",
            Self::Milliseconds => "milliseconds",
            Self::Microseconds => "microseconds",
            Self::Nanoseconds => "nanoseconds",
        })
    }
}

/// A time as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) time: Time,
    pub(crate) clock: Clock,
}

impl Stamp {
    pub(crate) fn whole(value: i64) -> Self {
        Self { time: Time { value, scaled: false }, clock: Clock::Numbers }
    }

    /// `None` for NaN, infinities and what 64 bits do not hold.
    pub(crate) fn real(value: f64) -> Option<Self> {
        const LIMIT: f64 = (1_u64 << 63) as f64;
        let scaled = value.is_finite() && value.fract() != 0.0;
        let value = if scaled { (value * SCALE as f64).round() } else { value };
        (value.abs() < LIMIT).then_some(Self { time: Time { value: value as i64, scaled }, clock: Clock::Numbers })
    }

    /// `None` for what 64 bits of microseconds do not hold: beyond 290,000 years from 1970.
    pub(crate) fn since_1970(count: i64, tick: Tick) -> Option<Self> {
        let micros = match tick {
            Tick::Days => count.checked_mul(86_400 * 1_000_000),
            Tick::Seconds => count.checked_mul(1_000_000),
            Tick::Milliseconds => count.checked_mul(1000),
            Tick::Microseconds => Some(count),
            Tick::Nanoseconds => Some(count.div_euclid(1000)),
        };
        micros.map(|value| Self { time: Time { value, scaled: false }, clock: Clock::Calendar })
    }

    /// A number, or a date or time of ISO 8601.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let number = text.parse().map(Self::whole).ok().or_else(|| text.parse().ok().and_then(Self::real));
        number.or_else(|| Self::since_1970(iso_8601(text)?, Tick::Microseconds))
    }
}

impl Time {
    /// The time in the unit of the whole input; `None` if it does not fit.
    pub(crate) fn at_scale(self, scale: i64) -> Option<i64> {
        if self.scaled { Some(self.value) } else { self.value.checked_mul(scale) }
    }
}

/// Microseconds since 1970 of a date, or of a date and a time with or without an offset from UTC, as ISO 8601 and RFC 3339
/// write them; a space may stand for the `T`, and `UTC` for the `Z`. Without an offset it is UTC.
fn iso_8601(text: &str) -> Option<i64> {
    // chrono takes `10-11-20` for the year 10
    let (year, _) = text.split_once('-')?;
    if year.len() != 4 || !year.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let (date, rest) = NaiveDate::parse_and_remainder(text, "%Y-%m-%d").ok()?;
    if rest.is_empty() {
        return Some(date.and_time(NaiveTime::MIN).and_utc().timestamp_micros());
    }
    let rest = rest.strip_prefix(['T', 't', ' '])?;
    let clock = NaiveTime::parse_and_remainder(rest, "%H:%M:%S%.f");
    let (time, offset) = clock.or_else(|_| NaiveTime::parse_and_remainder(rest, "%H:%M")).ok()?;
    let east = match offset.trim_start() {
        "" | "UTC" => 0,
        offset => {
            let mut parsed = Parsed::new();
            parse(&mut parsed, offset, StrftimeItems::new("%#z")).ok()?;
            parsed.to_fixed_offset().ok()?.local_minus_utc()
        }
    };
    Some(date.and_time(time).and_utc().timestamp_micros() - i64::from(east) * 1_000_000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(value: i64, scaled: bool) -> Option<Stamp> {
        Some(Stamp { time: Time { value, scaled }, clock: Clock::Numbers })
    }

    #[test]
    fn whole_numbers_are_the_same_however_they_are_written() {
        let expected = number(881_250_949, false);
        for text in ["881250949", " 881250949.0 ", "8.81250949e8"] {
            assert_eq!(Stamp::parse(text), expected, "{text}");
        }
        assert_eq!(Stamp::real(881_250_949.0), expected);
        assert_eq!(Stamp::parse("-9223372036854775808"), number(i64::MIN, false));
        assert_eq!(Stamp::parse("20201110"), number(20_201_110, false));
    }

    #[test]
    fn fractions_are_millionths_and_keep_their_order() {
        assert_eq!(Stamp::real(1.5), number(1_500_000, true));
        assert_eq!(Stamp::whole(2).time.at_scale(SCALE), Some(2_000_000));
        assert_eq!(Stamp::whole(i64::MAX).time.at_scale(SCALE), None);
        assert!(Stamp::parse("-1.5").unwrap().time.value < Stamp::parse("-1.25").unwrap().time.value);
    }

    #[test]
    fn the_same_moment_is_the_same_number_in_every_unit() {
        let ticks = [
            (18_576, Tick::Days),
            (1_604_966_400, Tick::Seconds),
            (1_604_966_400_000, Tick::Milliseconds),
            (1_604_966_400_000_000, Tick::Microseconds),
            (1_604_966_400_000_000_999, Tick::Nanoseconds),
        ];
        for (count, tick) in ticks {
            let expected = Time { value: 1_604_966_400_000_000, scaled: false };
            assert_eq!(
                Stamp::since_1970(count, tick),
                Some(Stamp { time: expected, clock: Clock::Calendar }),
                "{count} {tick}"
            );
            assert_eq!(Stamp::parse("2020-11-10"), Stamp::since_1970(count, tick));
        }
        assert_eq!(Stamp::since_1970(-1, Tick::Nanoseconds), Stamp::since_1970(-1, Tick::Microseconds));
        assert_eq!(Stamp::since_1970(i64::MAX, Tick::Milliseconds), None);
    }

    #[test]
    fn iso_8601_is_read_as_it_is_written_in_the_field() {
        let (second, minute) = (1_604_991_197_000_000, 1_604_991_180_000_000);
        let cases = [
            ("2020-11-10T06:53:17", second),
            ("2020-11-10T06:53:17Z", second),
            ("2020-11-10t06:53:17z", second),
            ("2020-11-10 06:53:17", second),
            ("2020-11-10 06:53:17 UTC", second),
            ("2020-11-10T06:53:17+00:00", second),
            ("2020-11-10T15:53:17+09:00", second),
            ("2020-11-10T15:53:17+0900", second),
            ("2020-11-10 15:53:17+09", second),
            ("2020-11-09T22:53:17.000-08:00", second),
            ("2020-11-10T06:53:17.25Z", second + 250_000),
            ("2020-11-10T06:53:17.123456789", second + 123_456),
            ("2020-11-10T06:53", minute),
            ("2020-11-10T06:53Z", minute),
            (" 2020-11-10 06:53 ", minute),
            ("1969-12-31T23:59:59.999999Z", -1),
        ];
        for (text, micros) in cases {
            assert_eq!(Stamp::parse(text), Stamp::since_1970(micros, Tick::Microseconds), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        let texts = [
            "",
            "nan",
            "NaN",
            "inf",
            "-inf",
            "1e30",
            "12x",
            "yesterday",
            "06:53:17",
            "10-11-20",
            "10-11-2020",
            "11/10/2020",
            "2020-13-01",
            "2020-02-30",
            "2020-11-10T",
            "2020-11-10T25:00:00",
            "2020-11-10T06:53:61",
            "2020-11-10T06:53:17 PST",
            "2020-11-10T06:53:17+99:00",
            "2020-11-10x06:53:17",
            "+020-11-10",
        ];
        for text in texts {
            assert_eq!(Stamp::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_later_moment_is_never_a_smaller_number(one: i64, other: i64, tick in 0_usize..5) {
            let all = [Tick::Days, Tick::Seconds, Tick::Milliseconds, Tick::Microseconds, Tick::Nanoseconds];
            let value = |count| Stamp::since_1970(count, all[tick]).map(|stamp| stamp.time.value);
            if let (Some(first), Some(second)) = (value(one.min(other)), value(one.max(other))) {
                prop_assert!(first <= second);
            }
        }

        #[test]
        fn what_chrono_writes_is_read_back(micros in -62_135_596_800_000_000_i64..253_402_300_800_000_000, hours in -14..=14) {
            let moment = chrono::DateTime::from_timestamp_micros(micros).unwrap();
            let expected = Stamp::since_1970(micros, Tick::Microseconds);
            prop_assert_eq!(Stamp::parse(&moment.format("%Y-%m-%d %H:%M:%S%.6f").to_string()), expected);
            let zone = chrono::FixedOffset::east_opt(hours * 3600).unwrap();
            let local = moment.with_timezone(&zone);
            if (0..=9999).contains(&chrono::Datelike::year(&local)) {
                prop_assert_eq!(Stamp::parse(&local.to_rfc3339()), expected);
            }
        }

        #[test]
        fn no_text_breaks_the_parser(text in "[0-9TZ:.+ \\-é]{0,40}", any in ".{0,40}") {
            let _ = (Stamp::parse(&text), Stamp::parse(&any), Stamp::parse(&format!("2020-11-10T06:53{text}")));
        }
    }
}
