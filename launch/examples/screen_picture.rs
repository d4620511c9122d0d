//! The screen of `learn-launch status RUN --watch` as it is now, as an SVG picture for documents.
//!
//! `cargo run --release -p learn-launch --example screen_picture -- RUN FILE.svg [COLUMNSxROWS]`

use std::path::Path;

use anyhow::{Context, Result, bail};
use learn_launch::{runs, watch};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (run, file, size) = match arguments.as_slice() {
        [run, file] => (run, file, "130x40"),
        [run, file, size] => (run, file, size.as_str()),
        _ => bail!("wanted: RUN FILE.svg [COLUMNSxROWS]"),
    };
    let parse = |text: &str| text.parse::<u16>().with_context(|| format!("{size} is no size such as 130x40"));
    let (columns, rows) = size.split_once('x').with_context(|| format!("{size} is no size such as 130x40"))?;
    let run = runs::find(Path::new(run), Path::new("runs"))?;
    let picture = watch::picture(run, parse(columns)?, parse(rows)?)?;
    println!("{file}: {} bytes", picture.len());
    std::fs::write(file, picture).with_context(|| format!("cannot write {file}"))
}
