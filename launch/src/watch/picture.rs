//! A screen as an SVG picture, for documents.
//!
//! Input: the cells that were drawn. Output: SVG that looks the same everywhere: braille dots, bars and rules are shapes, because
//! fonts that lack them would shift what follows, and text is held to the columns. The same cells give the same bytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ratatui::buffer::{Buffer, Cell};
use ratatui::style::{Color, Modifier};

/// Columns and rows in pixels.
const CELL: (f64, f64) = (8.0, 17.0);
/// Around the screen.
const MARGIN: f64 = 14.0;
/// Of a row, where letters stand.
const BASE: f64 = 12.5;
const BACK: &str = "#0d1117";
const FRONT: &str = "#d1d7e0";

/// The picture of a screen.
pub fn svg(buffer: &Buffer) -> String {
    let size = buffer.area;
    let (width, height) = (place(size.width, CELL.0) + MARGIN, place(size.height, CELL.1) + MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace\" font-size=\"13\">\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"{BACK}\"/>\n"
    );
    let mut shapes = Shapes::default();
    for y in 0..size.height {
        let mut x = 0;
        while x < size.width {
            let cell = &buffer[(x, y)];
            let paint = Paint::of(cell);
            if let Some(back) = paint.back {
                shapes.add(back, &rect(place(x, CELL.0), place(y, CELL.1), CELL.0, CELL.1));
            }
            let symbol = cell.symbol().chars().next().unwrap_or(' ');
            if let Some(shape) = shape(symbol, place(x, CELL.0), place(y, CELL.1)) {
                shapes.add(paint.front, &shape);
                x += 1;
                continue;
            }
            let text = run(buffer, x, y, paint);
            write_text(&mut out, &text, (x, y), paint);
            let wide = text.chars().count().max(1) as u16;
            for at in (x + 1..x + wide).filter(|_| paint.back.is_some()) {
                shapes.add(paint.back.unwrap_or(BACK), &rect(place(at, CELL.0), place(y, CELL.1), CELL.0, CELL.1));
            }
            x += wide;
        }
    }
    // what is behind letters comes before them
    let at = out.find("<text").unwrap_or(out.len());
    out.insert_str(at, &shapes.svg());
    out + "</svg>\n"
}

/// The text of one paint from a place on, without what is a shape.
fn run(buffer: &Buffer, x: u16, y: u16, paint: Paint) -> String {
    let cells = (x..buffer.area.width).map(|x| &buffer[(x, y)]);
    let symbols = cells.take_while(|cell| Paint::of(cell) == paint).map(|cell| cell.symbol().chars().next());
    symbols.map(|symbol| symbol.unwrap_or(' ')).take_while(|symbol| shape(*symbol, 0.0, 0.0).is_none()).collect()
}

fn write_text(out: &mut String, text: &str, (x, y): (u16, u16), paint: Paint) {
    let kept = text.trim_end();
    let begin = kept.chars().take_while(|letter| *letter == ' ').count();
    let kept = kept.trim_start();
    if kept.is_empty() {
        return;
    }
    let letters = kept.chars().count();
    let escaped = kept.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let weight = if paint.bold { " font-weight=\"bold\"" } else { "" };
    let (x, y) = (place(x + begin as u16, CELL.0), place(y, CELL.1) + BASE);
    let length = letters as f64 * CELL.0;
    let _infallible = writeln!(
        out,
        "<text x=\"{x}\" y=\"{y}\" textLength=\"{length}\" lengthAdjust=\"spacingAndGlyphs\" xml:space=\"preserve\" \
         fill=\"{}\"{weight}>{escaped}</text>",
        paint.front
    );
}

fn place(cells: u16, size: f64) -> f64 {
    MARGIN + f64::from(cells) * size
}

/// How a cell is painted.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Paint {
    front: &'static str,
    back: Option<&'static str>,
    bold: bool,
}

impl Paint {
    fn of(cell: &Cell) -> Self {
        let has = |modifier| cell.modifier.contains(modifier);
        let front = match cell.fg {
            Color::Red => "#ff7b72",
            Color::Green => "#3fb950",
            Color::Yellow => "#d29922",
            Color::Blue => "#79c0ff",
            Color::Cyan => "#39c5cf",
            _ if has(Modifier::DIM) => "#8b949e",
            _ => FRONT,
        };
        let (front, back) = if has(Modifier::REVERSED) { (BACK, Some(front)) } else { (front, None) };
        Self { front, back, bold: has(Modifier::BOLD) }
    }
}

/// One path for each colour: there are thousands of dots.
#[derive(Default)]
struct Shapes(BTreeMap<&'static str, String>);

impl Shapes {
    fn add(&mut self, colour: &'static str, path: &str) {
        self.0.entry(colour).or_default().push_str(path);
    }

    fn svg(&self) -> String {
        self.0.iter().map(|(colour, path)| format!("<path fill=\"{colour}\" d=\"{path}\"/>\n")).collect()
    }
}

fn rect(x: f64, y: f64, width: f64, height: f64) -> String {
    format!("M{x} {y}h{width}v{height}h-{width}z")
}

/// What a symbol looks like with its upper left corner there, if it is no letter.
fn shape(symbol: char, x: f64, y: f64) -> Option<String> {
    let (width, height) = CELL;
    match symbol {
        '\u{2800}'..='\u{28ff}' => Some(braille(symbol as u32 - 0x2800, x, y)),
        '─' => Some(rect(x, y + 8.0, width, 1.0)),
        '━' => Some(rect(x, y + 7.0, width, 3.0)),
        '│' => Some(rect(x + 4.0, y, 1.0, height)),
        '▁'..='█' => {
            let eighths = f64::from(symbol as u32 - '▁' as u32 + 1);
            let tall = eighths * (height - 3.0) / 8.0;
            Some(rect(x, y + height - 2.0 - tall, width - 1.0, tall))
        }
        '●' => {
            let (left, middle) = (x + 0.5, y + 8.5);
            Some(format!("M{left} {middle}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z"))
        }
        '▲' => Some(format!("M{} {}l4 -8l4 8z", x, y + 12.5)),
        '✖' => {
            let (left, top) = (x + 0.5, y + 6.5);
            Some(format!("M{left} {top}l2 -2l2 2l2 -2l2 2l-2 2l2 2l-2 2l-2 -2l-2 2l-2 -2l2 -2z"))
        }
        _ => None,
    }
}

/// The dots of a braille symbol by its bits.
fn braille(bits: u32, x: f64, y: f64) -> String {
    const PLACES: [(u32, u32); 8] = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)];
    let dots = PLACES.iter().enumerate().filter(|(bit, _)| (bits >> bit) & 1 == 1);
    let dot = |(_, (column, row)): (usize, &(u32, u32))| {
        let (x, y) = (x + 1.0 + 4.0 * f64::from(*column), y + 1.0 + 4.25 * f64::from(*row));
        format!("M{x} {y}h2v2h-2z")
    };
    dots.map(dot).collect()
}

#[cfg(test)]
mod tests {
    use ratatui::style::Style;

    use super::*;

    #[test]
    fn letters_stay_in_their_columns_and_dots_are_shapes() {
        let mut buffer = Buffer::with_lines(["  a<b  ⠉█ c", "q leave    "]);
        buffer.set_style(ratatui::layout::Rect::new(2, 0, 3, 1), Style::new().fg(Color::Red));
        buffer.set_style(ratatui::layout::Rect::new(0, 1, 1, 1), Style::new().add_modifier(Modifier::REVERSED));
        let picture = svg(&buffer);
        assert!(picture.contains("x=\"30\"") && picture.contains("fill=\"#ff7b72\">a&lt;b</text>"), "{picture}");
        assert!(!picture.contains('⠉') && !picture.contains('█'), "{picture}");
        assert!(picture.contains("M71 15h2v2h-2zM75 15h2v2h-2z"), "two dots at the top: {picture}");
        assert!(picture.contains(&format!("fill=\"{BACK}\">q</text>")), "reversed: {picture}");
        assert_eq!(picture, svg(&buffer));
        assert!(picture.find("<path").unwrap() < picture.find("<text").unwrap());
    }
}
