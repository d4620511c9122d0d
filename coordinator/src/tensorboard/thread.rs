//! TensorBoard's file on a thread of its own, so that nobody waits while that of a long run is made anew.
//!
//! Input: what the journal has done to the run's files, in that order. Output: the file. Invariant: a line that was there when
//! the file is to be made anew comes from the run's files, a later one from the journal; so each comes once.

use std::sync::mpsc::Receiver;

use learn_domain::Config;
use learn_domain::run_dir::RunDir;

use super::{RunLines, TensorBoard, TensorBoardError};
use crate::files::FileError;
use crate::journal::Line;

/// What the journal has done.
pub enum Told {
    /// It begins, or lines were dropped.
    Anew(Result<RunLines, FileError>),
    Line(Line),
}

/// Keeps the file up to date until the journal ends. After a failure there are no more points before it is made anew.
pub fn follow(run_dir: &RunDir, config: &Config, told: Receiver<Told>) {
    let mut board: Option<TensorBoard> = None;
    for told in told {
        let shown = match told {
            Told::Anew(lines) => {
                let lines = lines.map_err(TensorBoardError::from);
                lines.and_then(|lines| TensorBoard::make(lines, run_dir, config)).map(|made| board = Some(made))
            }
            Told::Line(line) => board.as_mut().map_or(Ok(()), |board| board.add(&line)),
        };
        if let Err(error) = shown {
            error.tell();
            board = None;
        }
    }
}
