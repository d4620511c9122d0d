//! The learning rate of a step: linear warm-up, then constant or cosine decay to a floor.

use crate::config::{OptimizerConfig, ScheduleKind};
use crate::ids::Step;

/// The learning rate of the update that follows `finished` finished steps, of `total` in the whole job.
///
/// Warm-up: `lr (finished + 1) / warmup`. Cosine: `floor + (lr - floor) (1 + cos(pi t)) / 2` with `t` the share of the
/// steps after warm-up that are done (Loshchilov and Hutter, "SGDR", ICLR 2017, without restarts).
#[must_use]
pub fn learning_rate(config: &OptimizerConfig, finished: Step, total: u64) -> f64 {
    let peak = config.learning_rate;
    if finished.0 < config.warmup_steps {
        return peak * (finished.0 + 1) as f64 / config.warmup_steps as f64;
    }
    match config.schedule {
        ScheduleKind::Constant => peak,
        ScheduleKind::Cosine => {
            let decay = total.saturating_sub(config.warmup_steps).max(1);
            let done = ((finished.0 - config.warmup_steps) as f64 / decay as f64).min(1.0);
            let floor = peak * config.min_learning_rate_ratio;
            floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
        }
    }
}

/// What to tell if a job of `total` steps ends before its warm-up does.
#[must_use]
pub fn endless_warm_up(config: &OptimizerConfig, total: u64) -> Option<String> {
    let OptimizerConfig { warmup_steps, learning_rate, .. } = config;
    (total > 0 && *warmup_steps >= total).then(|| {
        format!(
            "the training has {total} steps and optimizer.warmup_steps = {warmup_steps}: it ends before the learning rate \
             has been at its peak of {learning_rate}; set optimizer.warmup_steps={} or so, or train for longer",
            total / 10
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_up_as_long_as_the_job_is_told() {
        let config = OptimizerConfig { warmup_steps: 100, ..OptimizerConfig::default() };
        let told = endless_warm_up(&config, 40).unwrap();
        for words in ["40 steps", "optimizer.warmup_steps = 100", "optimizer.warmup_steps=4 or so"] {
            assert!(told.contains(words), "{words} is not in {told}");
        }
        // the last step alone has the peak
        assert!(endless_warm_up(&config, 100).is_some());
        assert_eq!(endless_warm_up(&config, 101), None);
        assert_eq!(endless_warm_up(&OptimizerConfig { warmup_steps: 0, ..config }, 1), None);
    }

    #[test]
    fn warm_up_peak_and_floor() {
        let config = OptimizerConfig {
            learning_rate: 2.0,
            warmup_steps: 4,
            min_learning_rate_ratio: 0.1,
            schedule: ScheduleKind::Cosine,
            ..OptimizerConfig::default()
        };
        let at = |step| learning_rate(&config, Step(step), 104);
        assert_eq!((at(0), at(3), at(4)), (0.5, 2.0, 2.0));
        assert!((at(54) - 1.1).abs() < 1e-12, "half-way lies between peak and floor");
        assert!((at(104) - 0.2).abs() < 1e-12 && (at(999) - 0.2).abs() < 1e-12);
        assert!((4..104).all(|step| at(step) > at(step + 1)));
        let constant = OptimizerConfig { schedule: ScheduleKind::Constant, ..config };
        assert!((learning_rate(&constant, Step(90), 104) - 2.0).abs() < 1e-12);
    }
}
