//! Processes come and go, and what befalls them.
//!
//! Input: the history's weather. Output: kills, pauses, broken connections and collectives, storms, other sizes, stops; and
//! the launcher, which replaces what has died.

use learn_coordinator::job::Asked;
use learn_domain::WorkerId;

use crate::process::Process;
use crate::world::{Happens, World};

impl World {
    pub fn launch(&mut self) {
        let alive = self.processes.iter().filter(|process| process.alive).count();
        if self.outcome.is_none() && !self.done && self.restarts < 60 {
            for _ in alive..self.job.wanted() as usize {
                self.restarts += 1;
                self.processes.push(Process::new());
                let (p, start) = (self.processes.len() - 1, self.draws.below(300) + 10);
                self.after(start, Happens::Enter(p));
            }
        }
        self.after(500, Happens::Launch);
    }

    pub fn end_process(&mut self, p: usize) {
        self.gone(p, true);
    }

    pub fn gone(&mut self, p: usize, heard: bool) {
        let process = &mut self.processes[p];
        process.alive = false;
        process.token += 1;
        process.deferred.clear();
        let (worker, place) = (process.worker, process.place.take());
        if let Some(place) = place {
            let delay = self.draws.below(30) + 1;
            self.after(delay, Happens::Breaks(place.generation));
        }
        if heard {
            self.disconnect(worker);
        } else {
            // nobody pushes to it, and nobody has closed its connection
            worker.map(|worker| self.attendances.remove(&worker));
        }
    }

    pub fn disconnect(&mut self, worker: Option<WorkerId>) {
        let delay = self.delay();
        if let Some((&worker, attendance)) = worker.and_then(|worker| self.attendances.get_key_value(&worker)) {
            let number = attendance.number;
            self.after(delay, Happens::Disconnected(worker, number));
        }
    }

    pub fn wake(&mut self, p: usize) {
        if !std::mem::replace(&mut self.processes[p].paused, false) {
            return;
        }
        self.fired.woken += 1;
        for happens in std::mem::take(&mut self.processes[p].deferred) {
            self.after(0, happens);
        }
    }

    pub fn fault(&mut self) {
        if self.outcome.is_some() || self.now > self.weather.until {
            (self.weather.loss, self.weather.delay) = (0, 10);
            return;
        }
        let next = self.draws.below(2 * self.weather.between) + 20;
        self.after(next, Happens::Fault);
        let alive: Vec<usize> =
            (0..self.processes.len()).filter(|&p| self.processes[p].alive && !self.processes[p].paused).collect();
        let Some(&p) = alive.get(self.draws.below(alive.len() as u64) as usize) else { return };
        let inside = u64::from(self.takes_part(p));
        match self.draws.below(24) {
            0..=3 => {
                self.fired.kills += inside;
                self.gone(p, true);
            }
            4 => {
                self.fired.silent_kills += inside;
                self.gone(p, false);
            }
            5..=8 => {
                self.fired.pauses += inside;
                self.processes[p].paused = true;
                let time = self.draws.below(15_000) + 200;
                self.after(time, Happens::Wake(p));
            }
            9..=10 => {
                self.fired.disconnects += inside;
                let worker = self.processes[p].worker;
                self.disconnect(worker);
                if let Some(worker) = worker {
                    self.after(200, Happens::Attend(p, worker));
                }
            }
            11..=13 => {
                if let Some(place) = self.processes[p].place {
                    self.fired.breaks += 1;
                    self.break_group(place.generation, true);
                }
            }
            14..=15 => {
                self.fired.crashes += inside;
                self.crash(p);
            }
            16..=17 => {
                self.fired.storms += 1;
                (self.weather.loss, self.weather.delay) = (self.draws.below(500), self.draws.below(2_500) + 1);
                let calm = self.draws.below(3_000);
                self.after(calm, Happens::CalmsDown);
            }
            18..=22 => {
                let workers = self.draws.below(7) as u32 + 1;
                self.fired.ups += u64::from(workers > self.job.wanted());
                self.fired.downs += u64::from(workers < self.job.wanted());
                let effects = self.job.scale(self.time(), workers).expect("nothing limits the workers");
                self.carry_out(effects);
                self.tell();
            }
            _ if self.weather.operator_stop => {
                if self.draws.below(2) == 0 {
                    self.fired.signals += inside;
                    self.processes[p].stopped_here = true;
                } else {
                    self.fired.operator_stops += 1;
                    let effects = self.job.stop(self.time(), Asked::ByCall);
                    self.carry_out(effects);
                    self.tell();
                }
            }
            _ => {}
        }
    }
}
