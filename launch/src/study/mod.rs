//! A study: variants of one configuration, trained one after the other or side by side, and tables made of them.
//!
//! Input: a study file ([`file`]). [`runs`] turns it into runs with resolved configurations and says of each what is left
//! to do, from what lies on disk; [`datasets`] makes the datasets that are missing and [`queue`] trains, with `learn-launch`
//! itself as child processes ([`children`]); [`results`] reads the summaries and averages over seeds; [`tables`], [`chart`]
//! and [`png`] write Markdown, CSV, SVG and PNG. Invariants: the only state is the run directories, so a study that was
//! killed goes on when it is started again; a run counts as done only if its configuration is the one that the study asks
//! for and its dataset still holds what it was trained on; a variant that fails is shown as failed and stops no other.

pub mod chart;
pub mod children;
pub mod datasets;
pub mod file;
pub mod png;
pub mod queue;
pub mod results;
pub mod runs;
pub mod tables;
