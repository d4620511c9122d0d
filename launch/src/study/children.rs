//! `learn-launch` itself as a child of a study, and the operator's requests to stop on their way to it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::failure::Failure;
use crate::process::{self, Process};
use crate::settings::ENVIRONMENT_PREFIX;
use crate::system::{self, End};

/// Pause between two looks at the children.
pub const POLL: Duration = Duration::from_millis(50);
/// Lines of a log in which the reason of a failure is looked for.
const TAIL: usize = 40;

/// The operator's requests to stop, of which each child hears each once: the first ends it with what it has, the second
/// kills what it has started.
#[derive(Debug, Default)]
pub struct Stops {
    passed_on: usize,
}

impl Stops {
    /// Passes one request on if there is one; `true` if there was. Two of them never go out at once, because a process
    /// cannot tell two pending signals from one.
    pub fn pass_on<'a>(&mut self, children: impl Iterator<Item = &'a mut Process>) -> bool {
        if system::stop_requests() <= self.passed_on {
            return false;
        }
        self.passed_on += 1;
        children.for_each(|child| child.ask_to_end(End::Gracefully));
        true
    }

    #[must_use]
    pub fn asked(&self) -> bool {
        self.passed_on > 0 || system::stop_requests() > 0
    }

    /// # Errors
    /// The study was stopped, or killed by a second request.
    pub fn check(&self) -> Result<()> {
        let requests = self.passed_on.max(system::stop_requests());
        let stopped = Failure::of_stops(requests, "the study", "start it again to go on where it was");
        stopped.map_or(Ok(()), |failure| Err(failure.into()))
    }
}

/// This program, without the settings of the environment: a run's file holds all of them, already resolved.
///
/// # Errors
/// It cannot find itself.
pub fn launch(arguments: &[&str]) -> Result<Command> {
    let own = std::env::current_exe().context("cannot find learn-launch itself")?;
    let mut command = Command::new(own);
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with(ENVIRONMENT_PREFIX)) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Why an ended child failed, in its own words if it has said some.
pub fn reason(child: &mut Process) -> Option<String> {
    let status = child.ended()?;
    if status.success() {
        return None;
    }
    let lines = child.tail(TAIL);
    let said = lines.iter().rev().find_map(|line| line.strip_prefix("learn-launch: "));
    Some(said.map_or_else(|| process::describe(status), str::to_owned))
}

#[cfg(test)]
mod tests {
    use learn_domain::report::exit;

    use super::*;
    use crate::failure::exit_code;

    #[test]
    fn a_request_is_passed_on_once_and_a_second_one_kills() {
        let _alone = system::tests::count_alone();
        let ask = || {
            let before = system::stop_requests();
            system::end(std::process::id(), End::Gracefully);
            while system::stop_requests() == before {
                std::thread::yield_now();
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let mut child =
            Process::start("sleeper", Command::new("sleep").arg("600"), &folder.path().join("log")).unwrap();
        let mut stops = Stops { passed_on: system::stop_requests() };
        assert!(!stops.pass_on(std::iter::once(&mut child)));
        ask();
        assert!(stops.pass_on(std::iter::once(&mut child)) && !stops.pass_on(std::iter::once(&mut child)));
        assert_eq!(process::describe(child.wait(Duration::from_secs(10)).unwrap()), "killed by signal 15");
        let stopped = Stops { passed_on: 1 };
        ask();
        assert_eq!(exit_code(&stopped.check().unwrap_err()), exit::FAILED);
    }

    #[test]
    fn the_reason_of_a_failure_is_not_that_of_an_earlier_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let ended = |script: &str| {
            let mut command = Command::new("sh");
            let mut child = Process::start("run", command.args(["-c", script]), &folder.path().join("log")).unwrap();
            child.wait(Duration::from_secs(10)).unwrap();
            reason(&mut child)
        };
        assert_eq!(ended("echo learn-launch: out of memory; exit 1").as_deref(), Some("out of memory"));
        assert_eq!(ended("exit 4").as_deref(), Some("exit code 4"));
        assert_eq!(ended("echo learn-launch: late; exit 0"), None);
    }
}
