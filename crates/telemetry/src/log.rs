//! The one tracing set-up of every binary: a line an event on stderr, so that stdout stays for results.
//!
//! Input: events, and the place of this process in its job ([`crate::place`]). Output: text, `TIME LEVEL run=… generation=…
//! rank=… step=…: MESSAGE FIELDS`, or JSON with the same as members. Invariant: an event is one line whatever its message
//! holds, so that lines can be counted, filtered and sorted.

use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Json, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::place;

/// The filter when neither `LEARN_LOG` nor `RUST_LOG` is set.
const DEFAULT_FILTER: &str = "info";
/// `json` or `text`; processes inherit it from the one that starts them.
pub const FORMAT_VARIABLE: &str = "LEARN_LOG_FORMAT";

static JSON: AtomicBool = AtomicBool::new(false);

/// Starts logging to stderr; the first record names the `role`, the process and the version.
///
/// The filter is `LEARN_LOG`, else `RUST_LOG`, else `info`. JSON is written if `json` says so, or `LEARN_LOG_FORMAT`. A
/// second call changes nothing.
pub fn init(role: &'static str, json: bool) {
    init_at(role, json, DEFAULT_FILTER);
}

/// As [`init`], with another filter than `info` when the environment has none.
pub fn init_at(role: &'static str, json: bool, default_filter: &str) {
    let json = json || std::env::var(FORMAT_VARIABLE).is_ok_and(|format| format == "json");
    JSON.store(json, Ordering::Relaxed);
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // it would be told of on stderr, where it has just failed, by a macro that panics then
        .log_internal_errors(false)
        .with_env_filter(filter(default_filter))
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let started = if json {
        builder.fmt_fields(JsonFields::new()).event_format(JsonLine::new(role)).try_init()
    } else {
        builder.event_format(TextLine).try_init()
    };
    if started.is_ok() {
        tracing::info!(role, pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "started");
    }
}

/// Whether this process logs JSON, so that those it starts do, too.
#[must_use]
pub fn is_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

fn filter(default_filter: &str) -> EnvFilter {
    let wanted = ["LEARN_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    EnvFilter::new(wanted.as_deref().unwrap_or(default_filter))
}

/// Lines for people.
struct TextLine;

/// A level and the colour that terminals give it.
fn level(level: Level) -> (&'static str, &'static str) {
    match level {
        Level::ERROR => ("ERROR", "31"),
        Level::WARN => (" WARN", "33"),
        Level::INFO => (" INFO", "32"),
        Level::DEBUG => ("DEBUG", "34"),
        Level::TRACE => ("TRACE", "35"),
    }
}

impl<S, N> FormatEvent<S, N> for TextLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let (name, colour) = level(*event.metadata().level());
        let ansi = writer.has_ansi_escapes();
        SystemTime.format_time(&mut writer)?;
        if ansi {
            write!(writer, " \x1b[{colour}m{name}\x1b[0m ")?
        } else {
            write!(writer, " {name} ")?
        }
        let mut text = place::with(place::Place::text);
        let spans = ctx.event_scope().into_iter().flat_map(|scope| scope.from_root());
        for span in spans {
            let extensions = span.extensions();
            let fields = extensions.get::<tracing_subscriber::fmt::FormattedFields<N>>();
            let fields = fields.map(|fields| fields.fields.as_str()).unwrap_or_default();
            let _infallible = write!(text, "{}{}{{{fields}}}", if text.is_empty() { "" } else { " " }, span.name());
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        ctx.format_fields(Writer::new(&mut text), event)?;
        writeln!(writer, "{}", one_line(&text))
    }
}

/// Line breaks of a message as `\n`.
fn one_line(text: &str) -> String {
    text.trim_end().replace('\r', "").replace('\n', "\\n")
}

/// Lines for programs.
struct JsonLine {
    inner: Format<Json>,
    role: &'static str,
}

impl JsonLine {
    fn new(role: &'static str) -> Self {
        Self { inner: Format::default().json().with_target(false), role }
    }
}

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        let mut head = format!("{{\"role\":\"{}\",\"pid\":{},", self.role, std::process::id());
        place::with(|place| place.members(&mut head))?;
        // an object that begins with its timestamp
        write!(writer, "{head}{}", line.strip_prefix('{').unwrap_or(&line))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;
    use crate::place::{Field, set, set_rank, set_run};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    impl Lines {
        fn taken(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    #[test]
    fn a_second_start_is_harmless() {
        init("test", false);
        init("test", true);
    }

    #[test]
    fn an_event_is_one_line_with_its_place_in_both_formats() {
        let (text, json) = (Lines::default(), Lines::default());
        let builder = || tracing_subscriber::fmt().with_ansi(false);
        let plain = builder().with_writer(text.clone()).event_format(TextLine).finish();
        let objects = builder()
            .with_writer(json.clone())
            .fmt_fields(JsonFields::new())
            .event_format(JsonLine::new("worker"))
            .finish();
        set_run("shop");
        set_rank(2, 1);
        set(Field::Step, 30);
        let say = || tracing::warn!(bytes = 3, step = 31, "cannot write:\nthe disk is \"full\"");
        let elsewhere = |subscriber: tracing::Dispatch| {
            // a thread of its own has the place as well
            std::thread::scope(|scope| {
                scope.spawn(|| tracing::dispatcher::with_default(&subscriber, say)).join().unwrap()
            });
        };
        elsewhere(plain.into());
        elsewhere(objects.into());

        let [line] = text.taken().try_into().unwrap();
        let wanted =
            "  WARN run=shop generation=2 rank=1 step=30: cannot write:\\nthe disk is \"full\" bytes=3 step=31";
        assert!(line.ends_with(wanted), "{line}");
        let [line] = json.taken().try_into().unwrap();
        let place = format!(
            r#"{{"role":"worker","pid":{},"run":"shop","generation":2,"rank":1,"step":30,"#,
            std::process::id()
        );
        assert!(line.starts_with(&place), "{line}");
        let fields = r#""fields":{"message":"cannot write:\nthe disk is \"full\"","bytes":3,"step":31}}"#;
        assert!(line.contains(r#""level":"WARN""#) && line.ends_with(fields), "{line}");
    }
}
