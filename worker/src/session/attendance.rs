//! Being there: heartbeats, and the open call by which they go and orders come at once.
//!
//! Input: an admission. Output: the newest order, and what it means to the running generation ([`Signals`]). Invariants: a
//! worker is alive as long as it says so; a call that breaks is opened again as long as there is patience, and while there
//! is none each heartbeat is a call of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use learn_domain::WorkerId;
use learn_domain::report::exit;
use learn_proto::convert::Order;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::signals::Signals;
use crate::control::{Beats, Control, ControlError, Heartbeat, Progress};

/// What is heard from the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Order(Order),
    /// It does not know this worker (any more).
    Unknown,
    /// It has not been heard of for too long.
    Nothing(String),
}

/// One admission's attendance; ends when it is dropped.
pub struct Attendance {
    pub worker: WorkerId,
    pub heard: watch::Receiver<Heard>,
    tasks: [JoinHandle<()>; 2],
}

/// The open call as heartbeats see it.
#[derive(Clone, Debug, Default)]
struct Call {
    /// None while the call is not open.
    beats: Option<Beats>,
    /// Orders that have come by it.
    orders: u64,
}

/// What an attendance works with.
#[derive(Clone)]
pub struct Parts {
    pub control: Control,
    pub worker: WorkerId,
    pub interval: Duration,
    pub timeout: Duration,
    /// A training thread may take this long to leave a generation that has ended.
    pub grace: Duration,
    pub progress: Arc<Progress>,
    pub signals: Arc<Signals>,
}

impl Attendance {
    #[must_use]
    pub fn begin(handle: &Handle, parts: Parts) -> Self {
        let (sender, heard) = watch::channel(Heard::Order(Order::Wait));
        let sender = Arc::new(sender);
        let (worker, call) = (parts.worker, Arc::new(watch::Sender::new(Call::default())));
        let beating = handle.spawn(parts.clone().beat(Arc::clone(&sender), call.subscribe()));
        let tasks = [beating, handle.spawn(parts.listen(sender, call))];
        Self { worker, heard, tasks }
    }
}

impl Attendance {
    /// Nothing more is said or heard.
    pub fn end(&self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.end();
    }
}

impl Parts {
    fn hear(&self, sender: &watch::Sender<Heard>, heard: Heard) {
        match &heard {
            Heard::Order(order) => self.signals.obey(order),
            Heard::Unknown => self.signals.forgotten(),
            Heard::Nothing(cause) => self.signals.obey(&Order::Stop { cause: cause.clone() }),
        }
        sender.send_if_modified(|known| {
            // an answer that was overtaken by a push does not bring an ended generation back
            let stale = match (&heard, &*known) {
                (
                    Heard::Order(Order::Run { generation: old, .. }),
                    Heard::Order(Order::Run { generation: new, .. }),
                ) => old < new,
                _ => false,
            };
            let changed = !stale && *known != heard;
            if changed {
                *known = heard;
            }
            changed
        });
    }

    fn heartbeat(&self) -> Heartbeat {
        Heartbeat::of(self.worker, &self.progress)
    }

    /// Says a heartbeat and waits for the answer, which whoever listens to the open call hears.
    async fn say(&self, sender: &watch::Sender<Heard>, call: &mut watch::Receiver<Call>) -> Result<(), ControlError> {
        let Call { beats, orders } = call.borrow_and_update().clone();
        if let Some(beats) = beats
            && beats.say(self.heartbeat()).await
            && call
                .wait_for(|call| call.orders > orders || call.beats.is_none())
                .await
                .is_ok_and(|call| call.orders > orders)
        {
            return Ok(());
        }
        let order = self.control.heartbeat(self.heartbeat()).await?;
        self.hear(sender, Heard::Order(order));
        Ok(())
    }

    async fn beat(self, sender: Arc<watch::Sender<Heard>>, mut call: watch::Receiver<Call>) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut last_answer, mut failing) = (Instant::now(), false);
        loop {
            ticks.tick().await;
            if self.signals.overdue(self.grace) {
                tracing::error!(
                    phase = self.progress.phase().as_str(),
                    grace = ?self.grace,
                    "stuck in a generation that has ended (cluster.stop_timeout); ending, so that another can take the place"
                );
                std::process::exit(exit::FAILED);
            }
            let answer = tokio::time::timeout(self.timeout, self.say(&sender, &mut call)).await;
            match answer.unwrap_or(Err(ControlError::Silent)) {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!(after = ?last_answer.elapsed(), "the coordinator answers again");
                    }
                    last_answer = Instant::now();
                }
                Err(ControlError::Unknown { .. }) => {
                    last_answer = Instant::now();
                    self.hear(&sender, Heard::Unknown);
                }
                Err(error) if last_answer.elapsed() > self.control.patience().limit() => {
                    let cause = format!("the coordinator has not answered for {:?}: {error}", last_answer.elapsed());
                    self.hear(&sender, Heard::Nothing(cause));
                }
                Err(error) if failing => tracing::debug!(%error, "heartbeat failed again"),
                Err(error) => {
                    failing = true;
                    tracing::warn!(%error, patience = ?self.control.patience().limit(), "heartbeat failed");
                }
            }
        }
    }

    async fn listen(self, sender: Arc<watch::Sender<Heard>>, call: Arc<watch::Sender<Call>>) {
        // heartbeats are what is patient
        let trying = || self.control.patience().trying("attend");
        let mut pauses = trying();
        loop {
            match self.control.attend(self.heartbeat()).await {
                Ok((beats, mut orders)) => {
                    call.send_modify(|call| call.beats = Some(beats));
                    loop {
                        match orders.next().await {
                            Ok(Some(order)) => {
                                pauses = trying();
                                self.hear(&sender, Heard::Order(order));
                                call.send_modify(|call| call.orders += 1);
                            }
                            Err(ControlError::Unknown { .. }) => {
                                self.hear(&sender, Heard::Unknown);
                                break;
                            }
                            Ok(None) | Err(_) => break,
                        }
                    }
                    call.send_modify(|call| call.beats = None);
                }
                Err(error) => tracing::debug!(%error, "the open call could not be made"),
            }
            pauses.pause().await;
        }
    }
}
