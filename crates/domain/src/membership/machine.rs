//! The transitions of [`Membership`]; the module above has their table.

use std::time::Duration;

use super::{
    Departure, Effect, Event, Loss, LossCause, Member, Members, Membership, Outcome, Refusal, RegroupCause, State,
    Stop, StopCause,
};
use crate::ids::{Generation, Incarnation, Rank, WorkerId};

/// The last participant may take this long to be heard of again when its connection broke out of full health: if its process
/// lives, that takes an instant.
const RECONNECT: Duration = Duration::from_secs(3);

impl Membership {
    /// Takes one event at time `now` (since the job started). Deadlines are looked at by a tick alone, so that the effects of
    /// any other event are its own.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        match event {
            Event::Join(incarnation) => self.join(now, incarnation),
            Event::Ready { worker, generation, broken } => self.ready(now, worker, (generation, broken)),
            Event::Heartbeat(worker) => {
                self.seen(now, worker);
                Vec::new()
            }
            Event::Disconnected(worker) => self.disconnected(now, worker),
            Event::Stalled { worker, phase, seconds } => self.lose(now, worker, LossCause::Stalled { phase, seconds }),
            Event::Progress(generation) => {
                if generation == self.generation {
                    self.recoveries = 0;
                }
                Vec::new()
            }
            Event::Leave(worker, departure) => self.leave(now, worker, departure),
            Event::Scale(workers) => self.scale(now, workers),
            Event::OperatorStop => self.end_or_stop(now, StopCause::Operator),
            Event::NeverJoined(message) => self.end_or_stop(now, StopCause::NeverJoined { message }),
            Event::Tick => self.deadlines(now),
        }
    }

    pub(super) fn members_mut(&mut self) -> Option<&mut Members> {
        match &mut self.state {
            State::Gathering { members }
            | State::Running { members, .. }
            | State::Regrouping { members, .. }
            | State::Stopping { members, .. } => Some(members),
            State::Ended(_) => None,
        }
    }

    fn seen(&mut self, now: Duration, worker: WorkerId) {
        if let Some(member) = self.members_mut().and_then(|members| members.get_mut(&worker)) {
            member.heard(now);
        }
    }

    fn take_members(&mut self) -> Members {
        self.members_mut().map(std::mem::take).unwrap_or_default()
    }

    fn participants(&self) -> impl Iterator<Item = (WorkerId, &Member)> {
        let members = self.members().into_iter().flatten();
        members.filter(|(_, member)| member.takes_part()).map(|(&worker, member)| (worker, member))
    }

    fn join(&mut self, now: Duration, incarnation: Incarnation) -> Vec<Effect> {
        let (stopping, wanted) = (self.stop.is_some(), self.wanted as usize);
        let members = match &mut self.state {
            State::Gathering { members } | State::Running { members, .. } | State::Regrouping { members, .. } => {
                members
            }
            State::Stopping { .. } | State::Ended(_) => return vec![Effect::Refused(Refusal::Over)],
        };
        // a retried request of the same start is the same worker
        if let Some((&worker, member)) = members.iter_mut().find(|(_, member)| member.incarnation == incarnation) {
            member.heard(now);
            return vec![Effect::Admitted(worker)];
        }
        if stopping {
            return vec![Effect::Refused(Refusal::Over)];
        }
        if members.len() >= wanted {
            return vec![Effect::Refused(Refusal::Full)];
        }
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        members
            .insert(worker, Member { incarnation, rank: None, last_seen: now, due: None, ready: false, done: false });
        vec![Effect::Admitted(worker)]
    }

    fn ready(&mut self, now: Duration, worker: WorkerId, left: (Generation, Option<String>)) -> Vec<Effect> {
        let (generation, broken) = left;
        self.seen(now, worker);
        let current = self.generation;
        let Some(member) = self.members_mut().and_then(|members| members.get_mut(&worker)) else { return Vec::new() };
        // a retry from before the generation that it takes part in by now
        if member.done || (member.rank.is_some() && generation != current) {
            return Vec::new();
        }
        member.ready = true;
        let rank = member.rank;
        match (&mut self.state, rank, broken) {
            (State::Gathering { .. } | State::Regrouping { .. }, _, _) => self.form_if_complete(now),
            (State::Running { members, .. }, None, _)
                if members.values().filter(|member| member.takes_part()).count() >= self.wanted as usize =>
            {
                members.remove(&worker);
                self.dismiss(worker)
            }
            (State::Running { yielding, .. }, None, _) => {
                *yielding = true;
                Vec::new()
            }
            (State::Running { members, yielding: true }, Some(_), None) => {
                let members = std::mem::take(members);
                self.state = State::Regrouping { members, hard: false, since: now };
                self.form_if_complete(now)
            }
            (State::Running { .. }, Some(rank), broken) => {
                let message = broken.unwrap_or_else(|| "it left the generation unasked".into());
                self.recover(now, RegroupCause::Broken { worker, rank, message })
            }
            (State::Stopping { .. } | State::Ended(_), _, _) => Vec::new(),
        }
    }

    /// Ends the generation at once, for a new one.
    fn recover(&mut self, now: Duration, cause: RegroupCause) -> Vec<Effect> {
        if self.all_is_done() {
            return self.end_done();
        }
        // what breaks while a generation is being ended belongs to the same recovery
        if !matches!(self.state, State::Regrouping { hard: true, .. }) {
            self.recoveries += 1;
        }
        if self.recoveries > self.settings.max_recoveries {
            let (recoveries, last) = (self.recoveries, cause.to_string());
            let cause = StopCause::NoProgress { recoveries, last };
            // once more, to write down what they hold; if that fails too, there is no more to do
            if self.stop.is_some() {
                return self.abort(now, cause);
            }
            return self.save_and_stop(now, cause);
        }
        let members = self.take_members();
        self.state = State::Regrouping { members, hard: true, since: now };
        let mut effects = vec![Effect::Regrouping(cause)];
        effects.extend(self.form_if_complete(now));
        effects
    }

    /// A rank is done when it has seen the last of all that was to do come to its end: whatever befalls the others then
    /// takes nothing away.
    fn all_is_done(&self) -> bool {
        self.members().into_iter().flatten().any(|(_, member)| member.done)
    }

    /// Forms the next generation once nobody is missing.
    fn form_if_complete(&mut self, now: Duration) -> Vec<Effect> {
        let (needed, members) = match &self.state {
            State::Gathering { members } => (self.wanted, members),
            // with a stop it is formed to write a checkpoint, by however few
            State::Regrouping { members, .. } if self.stop.is_some() => (1, members),
            State::Regrouping { members, .. } => (self.settings.min_workers.min(self.wanted), members),
            _ => return Vec::new(),
        };
        let ready = members.values().filter(|member| member.ready).count();
        let waits = members.values().any(|member| member.takes_part() && !member.ready);
        if waits || ready < needed.max(1) as usize { Vec::new() } else { self.form(now) }
    }

    fn form(&mut self, now: Duration) -> Vec<Effect> {
        let mut members = self.take_members();
        members.retain(|_, member| !member.done);
        let mut order: Vec<(Rank, WorkerId)> = members
            .iter()
            .filter(|(_, member)| member.ready)
            // those who hold the state stay in front, so that the first rank changes as seldom as can be
            .map(|(&worker, member)| (member.rank.unwrap_or(Rank(u32::MAX)), worker))
            .collect();
        order.sort_unstable();
        let chosen: Vec<WorkerId> = order.iter().take(self.wanted as usize).map(|&(_, worker)| worker).collect();
        let mut effects = Vec::new();
        for &(_, worker) in order.iter().skip(chosen.len()) {
            members.remove(&worker);
            effects.extend(self.dismiss(worker));
        }
        for member in members.values_mut() {
            member.rank = None;
        }
        for (rank, worker) in chosen.iter().enumerate() {
            if let Some(member) = members.get_mut(worker) {
                member.rank = Some(Rank(rank as u32));
                member.ready = false;
                member.heard(now);
            }
        }
        self.generation.0 += 1;
        self.world_size = chosen.len() as u32;
        self.state = State::Running { members, yielding: false };
        effects.push(Effect::Formed { generation: self.generation, members: chosen });
        effects
    }

    fn dismiss(&mut self, worker: WorkerId) -> Vec<Effect> {
        self.dismissed.insert(worker);
        vec![Effect::Dismissed(worker)]
    }

    /// A broken connection is a loss at once, but for the last participant: it may come back by another. Whether that was
    /// its process or the network is told by when it was heard of last.
    fn disconnected(&mut self, now: Duration, worker: WorkerId) -> Vec<Effect> {
        if !self.is_last(worker) {
            return self.lose(now, worker, LossCause::Disconnected);
        }
        let half = self.settings.heartbeat_timeout / 2;
        if let Some(member) = self.members_mut().and_then(|members| members.get_mut(&worker))
            && now.saturating_sub(member.last_seen) < half
        {
            member.due.get_or_insert(now + RECONNECT);
        }
        Vec::new()
    }

    /// Nobody else takes part.
    fn is_last(&self, worker: WorkerId) -> bool {
        let mut participants = self.participants();
        participants.next().is_some_and(|(first, _)| first == worker) && participants.next().is_none()
    }

    /// Why a member is lost, if it was silent for too long.
    fn silence(&self, now: Duration, worker: WorkerId, member: &Member) -> Option<LossCause> {
        let silent = now.saturating_sub(member.last_seen);
        if member.done {
            return None;
        }
        if member.due.is_some_and(|due| now > due) {
            return Some(LossCause::Disconnected);
        }
        let late = silent > self.settings.heartbeat_timeout
            && (silent > self.settings.coordinator_timeout || !self.is_last(worker));
        late.then_some(LossCause::Silent { seconds: silent.as_secs() })
    }

    /// The one entrance of losing a worker.
    fn lose(&mut self, now: Duration, worker: WorkerId, cause: LossCause) -> Vec<Effect> {
        let Some(members) = self.members_mut() else { return Vec::new() };
        // one that is done may go
        if members.get(&worker).is_none_or(|member| member.done) {
            return Vec::new();
        }
        let Some(member) = members.remove(&worker) else { return Vec::new() };
        let Some(rank) = member.rank else {
            let mut effects = vec![Effect::NewcomerLost(worker, cause)];
            // whoever waited for it may have waited in vain
            effects.extend(self.form_if_complete(now));
            effects.extend(self.end_if_empty());
            return effects;
        };
        let loss = Loss { worker, rank, cause };
        let mut effects = vec![Effect::Lost(loss.clone())];
        if let State::Stopping { .. } = self.state {
            effects.extend(self.end_if_empty());
            return effects;
        }
        if self.participants().next().is_none() {
            effects.extend(if self.all_is_done() { self.end_done() } else { self.abort(now, StopCause::Lost(loss)) });
            return effects;
        }
        effects.extend(self.recover(now, RegroupCause::Lost(loss)));
        effects
    }

    fn leave(&mut self, now: Duration, worker: WorkerId, departure: Departure) -> Vec<Effect> {
        match (&self.state, departure) {
            (State::Ended(_), _) => Vec::new(),
            (State::Gathering { .. } | State::Stopping { .. }, _) => {
                self.members_mut().and_then(|members| members.remove(&worker));
                self.end_if_empty()
            }
            (_, Departure::Crashed(message)) => self.lose(now, worker, LossCause::Crashed { message }),
            (_, Departure::Done) => {
                let Some(members) = self.members_mut() else { return Vec::new() };
                match members.get_mut(&worker) {
                    Some(member) if member.rank.is_some() => member.done = true,
                    Some(_) => drop(members.remove(&worker)),
                    None => return Vec::new(),
                }
                if self.participants().next().is_none() {
                    return self.end_done();
                }
                self.form_if_complete(now)
            }
            (_, departure) => {
                let removed = self.members_mut().and_then(|members| members.remove(&worker));
                let Some(member) = removed else { return Vec::new() };
                // a newcomer that cannot begin is no loss
                let Some(rank) = member.rank else { return self.form_if_complete(now) };
                match departure {
                    Departure::Failed(message) => {
                        let cause = StopCause::Failed { worker, rank, message };
                        if self.participants().next().is_none() {
                            return self.abort(now, cause);
                        }
                        self.save_and_stop(now, cause)
                    }
                    Departure::GaveUp(why, message) => self.ask_to_stop(now, StopCause::GaveUp { why, message }),
                    _ => self.ask_to_stop(now, StopCause::Operator),
                }
            }
        }
    }

    /// Ends the generation at once, for a last one that writes a checkpoint and leaves.
    fn save_and_stop(&mut self, now: Duration, cause: StopCause) -> Vec<Effect> {
        let since = self.stop.as_ref().map_or(now, |stop| stop.since);
        self.stop = Some(Stop { cause: cause.clone(), since });
        let members = self.take_members();
        self.state = State::Regrouping { members, hard: true, since: now };
        let mut effects = vec![Effect::Stop(cause.clone()), Effect::Regrouping(RegroupCause::Stopping(cause))];
        effects.extend(self.form_if_complete(now));
        effects
    }

    /// A graceful stop; the first cause stays, but for an operator's, which is no trouble.
    fn ask_to_stop(&mut self, now: Duration, cause: StopCause) -> Vec<Effect> {
        let mut effects = Vec::new();
        match &mut self.stop {
            Some(stop) if stop.cause == StopCause::Operator && cause != StopCause::Operator => stop.cause = cause,
            Some(_) => {}
            None => {
                effects.push(Effect::Stop(cause.clone()));
                self.stop = Some(Stop { cause, since: now });
            }
        }
        if self.participants().next().is_none() {
            let outcome = self.stop.as_ref().map(|stop| Outcome::Stopped(stop.cause.clone()));
            effects.extend(outcome.map(|outcome| self.end(outcome)).unwrap_or_default());
        } else {
            effects.extend(self.form_if_complete(now));
        }
        effects
    }

    fn scale(&mut self, now: Duration, workers: u32) -> Vec<Effect> {
        self.wanted = workers.max(self.settings.min_workers).max(1);
        let participants = self.participants().count();
        if let State::Running { yielding, .. } = &mut self.state
            && participants > self.wanted as usize
        {
            *yielding = true;
        }
        self.form_if_complete(now)
    }

    /// At once before there is anything to save, else gracefully.
    fn end_or_stop(&mut self, now: Duration, cause: StopCause) -> Vec<Effect> {
        match &self.state {
            State::Gathering { .. } => self.end(Outcome::Stopped(cause)),
            State::Running { .. } | State::Regrouping { .. } => self.ask_to_stop(now, cause),
            State::Stopping { .. } | State::Ended(_) => Vec::new(),
        }
    }

    fn deadlines(&mut self, now: Duration) -> Vec<Effect> {
        let settings = self.settings;
        let late = |since: Duration, limit: Duration| now.saturating_sub(since) > limit;
        let mut effects = Vec::new();
        loop {
            let mut members = self.members().into_iter().flatten();
            let lost = members.find_map(|(&worker, member)| Some((worker, self.silence(now, worker, member)?)));
            let Some((worker, cause)) = lost else { break };
            effects.extend(self.lose(now, worker, cause));
        }
        effects.extend(match &self.state {
            State::Gathering { members } if late(Duration::ZERO, settings.join_timeout) => {
                let (joined, seconds) = (members.len() as u32, settings.join_timeout.as_secs());
                let cause = StopCause::JoinDeadline { joined, wanted: self.wanted, seconds };
                self.end(Outcome::Stopped(cause))
            }
            State::Running { .. } | State::Regrouping { .. }
                if self.stop.as_ref().is_some_and(|stop| late(stop.since, settings.stop_timeout)) =>
            {
                let outcome = self.stop.as_ref().map(|stop| Outcome::Stopped(stop.cause.clone()));
                outcome.map(|outcome| self.end(outcome)).unwrap_or_default()
            }
            State::Regrouping { members, since, .. } => {
                let stuck = members.iter().find(|(_, member)| member.takes_part() && !member.ready);
                match stuck.map(|(&worker, _)| worker) {
                    Some(worker) if late(*since, settings.stop_timeout) => {
                        let seconds = settings.stop_timeout.as_secs();
                        self.lose(now, worker, LossCause::Stuck { seconds })
                    }
                    None if late(*since, settings.join_timeout) => {
                        let joined = members.values().filter(|member| member.ready).count() as u32;
                        let (wanted, seconds) = (settings.min_workers, settings.join_timeout.as_secs());
                        self.ask_to_stop(now, StopCause::JoinDeadline { joined, wanted, seconds })
                    }
                    _ => Vec::new(),
                }
            }
            State::Stopping { since, .. } if late(*since, settings.stop_timeout) => self.end_stopped(),
            _ => Vec::new(),
        });
        effects
    }

    /// Stops at once: collectives are aborted, nothing is written.
    fn abort(&mut self, now: Duration, cause: StopCause) -> Vec<Effect> {
        let mut members = self.take_members();
        members.retain(|_, member| !member.done);
        self.state = State::Stopping { members, cause: cause.clone(), since: now };
        let mut effects = vec![Effect::Stop(cause)];
        effects.extend(self.end_if_empty());
        effects
    }

    /// All that was to do is done; that one of the ranks has given up all the same (its checkpoint could not be written) is
    /// how the job ends, whoever said what first.
    fn end_done(&mut self) -> Vec<Effect> {
        let gave_up = self.stop.as_ref().filter(|stop| matches!(stop.cause, StopCause::GaveUp { .. }));
        let outcome = gave_up.map_or(Outcome::Finished, |stop| Outcome::Stopped(stop.cause.clone()));
        self.end(outcome)
    }

    fn end_if_empty(&mut self) -> Vec<Effect> {
        // only a job that stops ends by being empty
        if self.members().is_some_and(Members::is_empty) { self.end_stopped() } else { Vec::new() }
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
