//! The summary of a finished training job.

use learn_domain::Step;
use learn_domain::report::{Split, Summary};

use super::Job;

impl Job {
    #[must_use]
    pub fn summary(&self) -> Summary {
        let last = |split: Split| self.evaluations.iter().rfind(move |evaluation| evaluation.split == split);
        let test = last(Split::Test);
        let tested = test.map(|test| test.step);
        let comparisons = test.map(|test| test.comparisons.clone()).unwrap_or_default();
        // valid is shown for the weights that were tested
        let same = |step: Step| {
            self.evaluations.iter().rfind(|evaluation| evaluation.split == Split::Valid && evaluation.step == step)
        };
        let valid = tested.and_then(same).or_else(|| self.best()).or_else(|| last(Split::Valid));
        let steps = self.last_step.as_ref().map_or(Step(0), |record| record.step);
        let (formed, ended) = (self.formed.unwrap_or_default(), self.ended.unwrap_or_default());
        let facts = &self.settings.dataset;
        Summary {
            dataset: facts.name.clone(),
            fingerprint: facts.fingerprint.clone(),
            users: facts.users,
            items: facts.items,
            interactions: facts.interactions,
            world_size: self.membership.world_size(),
            steps: steps.0,
            seconds: self.earlier_seconds + ended.saturating_sub(formed).as_secs_f64(),
            samples_per_second: if self.step_seconds > 0.0 {
                self.trained_users as f64 / self.step_seconds
            } else {
                0.0
            },
            best_step: tested.or_else(|| valid.map(|valid| valid.step)).unwrap_or(steps),
            valid: valid.map(|valid| valid.metrics.clone()).unwrap_or_default(),
            test: test.map(|test| test.metrics.clone()).unwrap_or_default(),
            popularity: comparisons
                .iter()
                .find(|comparison| comparison.name == "popularity")
                .map(|comparison| comparison.metrics.clone())
                .unwrap_or_default(),
            segments: test.map(|test| test.segments.clone()).unwrap_or_default(),
            comparisons,
        }
    }
}
