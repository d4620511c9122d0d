//! Who belongs to a job: a state machine with explicit generations, without clock or network.
//!
//! Input: an [`Event`] and the time since the job started. Output: [`Effect`]s, and on request what a worker is to do
//! now ([`Directive`]). A worker is lost by one entrance, whatever noticed it, with one typed [`LossCause`]. A *member* is
//! whoever was let in and not lost; a *participant* is a member with a rank in the present generation. A member is *ready*
//! when it has no generation's work in hand.
//!
//! | state | event | next state | effects |
//! |---|---|---|---|
//! | gathering | join, ready | gathering; running once all wanted workers are ready | admitted; formed |
//! | gathering | worker lost or left | gathering (it is forgotten) | newcomer lost; - |
//! | gathering | join deadline, operator stop | ended | ended |
//! | running | join | running (it waits and prepares) | admitted, or refused when nobody is wanted |
//! | running | ready, of a newcomer | running, yielding; as it was if nobody is wanted | -; dismissed |
//! | running | scale below the number of participants | running, yielding | - |
//! | running | ready, of a participant that yielded | regrouping | - |
//! | running | ready, of a participant whose collective broke | regrouping (hard) | regrouping |
//! | running, regrouping | newcomer lost | as it was; running, generation + 1, if only it was waited for | newcomer lost; formed |
//! | running, regrouping | participant lost | regrouping (hard) | lost, regrouping |
//! | running, regrouping | participant lost, or its collective broke, when another is done | ended (finished) | ended |
//! | running, regrouping | the last participant disconnected, or silent with all others | as it was, for a while | - |
//! | running, regrouping | the last participant lost | stopping, ended when newcomers have left | lost, stop, ended |
//! | running, regrouping | too many recoveries without a finished step | regrouping (hard) with a stop; stopping if there is one | stop, regrouping; stop |
//! | regrouping | ready, of the last participant; enough are ready | running, generation + 1 | formed, dismissed |
//! | regrouping | tick: a participant is not ready for too long | as when it is lost | lost, regrouping |
//! | regrouping | too few for too long | running, generation + 1, with a stop | stop, formed |
//! | running, regrouping | leave, done | as it was; ended (finished) after the last | -; ended |
//! | running, regrouping | operator stop; leave, stopped or gave up | as it was, with a stop | stop |
//! | running, regrouping | leave, failed | regrouping (hard) with a stop; stopping if nobody is left | stop, regrouping; stop |
//! | running with a stop | the last participant has left; stop deadline | ended | ended |
//! | stopping | leave; worker lost; stop deadline | ended after the last | ended |
//! | any | join, with a stop or later | unchanged | refused |
//! | ended | anything | ended | - |
//!
//! *Hard* means that participants abort their collectives; else they go on to the end of a step first. With a stop, a
//! generation finishes its step, writes a checkpoint and leaves; one that loses a worker meanwhile regroups first, so that
//! no finished step is lost, and ends with the cause of its stop.

mod machine;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Incarnation, Rank, WorkerId};
use crate::phase::Phase;

/// Wanted sizes, deadlines and patience.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembershipSettings {
    /// Workers that the job starts with, and has at most until [`Event::Scale`].
    pub workers: u32,
    /// A generation has at least so many.
    pub min_workers: u32,
    /// Recoveries in a row that are tolerated without a finished step between them.
    pub max_recoveries: u32,
    /// A member that was silent for longer is lost,
    pub heartbeat_timeout: Duration,
    /// and the last participant only when it was silent for longer than this too: workers try so long to reach their
    /// coordinator, and when none of them can, the network may be at fault, not they.
    pub coordinator_timeout: Duration,
    /// So long the first generation may take to gather, and a later one to reach `min_workers`.
    pub join_timeout: Duration,
    /// Members that were told to stop must have left within this, and those that were told to regroup be ready.
    pub stop_timeout: Duration,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Join(Incarnation),
    /// A member has left `generation` (0 = it was in none) and may take part in the next; `broken` says what went wrong
    /// with the collective, if it did.
    Ready {
        worker: WorkerId,
        generation: Generation,
        broken: Option<String>,
    },
    Heartbeat(WorkerId),
    /// The connection by which a member attends is gone.
    Disconnected(WorkerId),
    /// A member that is alive holds the others up for too long, in a phase.
    Stalled {
        worker: WorkerId,
        phase: Phase,
        seconds: u64,
    },
    /// A step was finished.
    Progress(Generation),
    Leave(WorkerId, Departure),
    /// So many workers are wanted from now on.
    Scale(u32),
    OperatorStop,
    /// Who starts the workers has one that ended before all had joined, and says why.
    NeverJoined(String),
    Tick,
}

/// How a worker left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The task is finished: everything that was to be written or reported has arrived, whichever rank was to do it.
    Done,
    /// It did as a graceful stop told it.
    Stopped,
    /// This process cannot go on; another may.
    Crashed(String),
    /// It cannot go on, and another in its place could not either.
    Failed(String),
    /// The job cannot go on, whoever does it: every rank comes to the same.
    GaveUp(GiveUp, String),
}

/// Why a job is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GiveUp {
    /// Loss, gradient or scores are not finite numbers.
    Diverged,
    /// The last checkpoint could not be written.
    Unsaved,
}

/// How a worker was lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LossCause {
    Silent {
        seconds: u64,
    },
    Disconnected,
    Crashed {
        message: String,
    },
    /// The others waited for it, and it made no progress.
    Stalled {
        phase: Phase,
        seconds: u64,
    },
    /// It was told to leave its generation and did not.
    Stuck {
        seconds: u64,
    },
}

impl fmt::Display for LossCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent { seconds } => write!(f, "no heartbeat for {seconds} s"),
            Self::Disconnected => f.write_str("its connection broke"),
            Self::Crashed { message } => f.write_str(message),
            Self::Stalled { phase, seconds } => {
                write!(f, "the others waited for it for {seconds} s, in the phase {phase}")
            }
            Self::Stuck { seconds } => write!(f, "it did not leave its generation within {seconds} s"),
        }
    }
}

impl LossCause {
    /// Every [`LossCause::label`].
    pub const LABELS: [&'static str; 5] = ["silent", "disconnected", "crashed", "stuck", "stalled"];

    /// As metrics name it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Silent { .. } => "silent",
            Self::Disconnected => "disconnected",
            Self::Crashed { .. } => "crashed",
            Self::Stuck { .. } => "stuck",
            Self::Stalled { .. } => "stalled",
        }
    }
}

/// A participant that is no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    pub worker: WorkerId,
    pub rank: Rank,
    pub cause: LossCause,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worker, rank, cause } = self;
        write!(f, "rank {rank} (worker {worker}) was lost: {cause}")
    }
}

/// Why a generation ends before the job does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegroupCause {
    Lost(Loss),
    Broken {
        worker: WorkerId,
        rank: Rank,
        message: String,
    },
    /// To write down what is there, and stop.
    Stopping(StopCause),
    Joined,
    Scaled {
        workers: u32,
    },
}

impl fmt::Display for RegroupCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(loss) => loss.fmt(f),
            Self::Broken { worker, rank, message } => {
                write!(f, "the collective broke at rank {rank} (worker {worker}): {message}")
            }
            Self::Stopping(cause) => write!(f, "to write a checkpoint and stop: {cause}"),
            Self::Joined => f.write_str("a worker joined"),
            Self::Scaled { workers } => write!(f, "{workers} workers are wanted"),
        }
    }
}

/// Why a job stops before its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    Operator,
    /// Nobody is left who holds the state.
    Lost(Loss),
    Failed {
        worker: WorkerId,
        rank: Rank,
        message: String,
    },
    JoinDeadline {
        joined: u32,
        wanted: u32,
        seconds: u64,
    },
    /// A worker has ended before all had joined.
    NeverJoined {
        message: String,
    },
    NoProgress {
        recoveries: u32,
        last: String,
    },
    GaveUp {
        why: GiveUp,
        message: String,
    },
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("stopped by its operator"),
            Self::Lost(loss) => loss.fmt(f),
            Self::Failed { worker, rank, message } => write!(f, "rank {rank} (worker {worker}) failed: {message}"),
            Self::JoinDeadline { joined, wanted, seconds } => write!(
                f,
                "only {joined} of {wanted} workers were there within {seconds} s; look into the workers' logs, or raise \
                 cluster.join_timeout"
            ),
            Self::NoProgress { recoveries, last } => write!(
                f,
                "{recoveries} recoveries without a finished step (cluster.max_recoveries); the last one because {last}"
            ),
            Self::NeverJoined { message } | Self::GaveUp { message, .. } => f.write_str(message),
        }
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
            Self::Full => "the job already has all its workers (cluster.workers, or what `learn-launch scale` set)",
            Self::Over => "the job is stopping or has ended",
        })
    }
}

/// What the shell has to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    Admitted(WorkerId),
    Refused(Refusal),
    Lost(Loss),
    /// A newcomer, which had no rank yet, is lost: it costs nothing.
    NewcomerLost(WorkerId, LossCause),
    /// The generation ends at once, for a new one.
    Regrouping(RegroupCause),
    /// A generation was formed; `members[rank]` is the worker of that rank.
    Formed {
        generation: Generation,
        members: Vec<WorkerId>,
    },
    /// Nobody wants this worker any more.
    Dismissed(WorkerId),
    /// Tell every member to stop.
    Stop(StopCause),
    Ended(Outcome),
}

/// What the members of a running generation are to do after the step they are at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Continue,
    /// Leave the generation and be ready for the next.
    Regroup,
    /// Write a checkpoint and leave.
    Stop(StopCause),
}

/// What a worker is to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Nothing, for the next generation will come.
    Wait,
    Run {
        generation: Generation,
        rank: Rank,
        world_size: u32,
        call: Call,
    },
    /// Abort the collectives of this generation, and be ready for the next.
    Regroup(Generation),
    /// Abort the collectives, and leave.
    Stop(StopCause),
    /// Leave in peace: the job has finished, or needs fewer workers.
    Dismissed,
    /// The coordinator does not know this worker (any more): it must join again or leave.
    Unknown,
}

/// The state of a membership; see the module's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    Gathering {
        members: Members,
    },
    /// `yielding`: the participants are asked to regroup after their step.
    Running {
        members: Members,
        yielding: bool,
    },
    Regrouping {
        members: Members,
        hard: bool,
        since: Duration,
    },
    Stopping {
        members: Members,
        cause: StopCause,
        since: Duration,
    },
    Ended(Outcome),
}

/// Those who were let in and not lost.
pub type Members = BTreeMap<WorkerId, Member>;

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub incarnation: Incarnation,
    /// In the present generation; none for those who wait for the next.
    pub rank: Option<Rank>,
    pub last_seen: Duration,
    /// Its connection broke, and it has to be heard of again by then.
    #[serde(default)]
    pub due: Option<Duration>,
    /// It may take part in the next generation.
    pub ready: bool,
    /// It has said that its task is finished.
    pub done: bool,
}

impl Member {
    fn heard(&mut self, now: Duration) {
        self.last_seen = now;
        self.due = None;
    }

    /// It has work of the present generation to do.
    #[must_use]
    pub fn takes_part(&self) -> bool {
        self.rank.is_some() && !self.done
    }
}

/// A graceful stop under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub cause: StopCause,
    pub since: Duration,
}

/// The membership of one job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Membership {
    settings: MembershipSettings,
    /// Workers that are wanted now.
    wanted: u32,
    generation: Generation,
    world_size: u32,
    next_worker: u32,
    /// Since the last finished step.
    recoveries: u32,
    dismissed: BTreeSet<WorkerId>,
    stop: Option<Stop>,
    state: State,
}

impl Membership {
    #[must_use]
    pub fn new(settings: MembershipSettings) -> Self {
        Self {
            wanted: settings.workers,
            settings,
            generation: Generation(0),
            world_size: 0,
            next_worker: 0,
            recoveries: 0,
            dismissed: BTreeSet::new(),
            stop: None,
            state: State::Gathering { members: Members::new() },
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

    /// Ranks of the present generation; 0 before the first.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Workers that the job wants to have.
    #[must_use]
    pub fn wanted(&self) -> u32 {
        self.wanted
    }

    /// Whether a worker of this number was ever let in.
    #[must_use]
    pub fn has_admitted(&self, worker: WorkerId) -> bool {
        worker.0 < self.next_worker
    }

    /// Recoveries in a row without a finished step.
    #[must_use]
    pub fn recoveries(&self) -> u32 {
        self.recoveries
    }

    /// Why the job stops or has stopped.
    #[must_use]
    pub fn stop_cause(&self) -> Option<&StopCause> {
        match &self.state {
            State::Stopping { cause, .. } | State::Ended(Outcome::Stopped(cause)) => Some(cause),
            State::Ended(Outcome::Finished) => None,
            State::Gathering { .. } | State::Running { .. } | State::Regrouping { .. } => {
                self.stop.as_ref().map(|stop| &stop.cause)
            }
        }
    }

    /// Those who were let in and not lost; nobody after the end.
    #[must_use]
    pub fn members(&self) -> Option<&Members> {
        match &self.state {
            State::Gathering { members }
            | State::Running { members, .. }
            | State::Regrouping { members, .. }
            | State::Stopping { members, .. } => Some(members),
            State::Ended(_) => None,
        }
    }

    /// All but the members, who can be kept one by one.
    #[must_use]
    pub fn without_members(&self) -> Self {
        let members = Members::new();
        let state = match &self.state {
            State::Gathering { .. } => State::Gathering { members },
            &State::Running { yielding, .. } => State::Running { members, yielding },
            &State::Regrouping { hard, since, .. } => State::Regrouping { members, hard, since },
            State::Stopping { cause, since, .. } => State::Stopping { members, cause: cause.clone(), since: *since },
            State::Ended(outcome) => State::Ended(outcome.clone()),
        };
        Self { state, stop: self.stop.clone(), dismissed: self.dismissed.clone(), ..*self }
    }

    /// Gives the members back to what [`Membership::without_members`] gave.
    pub fn set_members(&mut self, members: Members) {
        if let Some(none) = self.members_mut() {
            *none = members;
        }
    }

    /// Time starts anew, as for a coordinator that takes over: everybody has been seen just now, and every wait begins.
    pub fn restart_clock(&mut self, now: Duration) {
        if let Some(stop) = &mut self.stop {
            stop.since = now;
        }
        if let State::Regrouping { since, .. } | State::Stopping { since, .. } = &mut self.state {
            *since = now;
        }
        for member in self.members_mut().into_iter().flatten().map(|(_, member)| member) {
            member.heard(now);
        }
    }

    /// What `worker` is to do now.
    #[must_use]
    pub fn directive(&self, worker: WorkerId) -> Directive {
        let run = |rank, call| Directive::Run { generation: self.generation, rank, world_size: self.world_size, call };
        let stop = || self.stop.as_ref().map(|stop| Call::Stop(stop.cause.clone()));
        let (members, hard, yielding) = match &self.state {
            State::Stopping { cause, .. } | State::Ended(Outcome::Stopped(cause)) => {
                return Directive::Stop(cause.clone());
            }
            State::Ended(Outcome::Finished) => return Directive::Dismissed,
            State::Gathering { members } => (members, false, false),
            State::Running { members, yielding } => (members, false, *yielding),
            State::Regrouping { members, hard, .. } => (members, *hard, true),
        };
        match members.get(&worker) {
            None if self.dismissed.contains(&worker) => Directive::Dismissed,
            None => Directive::Unknown,
            Some(Member { rank: Some(rank), ready: false, .. }) => {
                if hard {
                    return Directive::Regroup(self.generation);
                }
                let call = if yielding { Call::Regroup } else { Call::Continue };
                run(*rank, stop().unwrap_or(call))
            }
            Some(_) => Directive::Wait,
        }
    }
}
