//! What ends a command early, and the exit code that says so.

use learn_domain::report::exit;

use crate::settings::SettingsError;

/// A command ended for a reason that has an exit code of its own. The message carries the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line or the configuration is wrong.
    #[error("{0}")]
    Usage(String),
    /// Another process works on the same thing; it may be free soon.
    #[error("{0}")]
    Busy(String),
    /// Stopped by the operator.
    #[error("{0}")]
    Stopped(String),
    /// A worker was lost.
    #[error("{0}")]
    WorkerLost(String),
    /// Loss or gradient was not finite.
    #[error("{0}")]
    Diverged(String),
    /// The last checkpoint was not written.
    #[error("{0}")]
    Unsaved(String),
    /// Another process failed and has said why.
    #[error("{message}")]
    Child { code: i32, message: String },
    /// The result that was printed is itself the bad news.
    #[error("{message}")]
    Reported { code: i32, message: String },
}

impl Failure {
    /// What requests to stop have made of `what`: it was stopped by the first and killed by a second one.
    #[must_use]
    pub fn of_stops(requests: usize, what: &str, way_on: &str) -> Option<Self> {
        match requests {
            0 => None,
            1 => Some(Self::Stopped(format!("{what} was stopped; {way_on}"))),
            _ => Some(Self::Child { code: exit::FAILED, message: format!("{what} was killed; {way_on}") }),
        }
    }

    fn code(&self) -> i32 {
        match self {
            Self::Usage(_) => exit::USAGE,
            Self::Busy(_) => exit::FAILED,
            Self::Stopped(_) => exit::STOPPED,
            Self::WorkerLost(_) => exit::WORKER_LOST,
            Self::Diverged(_) => exit::DIVERGED,
            Self::Unsaved(_) => exit::UNSAVED,
            Self::Child { code, .. } | Self::Reported { code, .. } => *code,
        }
    }
}

/// The exit code of a command that ended with `error`.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> i32 {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        failure.code()
    } else if error.downcast_ref::<SettingsError>().is_some() {
        exit::USAGE
    } else {
        exit::FAILED
    }
}

/// An error with its causes. Many an error says its cause itself; a cause that was said is not said again.
#[must_use]
pub fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.as_str() {
        "" => cause,
        before if before.contains(&cause) => said,
        before => format!("{before}: {cause}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("config.json: {source}")]
        struct Unreadable {
            source: std::io::Error,
        }
        let cause = || std::io::Error::other("disk full");
        let error = anyhow::Error::from(Unreadable { source: cause() }).context("cannot start");
        assert_eq!(message(&error), "cannot start: config.json: disk full");
        assert_eq!(message(&anyhow::Error::from(cause()).context("cannot start")), "cannot start: disk full");
    }

    #[test]
    fn each_kind_has_its_code() {
        let settings = SettingsError::Invalid { key: "job.name", problem: "is empty".into() };
        for (error, code) in [
            (anyhow::anyhow!("disk full"), exit::FAILED),
            (Failure::Usage("no such run".into()).into(), exit::USAGE),
            (Failure::Busy("another embeds".into()).into(), exit::FAILED),
            (anyhow::Error::from(settings).context("while reading"), exit::USAGE),
            (Failure::Stopped("stopped".into()).into(), exit::STOPPED),
            (Failure::WorkerLost("lost".into()).into(), exit::WORKER_LOST),
            (Failure::Diverged("nan".into()).into(), exit::DIVERGED),
            (Failure::Unsaved("disk full".into()).into(), exit::UNSAVED),
            (Failure::Child { code: 7, message: "x".into() }.into(), 7),
        ] {
            assert_eq!(exit_code(&error), code, "{error}");
        }
    }
}
