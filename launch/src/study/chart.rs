//! A bar chart of one metric, drawn twice from the same shapes: as SVG and as PNG.
//!
//! No font of the system is needed: SVG text is monospaced and stretched to the width that it has here, and PNG text is
//! made of the bitmaps of Noto Sans Mono.

use std::fmt::Write as _;

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::png::Picture;
use super::results::{Part, Row};

const WIDTH: u32 = 900;
const ROW: u32 = 30;
const TOP: u32 = 56;
const MARGIN: u32 = 16;
/// Room for a value right of the longest bar or its error bar.
const VALUE: u32 = 80;
const HEIGHT: RasterHeight = RasterHeight::Size16;
const WEIGHT: FontWeight = FontWeight::Regular;
const LONGEST_NAME: usize = 40;

/// Colour-blind safe (Okabe and Ito).
const TRAINED: Color = Color([0, 114, 178]);
const COMPARISON: Color = Color([153, 153, 153]);
const INK: Color = Color([34, 34, 34]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Color([u8; 3]);

#[derive(Clone, Debug, PartialEq)]
enum Shape {
    Rectangle {
        x: u32,
        y: u32,
        width: u32,
        height: u32,
        color: Color,
    },
    /// `x` and `y` are its upper left corner.
    Text {
        x: u32,
        y: u32,
        text: String,
    },
}

/// A finished drawing.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    height: u32,
    shapes: Vec<Shape>,
}

impl Chart {
    /// Bars of the `metric`-th metric for the rows that have it; error bars are deviations over seeds, or the interval
    /// over users with one seed.
    #[must_use]
    pub fn bars(title: &str, part: &Part, metric: usize) -> Self {
        let cell = |row: &Row| row.cells.get(metric).copied().flatten();
        let rows: Vec<_> = part.rows.iter().filter_map(|row| Some((row, cell(row)?))).collect();
        let names: Vec<String> = rows.iter().map(|(row, _)| shortened(&row.name)).collect();
        let left = 2 * MARGIN + names.iter().map(|name| text_width(name)).max().unwrap_or(0);
        let largest = rows.iter().map(|(_, cell)| cell.bounds().1.max(cell.mean)).fold(0.0, f64::max);
        let scale = if largest > 0.0 { f64::from(WIDTH - VALUE - left) / largest } else { 0.0 };
        let length = |value: f64| (value.max(0.0) * scale).round() as u32;
        let mut shapes = vec![Shape::Text { x: MARGIN, y: MARGIN, text: title.to_owned() }];
        for ((place, (row, cell)), name) in (0..).zip(&rows).zip(names) {
            let y = TOP + place * ROW;
            let (low, high) = cell.bounds();
            let color = if row.trained { TRAINED } else { COMPARISON };
            shapes.push(Shape::Text { x: left - MARGIN - text_width(&name), y: y + 3, text: name });
            shapes.push(Shape::Rectangle { x: left, y, width: length(cell.mean), height: ROW - 8, color });
            if high > low {
                let (from, to) = (left + length(low), left + length(high));
                shapes.push(Shape::Rectangle { x: from, y: y + 10, width: (to - from).max(1), height: 2, color: INK });
                for x in [from, to] {
                    shapes.push(Shape::Rectangle { x, y: y + 6, width: 2, height: 10, color: INK });
                }
            }
            let end = left + length(cell.mean.max(high)) + 8;
            shapes.push(Shape::Text { x: end, y: y + 3, text: format!("{:.4}", cell.mean) });
        }
        let height = TOP + rows.len() as u32 * ROW + MARGIN;
        shapes.push(Shape::Rectangle { x: left, y: TOP - 4, width: 1, height: height - TOP - 8, color: INK });
        Self { height, shapes }
    }

    #[must_use]
    pub fn svg(&self) -> String {
        let height = self.height;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} \
             {height}\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        for shape in &self.shapes {
            let _infallible = match shape {
                Shape::Rectangle { x, y, width, height, color: Color([r, g, b]) } => writeln!(
                    out,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"#{r:02x}{g:02x}{b:02x}\"/>"
                ),
                Shape::Text { x, y, text } => writeln!(
                    out,
                    "<text x=\"{x}\" y=\"{}\" font-family=\"monospace\" font-size=\"12\" fill=\"#222\" \
                     textLength=\"{}\" lengthAdjust=\"spacingAndGlyphs\">{}</text>",
                    y + 13,
                    text_width(text),
                    escaped(text)
                ),
            };
        }
        out.push_str("</svg>\n");
        out
    }

    #[must_use]
    pub fn picture(&self) -> Picture {
        let mut pixels = vec![255_u8; (3 * WIDTH * self.height) as usize];
        let mut blend = |x: u32, y: u32, Color(color): Color, opacity: u8| {
            if x < WIDTH && y < self.height {
                let pixel = &mut pixels[(3 * (y * WIDTH + x)) as usize..][..3];
                for (channel, ink) in pixel.iter_mut().zip(color) {
                    let (under, over, share) = (u32::from(*channel), u32::from(ink), u32::from(opacity));
                    // a mean of two bytes is a byte
                    *channel = ((under * (255 - share) + over * share) / 255) as u8;
                }
            }
        };
        for shape in &self.shapes {
            match shape {
                Shape::Rectangle { x, y, width, height, color } => {
                    for (dx, dy) in (0..*height).flat_map(|dy| (0..*width).map(move |dx| (dx, dy))) {
                        blend(x + dx, y + dy, *color, 255);
                    }
                }
                Shape::Text { x, y, text } => {
                    for (place, letter) in (0..).zip(text.chars()) {
                        let glyph = get_raster(letter, WEIGHT, HEIGHT).or_else(|| get_raster('?', WEIGHT, HEIGHT));
                        for (dy, row) in (0..).zip(glyph.iter().flat_map(|glyph| glyph.raster())) {
                            for (dx, &opacity) in (0..).zip(row.iter()) {
                                blend(x + place * letter_width() + dx, y + dy, INK, opacity);
                            }
                        }
                    }
                }
            }
        }
        Picture { width: WIDTH, height: self.height, pixels }
    }
}

fn letter_width() -> u32 {
    get_raster_width(WEIGHT, HEIGHT) as u32
}

fn text_width(text: &str) -> u32 {
    text.chars().count() as u32 * letter_width()
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= LONGEST_NAME {
        return name.to_owned();
    }
    name.chars().take(LONGEST_NAME - 3).chain("...".chars()).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::results::part;
    use super::super::results::tests::variant;
    use super::*;

    fn chart() -> Chart {
        let (one, two) = (variant("one <&>", &[Some(0.2)], 0.1), variant("two", &[Some(0.3), Some(0.5)], 0.1));
        let failed = variant("failed", &[None], 0.1);
        Chart::bars("Towers: recall@10, all", &part(&[&one, &two, &failed], "all", &["recall@10".into()]), 0)
    }

    /// Lengths of the bars of a colour.
    fn bars(chart: &Chart, wanted: Color) -> Vec<u32> {
        let bars = chart.shapes.iter().filter_map(|shape| match shape {
            Shape::Rectangle { width, color, .. } if *color == wanted => Some(*width),
            _ => None,
        });
        bars.collect()
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let chart = chart();
        let (trained, comparisons) = (bars(&chart, TRAINED), bars(&chart, COMPARISON));
        assert_eq!((trained.len(), comparisons.len()), (2, 2), "what failed has no bar");
        assert!(trained[1].abs_diff(2 * trained[0]) <= 1, "{trained:?}");
        assert!(trained[0].abs_diff(4 * comparisons[0]) <= 4, "{trained:?} {comparisons:?}");
        let inside = |shape: &Shape| match shape {
            Shape::Rectangle { x, y, width, height, .. } => x + width <= WIDTH && y + height <= chart.height,
            Shape::Text { x, y, text } => x + text_width(text) <= WIDTH && y + 16 <= chart.height,
        };
        assert!(chart.shapes.iter().all(inside), "{chart:?}");
    }

    #[test]
    fn both_pictures_show_the_same_shapes() {
        let chart = chart();
        let svg = chart.svg();
        assert!(svg.contains("one &lt;&amp;&gt;") && svg.contains(">0.4000<") && svg.ends_with("</svg>\n"), "{svg}");
        assert_eq!(svg.matches("fill=\"#0072b2\"").count(), 2);

        let Picture { width, height, pixels } = chart.picture();
        assert_eq!((width, height, pixels.len()), (WIDTH, chart.height, (3 * WIDTH * chart.height) as usize));
        let blue = pixels.chunks_exact(3).filter(|pixel| *pixel == TRAINED.0).count() as u32;
        let area: u32 = bars(&chart, TRAINED).iter().map(|width| width * (ROW - 8)).sum();
        assert!(blue <= area && blue > area * 9 / 10, "{blue} of {area}: less what error bars cover");
        let dark = pixels.chunks_exact(3).filter(|pixel| pixel.iter().all(|channel| *channel < 90)).count();
        assert!(dark > 500, "the text is there: {dark}");
    }
}
