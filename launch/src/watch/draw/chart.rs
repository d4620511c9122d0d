//! A curve in braille dots: two in each column and four in each row of the terminal.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style};
use ratatui::symbols::{Marker, bar};
use ratatui::text::Line;
use ratatui::widgets::canvas::{Canvas, Context, Line as Stroke, Points};
use ratatui::widgets::{Block, Borders, Widget};

use super::Look;
use crate::render;
use crate::watch::view::{Curve, Tone};

/// Rows from which on the middle of the values is named, too.
const MIDDLE: u16 = 7;

/// A [`Curve`] with its axes.
pub struct Chart<'a> {
    pub curve: &'a Curve,
    pub look: Look,
}

impl Widget for Chart<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let Curve { line, around, best, .. } = self.curve;
        let (Some(begin), Some(end)) = (line.first(), line.last()) else { return };
        let (low, high) = bounds(line.iter().chain(best));
        // the far ones of what was smoothed away may be cut off, or one spike would flatten the rest
        let (low, high) = roomy(low, high, around);
        let names = labels(low, high, area.height.saturating_sub(1) >= MIDDLE);
        let wide = names.iter().map(String::len).max().unwrap_or_default() as u16 + 1;
        let [width, height] = [area.width.saturating_sub(wide + 1), area.height.saturating_sub(1)];
        if width < 4 || height < 2 {
            return;
        }
        let graph = Rect { x: area.x + wide, y: area.y, width: width + 1, height };
        let block = Block::new().borders(Borders::LEFT).border_style(self.look.dim());
        let inner = block.inner(graph);
        block.render(graph, buffer);
        for (place, name) in names.iter().enumerate() {
            let row = (usize::from(height - 1) * place).div_ceil(names.len() - 1) as u16;
            let text = Line::styled(name.clone(), self.look.dim()).right_aligned();
            text.render(Rect { x: area.x, y: area.y + height - 1 - row, width: wide - 1, height: 1 }, buffer);
        }
        // a lone point stands in the middle
        let (from, to) = if end.0 > begin.0 { (begin.0, end.0) } else { (begin.0 - 1.0, begin.0 + 1.0) };
        let below = Rect { x: inner.x, y: area.y + height, width: inner.width, height: 1 };
        Line::styled(format!("step {}", whole(begin.0)), self.look.dim()).render(below, buffer);
        if end.0 > begin.0 {
            Line::styled(whole(end.0), self.look.dim()).right_aligned().render(below, buffer);
        }
        let sides = Sides { x: [from, to], y: [low, high] };
        sides.dots(around, false, inner, buffer);
        buffer.set_style(inner, self.look.dim());
        let mut over = Buffer::empty(inner);
        sides.dots(line, true, inner, &mut over);
        lay(&over, inner, buffer, self.look.curve());
        if let Some(best) = best {
            let within = |share: f64, cells: u16| (share.clamp(0.0, 1.0) * f64::from(cells - 1)).round() as u16;
            let x = inner.x + within((best.0 - from) / (to - from), inner.width);
            let y = inner.y + within((high - best.1) / (high - low), inner.height);
            buffer[(x, y)].set_symbol(Tone::Good.mark()).set_style(self.look.tone(Tone::Good));
        }
    }
}

/// What lies at the edges of a canvas.
#[derive(Clone, Copy)]
struct Sides {
    x: [f64; 2],
    y: [f64; 2],
}

impl Sides {
    /// Points, `joined` by lines or not; those outside are left out.
    fn dots(self, points: &[(f64, f64)], joined: bool, area: Rect, buffer: &mut Buffer) {
        let color = Color::Reset;
        let canvas = Canvas::default().marker(Marker::Braille).x_bounds(self.x).y_bounds(self.y);
        let paint = |canvas: &mut Context<'_>| {
            canvas.draw(&Points { coords: points, color });
            for pair in points.windows(2).filter(|_| joined) {
                canvas.draw(&Stroke { x1: pair[0].0, y1: pair[0].1, x2: pair[1].0, y2: pair[1].1, color });
            }
        };
        canvas.paint(paint).render(area, buffer);
    }
}

/// Puts the dots of a line over what is there: in its cells the line alone is seen.
fn lay(over: &Buffer, area: Rect, buffer: &mut Buffer, style: Style) {
    for place in area.positions().filter(|place| over[*place].symbol() != " ") {
        buffer[place].reset();
        buffer[place].set_symbol(over[place].symbol()).set_style(style);
    }
}

fn bounds<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> (f64, f64) {
    points.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), point| (low.min(point.1), high.max(point.1)))
}

/// Bounds with room for most of what is around the line.
fn roomy(low: f64, high: f64, around: &[(f64, f64)]) -> (f64, f64) {
    let mut values: Vec<f64> = around.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len().saturating_sub(1)) as f64 * share) as usize).copied();
    let (low, high) = (at(0.02).map_or(low, |value| low.min(value)), at(0.98).map_or(high, |value| high.max(value)));
    // a flat curve lies in the middle
    if high > low { (low, high) } else { (low - 0.5 * low.abs().max(1e-6), high + 0.5 * high.abs().max(1e-6)) }
}

/// Names of the values, from the lowest up, with as many digits as tell them apart.
fn labels(low: f64, high: f64, middle: bool) -> Vec<String> {
    let digits = (1.0 - (high - low).log10()).ceil().clamp(0.0, 8.0) as usize;
    let values = if middle { vec![low, f64::midpoint(low, high), high] } else { vec![low, high] };
    values.into_iter().map(|value| format!("{value:.digits$}")).collect()
}

fn whole(step: f64) -> String {
    render::count(step.max(0.0) as u64)
}

/// The last values as bars of eighths, the greatest a whole one; more values than `room` become means.
pub fn bars(values: &[f64], room: usize) -> String {
    let share = values.len().div_ceil(room.max(1)).max(1);
    let means: Vec<f64> =
        values.rchunks_exact(share).map(|part| part.iter().sum::<f64>() / part.len() as f64).take(room).collect();
    let most = means.iter().copied().fold(0.0, f64::max);
    let bar = |value: &f64| {
        let eighths = if most > 0.0 { (value / most * 8.0).round() as usize } else { 0 };
        [" ", bar::ONE_EIGHTH, bar::ONE_QUARTER, bar::THREE_EIGHTHS, bar::HALF, bar::FIVE_EIGHTHS]
            .into_iter()
            .chain([bar::THREE_QUARTERS, bar::SEVEN_EIGHTHS, bar::FULL])
            .nth(eighths)
            .unwrap_or(" ")
    };
    means.iter().rev().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_the_newest_values_by_the_greatest() {
        assert_eq!(bars(&[0.0, 1.0, 4.0, 8.0], 9), " ▁▄█");
        assert_eq!(bars(&[9.0, 9.0, 4.0, 8.0, 8.0, 0.0], 2), "█▆", "means of neighbours");
        assert_eq!(bars(&[], 5), "");
        assert_eq!(bars(&[0.0, 0.0], 5), "  ");
        assert_eq!(bars(&[1.0], 0), "");
    }

    #[test]
    fn values_are_named_as_finely_as_they_differ() {
        assert_eq!(labels(2.0, 7.5, true), ["2.0", "4.8", "7.5"]);
        assert_eq!(labels(0.0912, 0.0921, false), ["0.09120", "0.09210"]);
        assert_eq!(labels(0.0, 120_000.0, false), ["0", "120000"]);
        assert_eq!(roomy(3.0, 3.0, &[]), (1.5, 4.5));
        let spike = [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5), (3.0, 1e9)];
        assert_eq!(roomy(1.5, 2.0, &spike), (1.0, 2.5), "a lone spike does not flatten the curve");
    }
}
