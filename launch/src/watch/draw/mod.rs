//! A [`View`] on a screen of any size: what does not fit goes, the least important first.
//!
//! Input: a view, what somebody has chosen, whether there is colour. Output: cells. Nothing is shown by colour alone.

mod chart;
mod look;
mod table;

use chart::{Chart, bars};
pub use look::Look;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Modifier;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph};
use table::{Column, Table};

use super::keys::{Choice, Pane};
use super::view::{CheckpointRow, Curve, EvaluationRow, EventRow, RankRow, Tone, View};

/// From this width on two parts stand beside each other,
const TWO: u16 = 76;
/// and three from this on, if there are so many rows.
const THREE: (u16, u16) = (110, 30);
/// From this width on evaluations are shown with all their metrics beside the events.
const ALL_METRICS: u16 = 140;
/// Width of the figures beside the curves.
const FIGURES: u16 = 32;
/// Fewest rows of a curve with its heading.
const CURVE: u16 = 6;
/// Columns between parts that stand beside each other.
const GAP: u16 = 2;
/// A terminal that is smaller when the watch begins gets lines.
pub const LEAST: (u16, u16) = (40, 10);

/// Draws the whole screen.
pub fn draw(frame: &mut Frame<'_>, view: &View, choice: &Choice, look: Look) {
    let screen = Screen { view, choice, look };
    let area = frame.area();
    let head = 2 + u16::from(view.alarm.is_some());
    let [top, body, foot] =
        Layout::vertical([Constraint::Length(head), Constraint::Fill(1), Constraint::Length(1)]).areas(area);
    screen.head(frame, top);
    match choice.pane {
        Pane::All if area.width >= THREE.0 && area.height >= THREE.1 => screen.all_large(frame, body),
        Pane::All => screen.all_small(frame, body),
        Pane::Curves => screen.curves(frame, body),
        Pane::Ranks => screen.ranks(frame, body),
        Pane::Events => screen.events_alone(frame, body),
    }
    screen.keys(frame, foot);
}

/// How many rows the list has that keys scroll.
pub fn rows(view: &View, pane: Pane) -> usize {
    match pane {
        Pane::All | Pane::Ranks => view.ranks.len(),
        Pane::Events => view.events.len(),
        Pane::Curves => 0,
    }
}

struct Screen<'a> {
    view: &'a View,
    choice: &'a Choice,
    look: Look,
}

impl Screen<'_> {
    fn head(&self, frame: &mut Frame<'_>, area: Rect) {
        let (view, look) = (self.view, self.look);
        let row = |row: u16| Rect { y: area.y + row, height: 1, ..area }.intersection(area);
        let (first, second, third) = (row(0), row(1), row(2));
        let mut words = vec![
            Span::styled(format!("{} ", view.tone.mark()), look.tone(view.tone)),
            Span::styled(view.name.clone(), look.strong()),
            Span::styled(format!(" {}", view.state), look.tone(view.tone)),
        ];
        if self.choice.paused {
            words.push(Span::styled(" [paused: p goes on]", look.tone(Tone::Warn)));
        }
        // as many facts as there is room for
        let mut room = usize::from(area.width).saturating_sub(Line::from(words.clone()).width());
        for fact in view.facts.iter().chain(Some(&view.running_for).filter(|text| !text.is_empty())) {
            let fact = Span::styled(format!("  {fact}"), look.dim());
            match room.checked_sub(fact.width()) {
                Some(left) => room = left,
                None => break,
            }
            words.push(fact);
        }
        frame.render_widget(Line::from(words), first);
        frame.render_widget(self.progress(second.width), second);
        if let Some(alarm) = &view.alarm {
            // what ended well has a cause as well
            let tone = if view.over && view.tone != Tone::Bad { view.tone } else { Tone::Bad };
            frame.render_widget(Line::styled(format!("{} {alarm}", tone.mark()), look.tone(tone)), third);
        }
    }

    /// Where the job is, in words and as a bar.
    fn progress(&self, width: u16) -> Line<'static> {
        let view = self.view;
        let wide = usize::from(width);
        let mut words = format!("  {}", view.steps);
        for part in [&view.left, &view.epoch] {
            if !part.is_empty() && words.len() + part.len() + 2 <= wide {
                words += &format!("  {part}");
            }
        }
        let percent = format!(" {:>3.0} %", (100.0 * view.progress).floor());
        // a bar of a few columns says nothing
        let bar = wide.saturating_sub(words.chars().count() + 2 + percent.len());
        if bar < 8 {
            return Line::raw(words);
        }
        let done = (view.progress.clamp(0.0, 1.0) * bar as f64) as usize;
        Line::from(vec![
            Span::raw(words + "  "),
            Span::styled("━".repeat(done), self.look.tone(Tone::Good)),
            Span::styled("─".repeat(bar - done), self.look.dim()),
            Span::raw(percent),
        ])
    }

    fn all_large(&self, frame: &mut Frame<'_>, area: Rect) {
        let view = self.view;
        let lists = view.evaluations.len().max(view.checkpoints.len()).max(view.events.len());
        let lower = (area.height / 4).min(lists.min(99) as u16 + 2).max(4);
        let ranks = (view.ranks.len().min(99) as u16 + 2).max(3).min((area.height - lower) / 2);
        let [curves, ranks, lower] =
            Layout::vertical([Constraint::Fill(1), Constraint::Length(ranks), Constraint::Length(lower)]).areas(area);
        let [loss, held_out, figures] =
            Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2), Constraint::Length(FIGURES)])
                .spacing(GAP)
                .areas(curves);
        self.curve(frame, loss, &view.loss);
        self.curve(frame, held_out, &view.held_out);
        self.figures(frame, figures);
        self.ranks(frame, ranks);
        self.lists(frame, lower, 0);
    }

    fn all_small(&self, frame: &mut Frame<'_>, area: Rect) {
        let view = self.view;
        let words = self.figures_in_lines(area.width, 2);
        let lines = words.len() as u16;
        let spare = area.height.saturating_sub(lines);
        let ranks_wanted = view.ranks.len().min(99) as u16 + 2;
        let events_wanted = view.events.len().min(8) as u16 + 1;
        let curve = match spare.checked_sub(CURVE + 4) {
            Some(_) => CURVE.max(spare.saturating_sub(ranks_wanted + events_wanted)),
            None => 0,
        };
        let below = spare - curve;
        let events = if below >= 6 { (below / 4).max(below.saturating_sub(ranks_wanted)).max(2) } else { 0 };
        let [figures, curves, ranks, events] = Layout::vertical([
            Constraint::Length(lines),
            Constraint::Length(curve),
            Constraint::Fill(1),
            Constraint::Length(events.min(events_wanted)),
        ])
        .areas(area);
        frame.render_widget(Paragraph::new(words), figures);
        if area.width >= TWO {
            let [left, right] =
                Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).spacing(GAP).areas(curves);
            self.curve(frame, left, &view.loss);
            self.curve(frame, right, &view.held_out);
        } else {
            self.curve(frame, curves, &view.loss);
        }
        self.ranks(frame, ranks);
        self.events(frame, events, 0);
    }

    fn curves(&self, frame: &mut Frame<'_>, area: Rect) {
        let words = self.figures_in_lines(area.width, 3);
        let [figures, curves] =
            Layout::vertical([Constraint::Length(words.len() as u16), Constraint::Fill(1)]).areas(area);
        frame.render_widget(Paragraph::new(words), figures);
        let halves = [Constraint::Fill(1), Constraint::Fill(1)];
        let [loss, held_out] = match area.width >= 2 * TWO {
            true => Layout::horizontal(halves).spacing(GAP).areas(curves),
            false => Layout::vertical(halves).areas(curves),
        };
        self.curve(frame, loss, &self.view.loss);
        self.curve(frame, held_out, &self.view.held_out);
    }

    fn events_alone(&self, frame: &mut Frame<'_>, area: Rect) {
        let lists = self.view.evaluations.len().max(self.view.checkpoints.len());
        let upper = (lists.min(99) as u16 + 2).min(area.height / 2);
        let [upper, lower] = Layout::vertical([Constraint::Length(upper), Constraint::Fill(1)]).areas(area);
        let [evaluations, checkpoints] =
            Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).spacing(GAP).areas(upper);
        self.evaluations(frame, evaluations);
        self.checkpoints(frame, checkpoints);
        self.events(frame, lower, self.choice.scroll);
    }

    /// Evaluations, checkpoints and events beside each other.
    fn lists(&self, frame: &mut Frame<'_>, area: Rect, scroll: usize) {
        let metrics = self.view.metrics.len().max(1) as u16;
        // events are the longest: the others show less where there is little room
        let (evaluations, checkpoints) = if area.width >= ALL_METRICS { (14 + 10 * metrics, 30) } else { (26, 19) };
        let [evaluations, checkpoints, events] =
            Layout::horizontal([Constraint::Length(evaluations), Constraint::Length(checkpoints), Constraint::Fill(1)])
                .spacing(GAP)
                .areas(area);
        self.evaluations(frame, evaluations);
        self.checkpoints(frame, checkpoints);
        self.events(frame, events, scroll);
    }

    /// A part under its heading; what is left for it.
    fn part(&self, frame: &mut Frame<'_>, area: Rect, title: &str) -> Rect {
        let heading = Line::from(vec![Span::styled(format!(" {title} "), self.look.title())]);
        let block = Block::new().borders(Borders::TOP).border_style(self.look.dim()).title(heading);
        let inner = block.inner(area);
        frame.render_widget(block, area);
        inner
    }

    fn curve(&self, frame: &mut Frame<'_>, area: Rect, curve: &Curve) {
        if area.height < 3 {
            return;
        }
        let inner = self.part(frame, area, &curve.title);
        if curve.line.is_empty() {
            frame.render_widget(Line::styled(format!(" {}", curve.empty), self.look.dim()), inner);
        } else {
            frame.render_widget(Chart { curve, look: self.look }, inner);
        }
    }

    fn figures(&self, frame: &mut Frame<'_>, area: Rect) {
        let inner = self.part(frame, area, "newest step");
        let name = |name: &str| Span::styled(format!("{name:<15}"), self.look.dim());
        let figures = self.view.figures.iter().map(|(text, value)| Line::from(vec![name(text), value.clone().into()]));
        let rates = self.view.rates.iter().map(|rate| {
            let room = usize::from(inner.width).saturating_sub(16 + rate.now.len());
            let bars = Span::styled(format!(" {}", bars(&rate.past, room)), self.look.curve());
            Line::from(vec![name(rate.name), rate.now.clone().into(), bars])
        });
        frame.render_widget(Paragraph::new(rates.chain(figures).collect::<Vec<_>>()), inner);
    }

    /// The same in a few lines.
    fn figures_in_lines(&self, width: u16, most: usize) -> Vec<Line<'static>> {
        let view = self.view;
        let rates = view.rates.iter().map(|rate| (rate.name, rate.now.clone()));
        let (first, others) = view.figures.split_at(view.figures.len().min(1));
        // after the loss: it is on every screen
        let figures = first.iter().cloned().chain(rates).chain(others.iter().cloned());
        let mut lines = vec![Line::default()];
        for (name, value) in figures {
            let spans = [Span::styled(format!("  {name} "), self.look.dim()), Span::raw(value)];
            let wide = spans.iter().map(Span::width).sum::<usize>();
            if lines.last().is_some_and(|line| line.width() > 0 && line.width() + wide > usize::from(width)) {
                if lines.len() == most {
                    break;
                }
                lines.push(Line::default());
            }
            if let Some(line) = lines.last_mut() {
                line.spans.extend(spans);
            }
        }
        lines.retain(|line| line.width() > 0);
        lines
    }

    fn ranks(&self, frame: &mut Frame<'_>, area: Rect) {
        let ranks = &self.view.ranks;
        if area.height < 2 {
            return;
        }
        // (heading, least width, numbers stand right, what goes first has the highest number)
        let column = |name, least, right, last| Column { name, least, right, last };
        let columns = [
            column("rank", 4, false, 0),
            column("host", 5, false, 6),
            column("device", 6, false, 10),
            column("phase", 10, false, 1),
            column("for", 3, true, 7),
            column("step", 9, true, 2),
            column("step time", 9, true, 5),
            column("own work", 8, true, 9),
            column("lag", 11, false, 3),
            column("memory", 9, true, 4),
            column("heard", 7, true, 8),
        ];
        let cells = |row: &RankRow| -> Vec<String> {
            let RankRow { rank, host, device, phase, since, step, step_time, own_time, lag, memory, heard, .. } = row;
            [rank, host, device, phase, since, step, step_time, own_time, lag, memory, heard].map(Clone::clone).into()
        };
        let rows = ranks.iter().map(|row| (row.tone, cells(row))).collect();
        let table = Table { columns: &columns, rows, look: self.look };
        let scroll = if self.choice.pane == Pane::Events { 0 } else { self.choice.scroll };
        let inner = self.part(frame, area, &self.title("ranks", ranks.len(), area.height.saturating_sub(2), scroll));
        table.draw(frame, inner, scroll);
    }

    /// The heading of a list of which so many rows are to be seen.
    fn title(&self, name: &str, all: usize, fits: u16, scroll: usize) -> String {
        let fits = usize::from(fits);
        let first = table::first(all, fits, scroll);
        if all > fits { format!("{name} {} to {} of {all}", first + 1, first + fits) } else { name.to_owned() }
    }

    fn evaluations(&self, frame: &mut Frame<'_>, area: Rect) {
        let view = self.view;
        if area.height < 2 {
            return;
        }
        let inner = self.part(frame, area, "evaluations");
        if view.evaluations.is_empty() {
            frame.render_widget(Line::styled(" none yet", self.look.dim()), inner);
            return;
        }
        let metrics = view.metrics.iter().enumerate();
        let metrics = metrics.map(|(place, name)| Column { name, least: 9, right: true, last: 1 + place });
        let columns: Vec<_> =
            std::iter::once(Column { name: "step", least: 11, right: false, last: 0 }).chain(metrics).collect();
        let cells =
            |row: &EvaluationRow| -> Vec<String> { std::iter::once(&row.name).chain(&row.values).cloned().collect() };
        let tone = |best| if best { Tone::Good } else { Tone::Plain };
        let rows = view.evaluations.iter().map(|row| (tone(row.best), cells(row))).collect();
        Table { columns: &columns, rows, look: self.look }.draw(frame, inner, 0);
    }

    fn checkpoints(&self, frame: &mut Frame<'_>, area: Rect) {
        if area.height < 2 {
            return;
        }
        let inner = self.part(frame, area, "checkpoints on disk");
        let checkpoints = &self.view.checkpoints;
        if checkpoints.is_empty() {
            frame.render_widget(Line::styled(" none yet", self.look.dim()), inner);
            return;
        }
        let columns = [
            Column { name: "step", least: 6, right: false, last: 0 },
            Column { name: "size", least: 9, right: true, last: 2 },
            Column { name: "written", least: 8, right: true, last: 1 },
        ];
        let tone = |best| if best { Tone::Good } else { Tone::Plain };
        let cells = |row: &CheckpointRow| vec![row.step.clone(), row.size.clone(), row.ago.clone()];
        let rows = checkpoints.iter().map(|row| (tone(row.best), cells(row))).collect();
        Table { columns: &columns, rows, look: self.look }.draw(frame, inner, 0);
    }

    fn events(&self, frame: &mut Frame<'_>, area: Rect, scroll: usize) {
        let events = &self.view.events;
        if area.height < 2 {
            return;
        }
        let fits = area.height - 1;
        let inner = self.part(frame, area, &self.title("events", events.len(), fits, scroll));
        let line = |event: &EventRow| {
            let style = self.look.tone(event.tone);
            Line::from(vec![
                Span::styled(format!("{} ", event.tone.mark()), style),
                Span::styled(format!("{:>11} ", event.ago), self.look.dim()),
                Span::styled(event.text.clone(), style),
            ])
        };
        let first = table::first(events.len(), usize::from(fits), scroll);
        let lines: Vec<_> = events.iter().skip(first).take(usize::from(fits)).map(line).collect();
        frame.render_widget(Paragraph::new(lines), inner);
    }

    /// What keys do; the last ones go first where there is no room.
    fn keys(&self, frame: &mut Frame<'_>, area: Rect) {
        let look = self.look;
        let leaves = if self.view.over { " leave: the job has ended" } else { " leave, the job goes on" };
        let key = |key: &'static str, does: &'static str| {
            vec![Span::styled(key, look.strong()), Span::styled(does, look.dim())]
        };
        let panes = Pane::EACH.iter().enumerate().flat_map(|(place, pane)| {
            let name = Span::raw(format!("{} {}", place + 1, pane.name()));
            let shown = *pane == self.choice.pane;
            let style = if shown { look.strong().add_modifier(Modifier::REVERSED) } else { look.dim() };
            [name.style(style), Span::raw(" ")]
        });
        let z = if self.choice.newest { " whole curve" } else { " newest steps" };
        let parts = [
            key("q", leaves),
            panes.collect(),
            key("p", if self.choice.paused { " go on" } else { " pause" }),
            key("z", z),
            key("↑↓", " scroll"),
            key("Tab", " next view"),
        ];
        let mut line = Line::default();
        for part in parts {
            let wide = part.iter().map(Span::width).sum::<usize>() + 2;
            if line.width() > 0 && line.width() + wide > usize::from(area.width) {
                break;
            }
            let gap = if line.width() > 0 { "  " } else { "" };
            line.spans.push(Span::raw(gap));
            line.spans.extend(part);
        }
        frame.render_widget(line, area);
    }
}

#[cfg(test)]
mod tests;
