//! `learn-launch`: everything an operator does with LEARN from one command line.
//!
//! Input: a configuration (see [`settings`]), a dataset, a run directory. Output: results on stdout (text, or JSON with
//! `--json`), progress and messages on stderr, an exit code of `learn_domain::report::exit`.
//!
//! - [`commands`]: one file per subcommand; [`cli`] is what they have in common.
//! - [`settings`]: defaults, TOML, environment, `--set` and flags become one typed configuration.
//! - [`job`]: one coordinator, its workers and data servers as local processes, watched to their end.
//! - [`dataset_work`]: what takes long in this process itself.
//! - [`made_from`]: whether a dataset is what the settings say.
//! - [`api`] looks at a job over HTTP; [`operator`] stops and scales it.
//! - [`process`] and [`system`]: children that never outlive their parent; the few calls into the operating system.
//! - [`render`]: what people see, as pure functions.
//! - [`watch`]: a run on the terminal, again and again; [`lines`] reads what grows meanwhile.
//! - [`report`]: a page about runs, side by side.
//! - [`slurm`]: a job on a Slurm cluster.
//! - [`study`]: variants of a configuration, trained and set side by side.
//!
//! Invariant: nothing here links libtorch; all work on tensors is done by the sibling binaries.

pub mod api;
pub mod cli;
pub mod commands;
pub mod crew;
pub mod data_servers;
pub mod dataset_work;
pub mod encoder;
pub mod failure;
pub mod job;
pub mod lines;
pub mod load;
pub mod made_from;
pub mod operator;
pub mod output;
pub mod process;
pub mod relay;
pub mod render;
pub mod report;
pub mod runs;
pub mod settings;
pub mod slurm;
pub mod study;
pub mod system;
pub mod tls;
pub mod watch;
