//! Who serves the job's data: the coordinator itself, and the data servers that have offered themselves.
//!
//! Input: offers, their ends, the time. Output: locations in the order of preference. Invariants: the coordinator is
//! always there, and last, so that its load is the least and nobody is ever without a location; a server is named as long
//! as its offer stands. Nothing here is kept over a restart: offers come again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use learn_domain::report::DataServerStatus;
use learn_proto::convert::OfferedServer;
use learn_proto::flight::in_turn;

/// The live data servers of one job; clones share them.
#[derive(Clone, Debug)]
pub struct Directory {
    /// `http://HOST:PORT` of the coordinator's own service.
    coordinator: Arc<str>,
    /// A server that was silent for this long is gone.
    timeout: Duration,
    servers: Arc<Mutex<Servers>>,
}

#[derive(Debug, Default)]
struct Servers {
    by_location: BTreeMap<String, Listed>,
    offers: u64,
}

#[derive(Debug)]
struct Listed {
    server: OfferedServer,
    heard: Instant,
    /// Number of the offer that stands.
    offer: u64,
}

/// A standing offer. Dropping it before [`Offer::renewed`] ends it: the call it came by has broken.
#[derive(Debug)]
pub struct Offer {
    directory: Directory,
    location: String,
    number: u64,
    renewed: bool,
}

impl Directory {
    #[must_use]
    pub fn new(coordinator: &str, timeout: Duration) -> Self {
        Self { coordinator: coordinator.into(), timeout, servers: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Servers> {
        // nothing in here leaves it half done
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names `server` from now on.
    #[must_use]
    pub fn offer(&self, server: OfferedServer, now: Instant) -> Offer {
        let location = server.location.clone();
        let mut servers = self.lock();
        servers.offers += 1;
        let number = servers.offers;
        let listed = Listed { server, heard: now, offer: number };
        if servers.by_location.insert(location.clone(), listed).is_none() {
            tracing::info!(location, "a data server has come");
        }
        drop(servers);
        Offer { directory: self.clone(), location, number, renewed: false }
    }

    /// What another directory says: a data server names those that the coordinator has told it.
    pub fn replace(&self, locations: Vec<String>, now: Instant) {
        let server = |location: String| OfferedServer {
            location,
            metrics_url: String::new(),
            host: String::new(),
            pid: 0,
            config_json: String::new(),
        };
        let others = locations.into_iter().filter(|location| **location != *self.coordinator);
        let listed =
            others.map(|location| (location.clone(), Listed { server: server(location), heard: now, offer: 0 }));
        self.lock().by_location = listed.collect();
    }

    /// Where the `number`-th client looks for data, in order.
    #[must_use]
    pub fn locations(&self, number: usize, now: Instant) -> Vec<String> {
        let mut locations = self.live(now, |listed| listed.server.location.clone());
        locations.push(self.coordinator.to_string());
        in_turn(locations, number)
    }

    /// Those that are live, for people.
    #[must_use]
    pub fn servers(&self, now: Instant) -> Vec<DataServerStatus> {
        self.live(now, |listed| DataServerStatus {
            location: listed.server.location.clone(),
            metrics_url: listed.server.metrics_url.clone(),
            host: listed.server.host.clone(),
            pid: listed.server.pid,
        })
    }

    fn live<T>(&self, now: Instant, show: impl Fn(&Listed) -> T) -> Vec<T> {
        let mut servers = self.lock();
        servers.by_location.retain(|location, listed| {
            let live = now.saturating_duration_since(listed.heard) <= self.timeout;
            if !live {
                tracing::warn!(location, timeout = ?self.timeout, "a data server was silent for too long");
            }
            live
        });
        servers.by_location.values().map(show).collect()
    }
}

impl Offer {
    /// It was answered, and stands until its server comes again or is silent for too long.
    pub fn renewed(mut self, now: Instant) {
        self.renewed = true;
        let mut servers = self.directory.lock();
        if let Some(listed) = servers.by_location.get_mut(&self.location).filter(|listed| listed.offer == self.number) {
            listed.heard = now;
        }
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        if self.renewed {
            return;
        }
        let mut servers = self.directory.lock();
        if servers.by_location.get(&self.location).is_some_and(|listed| listed.offer == self.number) {
            servers.by_location.remove(&self.location);
            tracing::warn!(location = self.location, "a data server has gone");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(name: &str) -> OfferedServer {
        OfferedServer {
            location: name.into(),
            metrics_url: String::new(),
            host: "h".into(),
            pid: 1,
            config_json: String::new(),
        }
    }

    #[test]
    fn clients_start_with_different_servers_and_end_with_the_coordinator() {
        let (directory, now) = (Directory::new("c", Duration::from_secs(5)), Instant::now());
        assert_eq!(directory.locations(3, now), ["c"]);
        for name in ["a", "b", "z"] {
            directory.offer(server(name), now).renewed(now);
        }
        assert_eq!(directory.locations(0, now), ["a", "b", "z", "c"]);
        assert_eq!(directory.locations(1, now), ["b", "z", "a", "c"]);
        assert_eq!(directory.locations(5, now), ["z", "a", "b", "c"]);
    }

    #[test]
    fn an_offer_ends_with_its_call_or_by_silence() {
        let (directory, now) = (Directory::new("c", Duration::from_secs(5)), Instant::now());
        let first = directory.offer(server("a"), now);
        assert_eq!(directory.locations(0, now), ["a", "c"]);
        drop(first);
        assert_eq!(directory.locations(0, now), ["c"], "its call has broken");

        let broken = directory.offer(server("a"), now);
        directory.offer(server("a"), now).renewed(now);
        drop(broken);
        assert_eq!(directory.locations(0, now), ["a", "c"], "the end of an older call says nothing");
        let later = now + Duration::from_secs(5);
        directory.offer(server("b"), later).renewed(later);
        assert_eq!(directory.locations(0, later), ["a", "b", "c"]);
        assert_eq!(directory.locations(0, later + Duration::from_millis(1)), ["b", "c"]);
        assert_eq!(directory.servers(later).len(), 1);
    }

    #[test]
    fn what_another_directory_says_replaces_what_was_known() {
        let (directory, now) = (Directory::new("c", Duration::from_secs(5)), Instant::now());
        directory.replace(vec!["a".into(), "b".into(), "c".into()], now);
        directory.replace(vec!["b".into(), "c".into()], now);
        assert_eq!(directory.locations(0, now), ["b", "c"]);
    }
}
