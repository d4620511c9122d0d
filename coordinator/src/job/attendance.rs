//! Who attends, and what each was told last.
//!
//! Input: attendances that begin and end, the job. Output: directives, each time they change. Invariant: a worker has one
//! attendance; a new one replaces the one before, whose end then says nothing.

use std::collections::BTreeMap;

use learn_domain::WorkerId;
use learn_domain::membership::Directive;
use tokio::sync::watch;

use super::Job;

#[derive(Debug, Default)]
pub struct Attendances {
    workers: BTreeMap<WorkerId, (u64, watch::Sender<Directive>)>,
    next: u64,
    /// Revision of the job that everybody was told.
    told: u64,
}

impl Attendances {
    /// Gives the attendance's number, and what `worker` is to do from now on.
    pub fn begin(&mut self, worker: WorkerId, directive: Directive) -> (u64, watch::Receiver<Directive>) {
        let number = self.next;
        self.next += 1;
        let (sender, receiver) = watch::channel(directive);
        self.workers.insert(worker, (number, sender));
        (number, receiver)
    }

    /// The number of the attendance that begins next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether the attendance was its worker's present one.
    pub fn end(&mut self, worker: WorkerId, number: u64) -> bool {
        let present = self.workers.get(&worker).is_some_and(|(known, _)| *known == number);
        if present {
            self.workers.remove(&worker);
        }
        present
    }

    #[must_use]
    pub fn attends(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }

    /// Tells everybody what has changed. Costs nothing while nothing has, however many attend.
    pub fn tell(&mut self, job: &Job) {
        if std::mem::replace(&mut self.told, job.revision()) == job.revision() {
            return;
        }
        for (&worker, (_, sender)) in &self.workers {
            let directive = job.directive(worker);
            sender.send_if_modified(|known| {
                let changed = *known != directive;
                if changed {
                    *known = directive;
                }
                changed
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attendance_that_was_replaced_ends_unnoticed() {
        let mut attendances = Attendances::default();
        let worker = WorkerId(3);
        let (first, _) = attendances.begin(worker, Directive::Wait);
        let (second, told) = attendances.begin(worker, Directive::Wait);
        assert!(!attendances.end(worker, first));
        assert!(attendances.end(worker, second) && told.has_changed().is_err());
        assert!(!attendances.end(worker, second), "once");
    }
}
