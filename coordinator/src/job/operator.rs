//! What an operator, or whoever starts the workers, asks of a job: its end, and another number of workers.

use std::time::Duration;

use learn_domain::membership::{Effect, Event};

use super::{Job, JobError};

/// How a stop was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// By whoever has the job's secret.
    ByCall,
    /// By a person, or by a scheduler that cuts the job short.
    BySignal,
}

impl Job {
    /// A signal, or an operator's call, asks for the end.
    pub fn stop(&mut self, now: Duration, asked: Asked) -> Vec<Effect> {
        if asked == Asked::ByCall && !std::mem::replace(&mut self.operator_stop, true) {
            self.unsaved.job = true;
        }
        self.take(now, Event::OperatorStop)
    }

    /// A worker has ended before all had joined, says who starts them.
    pub fn never_joined(&mut self, now: Duration, message: String) -> Vec<Effect> {
        self.take(now, Event::NeverJoined(message))
    }

    /// So many workers are wanted from now on, but no more than there are users in a step.
    ///
    /// # Errors
    /// Whoever starts them cannot start so many.
    pub fn scale(&mut self, now: Duration, workers: u32) -> Result<Vec<Effect>, JobError> {
        let workers = workers.min(self.settings.config.training.global_batch);
        match self.settings.most_workers {
            Some(most) if workers > most => Err(JobError::TooManyWorkers { workers, most }),
            _ => Ok(self.take(now, Event::Scale(workers))),
        }
    }

    /// Workers that the job wants to have.
    #[must_use]
    pub fn wanted(&self) -> u32 {
        self.membership.wanted()
    }
}
