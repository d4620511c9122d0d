//! Which checkpoints go.

use learn_domain::Step;

/// The steps that are neither among the latest `keep_last` nor the best one.
pub fn surplus(steps: &[Step], keep_last: u32, best: Option<Step>) -> Vec<Step> {
    let mut sorted = steps.to_vec();
    sorted.sort_unstable();
    let kept_from = sorted.len().saturating_sub(keep_last as usize);
    sorted[..kept_from].iter().copied().filter(|step| Some(*step) != best).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_and_the_best_stay() {
        let steps: Vec<Step> = [30, 10, 20, 40].map(Step).to_vec();
        assert_eq!(surplus(&steps, 2, None), [Step(10), Step(20)]);
        assert_eq!(surplus(&steps, 2, Some(Step(10))), [Step(20)]);
        assert_eq!(surplus(&steps, 9, None), []);
    }
}
