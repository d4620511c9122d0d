//! Who belongs to a job: a state machine with explicit generations, without clock or network.
//!
//! Input: an [`Event`] and the time since the coordinator started. Output: [`Effect`]s. Loss of a worker has one
//! entrance whatever noticed it (silence, its own report, a deadline), and one typed [`StopCause`].
//!
//! | state | event | next state | effects |
//! |---|---|---|---|
//! | gathering | join, not the last | gathering | admitted |
//! | gathering | join, the last | running, generation + 1 | admitted, formed |
//! | gathering | worker silent or left | gathering (the worker is forgotten) | - |
//! | gathering | join deadline, operator stop | ended | ended |
//! | running | heartbeat | running | - |
//! | running | leave, done | running; ended (finished) after the last | -; ended |
//! | running | leave, failed; worker silent | stopping (abort) | stop |
//! | running | operator stop; leave, stopped (a worker was asked to by its own signal) | stopping (graceful) | stop |
//! | running, stopping (graceful) | leave, gave up (no worker could do better) | stopping (graceful) | stop |
//! | stopping | leave; worker silent; stop deadline | ended after the last | ended |
//! | stopping (graceful) | leave, failed; worker silent | stopping (abort) | stop |
//! | any but gathering | join | unchanged | refused |
//! | ended | anything | ended | refused for a join, else - |

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::ids::{Generation, Incarnation, Rank, WorkerId};

/// Deadlines and the wanted size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MembershipSettings {
    pub world_size: u32,
    /// A member that was silent for longer is lost.
    pub heartbeat_timeout: Duration,
    /// All members must have joined within this.
    pub join_timeout: Duration,
    /// Members that were told to stop must have left within this.
    pub stop_timeout: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Join(Incarnation),
    Heartbeat(WorkerId),
    Leave(WorkerId, Departure),
    OperatorStop,
    Tick,
}

/// How a worker left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its task is finished.
    Done,
    /// It did as a graceful stop told it.
    Stopped,
    /// It cannot go on.
    Failed(String),
    /// The job cannot go on, whoever does it: every rank comes to the same.
    GaveUp(GiveUp, String),
}

/// Why a job is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// Loss, gradient or scores are not finite numbers.
    Diverged,
    /// The last checkpoint could not be written.
    Unsaved,
}

/// Why a job stops before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    Operator,
    Silent { worker: WorkerId, rank: Rank, seconds: u64 },
    Failed { worker: WorkerId, rank: Rank, message: String },
    JoinDeadline { joined: u32, wanted: u32, seconds: u64 },
    GaveUp { why: GiveUp, message: String },
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("stopped by its operator"),
            Self::Silent { worker, rank, seconds } => {
                write!(f, "rank {rank} (worker {worker}) was lost: no heartbeat for {seconds} s")
            }
            Self::Failed { worker, rank, message } => write!(f, "rank {rank} (worker {worker}) failed: {message}"),
            Self::JoinDeadline { joined, wanted, seconds } => write!(
                f,
                "only {joined} of {wanted} workers joined within {seconds} s; look into the workers' logs, or raise \
                 cluster.join_timeout"
            ),
            Self::GaveUp { message, .. } => f.write_str(message),
        }
    }
}

impl StopCause {
    /// Workers finish the step and write a checkpoint, instead of aborting their collectives.
    #[must_use]
    pub fn graceful(&self) -> bool {
        matches!(self, Self::Operator | Self::GaveUp { .. })
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    Stopped(StopCause),
}

/// Why a worker is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The job has its workers.
    Full,
    /// The job stops or has ended.
    Over,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "the job already has all its workers (cluster.workers)",
            Self::Over => "the job is stopping or has ended",
        })
    }
}

/// What the shell has to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    Admitted(WorkerId),
    Refused(Refusal),
    /// A generation was formed; `members[rank]` is the worker of that rank.
    Formed {
        generation: Generation,
        members: Vec<WorkerId>,
    },
    /// Tell every member to stop.
    Stop(StopCause),
    Ended(Outcome),
}

/// What a worker is to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Directive {
    Wait,
    Run {
        generation: Generation,
        rank: Rank,
        world_size: u32,
    },
    Stop(StopCause),
    /// The coordinator does not know this worker (any more): it must join again or leave.
    Unknown,
}

/// The state of a membership; see the module's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Gathering { members: BTreeMap<WorkerId, Member> },
    Running { members: BTreeMap<WorkerId, Member> },
    Stopping { members: BTreeMap<WorkerId, Member>, cause: StopCause, since: Duration },
    Ended(Outcome),
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub incarnation: Incarnation,
    pub rank: Rank,
    pub last_seen: Duration,
    /// It has said that its task is finished.
    pub done: bool,
}

/// The membership of one job.
#[derive(Clone, Debug)]
pub struct Membership {
    settings: MembershipSettings,
    generation: Generation,
    next_worker: u32,
    state: State,
}

impl Membership {
    #[must_use]
    pub fn new(settings: MembershipSettings) -> Self {
        Self {
            settings,
            generation: Generation(0),
            next_worker: 0,
            state: State::Gathering { members: BTreeMap::new() },
        }
    }

    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What `worker` is to do now.
    #[must_use]
    pub fn directive(&self, worker: WorkerId) -> Directive {
        match &self.state {
            State::Gathering { members } if members.contains_key(&worker) => Directive::Wait,
            State::Running { members } => members.get(&worker).map_or(Directive::Unknown, |member| Directive::Run {
                generation: self.generation,
                rank: member.rank,
                world_size: self.settings.world_size,
            }),
            State::Stopping { cause, .. } | State::Ended(Outcome::Stopped(cause)) => Directive::Stop(cause.clone()),
            State::Gathering { .. } | State::Ended(Outcome::Finished) => Directive::Unknown,
        }
    }

    /// Takes one event at time `now` (since the coordinator started).
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        let mut effects = match event {
            Event::Join(incarnation) => self.join(now, incarnation),
            Event::Heartbeat(worker) => {
                if let Some(member) = self.members_mut().and_then(|members| members.get_mut(&worker)) {
                    member.last_seen = now;
                }
                Vec::new()
            }
            Event::Leave(worker, departure) => self.leave(now, worker, departure),
            Event::OperatorStop => self.operator_stop(now),
            Event::Tick => Vec::new(),
        };
        effects.extend(self.deadlines(now));
        effects
    }

    fn members_mut(&mut self) -> Option<&mut BTreeMap<WorkerId, Member>> {
        match &mut self.state {
            State::Gathering { members } | State::Running { members } | State::Stopping { members, .. } => {
                Some(members)
            }
            State::Ended(_) => None,
        }
    }

    fn join(&mut self, now: Duration, incarnation: Incarnation) -> Vec<Effect> {
        let members = match &mut self.state {
            State::Gathering { members } => members,
            State::Running { .. } => return vec![Effect::Refused(Refusal::Full)],
            State::Stopping { .. } | State::Ended(_) => return vec![Effect::Refused(Refusal::Over)],
        };
        // a retried request of the same start is the same worker
        if let Some((&worker, member)) = members.iter_mut().find(|(_, member)| member.incarnation == incarnation) {
            member.last_seen = now;
            return vec![Effect::Admitted(worker)];
        }
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        members.insert(worker, Member { incarnation, rank: Rank(0), last_seen: now, done: false });
        let mut effects = vec![Effect::Admitted(worker)];
        if members.len() as u32 == self.settings.world_size {
            let mut members = std::mem::take(members);
            for (rank, member) in members.values_mut().enumerate() {
                member.rank = Rank(rank as u32);
                member.last_seen = now;
            }
            self.generation.0 += 1;
            effects.push(Effect::Formed { generation: self.generation, members: members.keys().copied().collect() });
            self.state = State::Running { members };
        }
        effects
    }

    fn leave(&mut self, now: Duration, worker: WorkerId, departure: Departure) -> Vec<Effect> {
        match (&mut self.state, departure) {
            (State::Gathering { members }, _) => {
                members.remove(&worker);
                Vec::new()
            }
            (State::Running { members }, Departure::Done) => {
                let Some(member) = members.get_mut(&worker) else { return Vec::new() };
                member.done = true;
                if members.values().all(|member| member.done) { self.end(Outcome::Finished) } else { Vec::new() }
            }
            (State::Running { members }, Departure::Stopped) => {
                if members.remove(&worker).is_none() {
                    return Vec::new();
                }
                self.stop(now, StopCause::Operator)
            }
            (State::Running { members } | State::Stopping { members, .. }, Departure::GaveUp(why, message)) => {
                if members.remove(&worker).is_none() {
                    return Vec::new();
                }
                match &self.state {
                    // all give up for the same reason; a cause that is worse or the same stays
                    State::Stopping { members, cause, .. } if *cause != StopCause::Operator => {
                        if members.is_empty() {
                            self.end_stopped()
                        } else {
                            Vec::new()
                        }
                    }
                    _ => self.stop(now, StopCause::GaveUp { why, message }),
                }
            }
            (State::Running { members }, Departure::Failed(message)) => {
                let Some(member) = members.remove(&worker) else { return Vec::new() };
                self.stop(now, StopCause::Failed { worker, rank: member.rank, message })
            }
            (State::Stopping { members, cause, .. }, departure) => {
                let Some(member) = members.remove(&worker) else { return Vec::new() };
                if let (true, Departure::Failed(message)) = (cause.graceful(), departure) {
                    let cause = StopCause::Failed { worker, rank: member.rank, message };
                    return self.stop(now, cause);
                }
                if members.is_empty() { self.end_stopped() } else { Vec::new() }
            }
            (State::Ended(_), _) => Vec::new(),
        }
    }

    fn operator_stop(&mut self, now: Duration) -> Vec<Effect> {
        match &self.state {
            State::Gathering { .. } => self.end(Outcome::Stopped(StopCause::Operator)),
            State::Running { .. } => self.stop(now, StopCause::Operator),
            State::Stopping { .. } | State::Ended(_) => Vec::new(),
        }
    }

    fn deadlines(&mut self, now: Duration) -> Vec<Effect> {
        let MembershipSettings { heartbeat_timeout, join_timeout, stop_timeout, world_size } = self.settings;
        let silent = |member: &Member| now.saturating_sub(member.last_seen) > heartbeat_timeout;
        match &mut self.state {
            State::Gathering { members } => {
                members.retain(|_, member| !silent(member));
                if now <= join_timeout {
                    return Vec::new();
                }
                let joined = members.len() as u32;
                let cause = StopCause::JoinDeadline { joined, wanted: world_size, seconds: join_timeout.as_secs() };
                self.end(Outcome::Stopped(cause))
            }
            State::Running { members } => {
                let lost = members.iter().find(|(_, member)| !member.done && silent(member));
                let Some((&worker, member)) = lost else { return Vec::new() };
                let (rank, seconds) = (member.rank, now.saturating_sub(member.last_seen).as_secs());
                members.remove(&worker);
                self.stop(now, StopCause::Silent { worker, rank, seconds })
            }
            State::Stopping { members, cause, since } => {
                if now.saturating_sub(*since) > stop_timeout {
                    return self.end_stopped();
                }
                let lost = members.iter().find(|(_, member)| silent(member));
                let Some((&worker, member)) = lost else { return Vec::new() };
                let (rank, seconds) = (member.rank, now.saturating_sub(member.last_seen).as_secs());
                members.remove(&worker);
                if cause.graceful() {
                    return self.stop(now, StopCause::Silent { worker, rank, seconds });
                }
                if members.is_empty() { self.end_stopped() } else { Vec::new() }
            }
            State::Ended(_) => Vec::new(),
        }
    }

    fn stop(&mut self, now: Duration, cause: StopCause) -> Vec<Effect> {
        let mut members = self.members_mut().map(std::mem::take).unwrap_or_default();
        members.retain(|_, member| !member.done);
        let nobody_left = members.is_empty();
        self.state = State::Stopping { members, cause: cause.clone(), since: now };
        let mut effects = vec![Effect::Stop(cause)];
        if nobody_left {
            effects.extend(self.end_stopped());
        }
        effects
    }

    fn end_stopped(&mut self) -> Vec<Effect> {
        match &self.state {
            State::Stopping { cause, .. } => self.end(Outcome::Stopped(cause.clone())),
            _ => Vec::new(),
        }
    }

    fn end(&mut self, outcome: Outcome) -> Vec<Effect> {
        self.state = State::Ended(outcome.clone());
        vec![Effect::Ended(outcome)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SETTINGS: MembershipSettings = MembershipSettings {
        world_size: 3,
        heartbeat_timeout: Duration::from_secs(10),
        join_timeout: Duration::from_secs(60),
        stop_timeout: Duration::from_secs(30),
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn running() -> Membership {
        let mut membership = Membership::new(SETTINGS);
        for name in ["a", "b", "c"] {
            membership.step(at(1), Event::Join(Incarnation(name.into())));
        }
        membership
    }

    #[test]
    fn the_last_join_forms_a_generation_with_dense_ranks() {
        let mut membership = Membership::new(SETTINGS);
        let join =
            |membership: &mut Membership, name: &str| membership.step(at(1), Event::Join(Incarnation(name.into())));
        assert_eq!(join(&mut membership, "a"), [Effect::Admitted(WorkerId(0))]);
        assert_eq!(join(&mut membership, "a"), [Effect::Admitted(WorkerId(0))], "a retry is not a second worker");
        assert_eq!(membership.directive(WorkerId(0)), Directive::Wait);
        join(&mut membership, "b");
        let formed = Effect::Formed { generation: Generation(1), members: vec![WorkerId(0), WorkerId(1), WorkerId(2)] };
        assert_eq!(join(&mut membership, "c"), [Effect::Admitted(WorkerId(2)), formed]);
        let run = Directive::Run { generation: Generation(1), rank: Rank(2), world_size: 3 };
        assert_eq!(membership.directive(WorkerId(2)), run);
        assert_eq!(join(&mut membership, "d"), [Effect::Refused(Refusal::Full)]);
    }

    #[test]
    fn a_silent_member_stops_the_job_with_its_name() {
        let mut membership = running();
        membership.step(at(10), Event::Heartbeat(WorkerId(0)));
        membership.step(at(10), Event::Heartbeat(WorkerId(2)));
        assert_eq!(membership.step(at(11), Event::Tick), []);
        let cause = StopCause::Silent { worker: WorkerId(1), rank: Rank(1), seconds: 11 };
        assert_eq!(membership.step(at(12), Event::Tick), [Effect::Stop(cause.clone())]);
        assert!(cause.to_string().contains("rank 1"));
        assert_eq!(membership.directive(WorkerId(0)), Directive::Stop(cause.clone()));
        membership.step(at(13), Event::Leave(WorkerId(0), Departure::Failed("aborted".into())));
        let end = membership.step(at(13), Event::Leave(WorkerId(2), Departure::Failed("aborted".into())));
        assert_eq!(end, [Effect::Ended(Outcome::Stopped(cause))], "the first cause is the one that counts");
    }

    #[test]
    fn all_done_is_finished_and_waits_for_the_slowest() {
        let mut membership = running();
        for worker in [2, 0] {
            assert_eq!(membership.step(at(2), Event::Leave(WorkerId(worker), Departure::Done)), []);
        }
        // the ones that are done are not missed
        membership.step(at(11), Event::Heartbeat(WorkerId(1)));
        assert_eq!(membership.step(at(15), Event::Tick), []);
        let end = membership.step(at(16), Event::Leave(WorkerId(1), Departure::Done));
        assert_eq!(end, [Effect::Ended(Outcome::Finished)]);
    }

    #[test]
    fn an_operator_stop_is_graceful_until_someone_fails() {
        let mut membership = running();
        assert_eq!(membership.step(at(2), Event::OperatorStop), [Effect::Stop(StopCause::Operator)]);
        membership.step(at(3), Event::Leave(WorkerId(0), Departure::Stopped));
        let effects = membership.step(at(3), Event::Leave(WorkerId(1), Departure::Failed("disk full".into())));
        assert!(matches!(&effects[..], [Effect::Stop(StopCause::Failed { message, .. })] if message == "disk full"));
        let end = membership.step(at(4), Event::Leave(WorkerId(2), Departure::Stopped));
        assert!(matches!(&end[..], [Effect::Ended(Outcome::Stopped(StopCause::Failed { .. }))]));
    }

    #[test]
    fn a_worker_that_was_signalled_stops_the_job_gracefully() {
        let mut membership = running();
        let effects = membership.step(at(2), Event::Leave(WorkerId(1), Departure::Stopped));
        assert_eq!(effects, [Effect::Stop(StopCause::Operator)]);
        for worker in [0, 2] {
            membership.step(at(3), Event::Leave(WorkerId(worker), Departure::Stopped));
        }
        assert_eq!(membership.state(), &State::Ended(Outcome::Stopped(StopCause::Operator)));
    }

    #[test]
    fn a_job_whose_workers_never_come_ends() {
        let mut membership = Membership::new(SETTINGS);
        membership.step(at(58), Event::Join(Incarnation("a".into())));
        let end = membership.step(at(61), Event::Tick);
        let cause = StopCause::JoinDeadline { joined: 1, wanted: 3, seconds: 60 };
        assert_eq!(end, [Effect::Ended(Outcome::Stopped(cause))]);
    }

    fn event() -> impl Strategy<Value = (u64, Event)> {
        let worker = (0_u32..5).prop_map(WorkerId);
        let departure =
            prop_oneof![Just(Departure::Done), Just(Departure::Stopped), Just(Departure::Failed("x".into()))];
        let event = prop_oneof![
            3 => "[a-e]".prop_map(|name| Event::Join(Incarnation(name))),
            3 => worker.clone().prop_map(Event::Heartbeat),
            2 => (worker, departure).prop_map(|(worker, departure)| Event::Leave(worker, departure)),
            1 => Just(Event::OperatorStop),
            3 => Just(Event::Tick),
        ];
        (0_u64..8, event)
    }

    proptest! {
        #[test]
        fn any_history_ends_and_never_has_two_generations(events in prop::collection::vec(event(), 0..60)) {
            let mut membership = Membership::new(SETTINGS);
            let mut now = 0;
            let mut formed = 0;
            let mut ended = 0;
            for (pause, event) in events {
                now += pause;
                for effect in membership.step(at(now), event) {
                    match effect {
                        Effect::Formed { generation, members } => {
                            formed += 1;
                            prop_assert_eq!(generation, Generation(formed));
                            let distinct: std::collections::BTreeSet<_> = members.iter().collect();
                            prop_assert_eq!(distinct.len(), 3);
                        }
                        Effect::Ended(_) => ended += 1,
                        Effect::Admitted(_) | Effect::Refused(_) | Effect::Stop(_) => {}
                    }
                }
                if let State::Running { members } = membership.state() {
                    let ranks: std::collections::BTreeSet<u32> = members.values().map(|member| member.rank.0).collect();
                    prop_assert_eq!(ranks, (0..3).collect());
                }
            }
            // silence alone brings every history to its end: no state without a way on
            for _ in 0..20 {
                now += 61;
                ended += membership.step(at(now), Event::Tick).iter().filter(|e| matches!(e, Effect::Ended(_))).count();
            }
            prop_assert!(formed <= 1);
            prop_assert_eq!(ended, 1);
            prop_assert!(matches!(membership.state(), State::Ended(_)));
        }
    }
}
