//! Which rows a worker's cache should keep: `cargo run --release -p learn-worker --example cache_policies -- [USERS]`.
//!
//! A simulation without rows: each of a million interactions draws an item by a Zipf-like law; each epoch has every user once,
//! in random order, in steps of so many USERS (64); a step asks for its distinct items. The cache holds 10 % of the
//! catalogue. Printed for each policy: requests that miss, and bytes received (f16) over those of the published layout, which
//! sends every position as f32. The first epoch fills the cache, the second one counts. `occurrences` and `worker` are
//! `worker/src/feed/residents.rs`, without and with the steps that are announced ahead.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

use learn_domain::random::Draws;
use learn_worker::feed::residents::Residents;
use lru::LruCache;

/// Interactions of a user.
const LENGTH: u64 = 17;
const USERS: u64 = 60_000;

/// Announced items, in parts of those that the cache holds, as a worker does.
const AHEAD: usize = 8;

/// Decides what stays.
trait Policy {
    /// A step that is coming.
    fn announce(&mut self, _items: &[u32]) {}

    /// An item of a step; true = it was here.
    fn request(&mut self, item: u32) -> bool;

    /// The next step; how many of its items were not here.
    fn step(&mut self, items: &[u32]) -> usize {
        items.iter().filter(|&&item| !self.request(item)).count()
    }
}

struct Lru(LruCache<u32, ()>);

impl Policy for Lru {
    fn request(&mut self, item: u32) -> bool {
        let hit = self.0.get(&item).is_some();
        if !hit {
            self.0.push(item, ());
        }
        hit
    }
}

/// S3-FIFO: newcomers in a small queue; those that were asked for again, or come back soon, in the main one.
struct S3Fifo {
    capacity: usize,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    /// Those that left the small queue unused.
    ghost: LruCache<u32, ()>,
    /// Requests since it came, at most 3.
    uses: HashMap<u32, u8>,
}

impl S3Fifo {
    fn new(capacity: usize) -> Self {
        let ghost = LruCache::new(capacity.try_into().expect("a cache holds something"));
        Self { capacity, small: VecDeque::new(), main: VecDeque::new(), ghost, uses: HashMap::new() }
    }

    fn make_room(&mut self) {
        while self.small.len() + self.main.len() >= self.capacity {
            if self.small.len() > self.capacity / 10
                && let Some(item) = self.small.pop_front()
            {
                if self.uses[&item] > 0 {
                    self.main.push_back(item);
                } else {
                    self.uses.remove(&item);
                    self.ghost.push(item, ());
                }
            } else if let Some(item) = self.main.pop_front() {
                match self.uses[&item] {
                    0 => {
                        self.uses.remove(&item);
                    }
                    uses => {
                        self.uses.insert(item, uses - 1);
                        self.main.push_back(item);
                    }
                }
            }
        }
    }
}

impl Policy for S3Fifo {
    fn request(&mut self, item: u32) -> bool {
        if let Some(uses) = self.uses.get_mut(&item) {
            *uses = (*uses + 1).min(3);
            return true;
        }
        let known = self.ghost.pop(&item).is_some();
        self.make_room();
        self.uses.insert(item, 0);
        if known {
            self.main.push_back(item)
        } else {
            self.small.push_back(item)
        }
        false
    }
}

/// W-TinyLFU: 1 % of it a window in order of use; who leaves that stays if a sketch of counts says more of it than of the one
/// that would go.
struct TinyLfu {
    window: LruCache<u32, ()>,
    main: LruCache<u32, ()>,
    main_capacity: usize,
    counts: Vec<[u8; 4]>,
    added: usize,
}

impl TinyLfu {
    fn new(capacity: usize) -> Self {
        let window = (capacity / 100).max(1);
        let unbounded = LruCache::unbounded();
        let window_cache = LruCache::new(window.try_into().expect("a window holds something"));
        let counts = vec![[0; 4]; capacity.next_power_of_two() * 4];
        Self { window: window_cache, main: unbounded, main_capacity: capacity - window, counts, added: 0 }
    }

    fn places(&self, item: u32) -> [usize; 4] {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        [0, 1, 2, 3].map(|row| hasher.hash_one((item, row)) as usize & (self.counts.len() - 1))
    }

    fn count(&mut self, item: u32) {
        for (row, place) in self.places(item).into_iter().enumerate() {
            self.counts[place][row] = (self.counts[place][row] + 1).min(15);
        }
        self.added += 1;
        // ten times as many requests as it holds: older ones count half
        if self.added >= 10 * self.main_capacity {
            self.counts.iter_mut().flatten().for_each(|count| *count /= 2);
            self.added = 0;
        }
    }

    fn estimate(&self, item: u32) -> u8 {
        let counts = self.places(item).into_iter().enumerate().map(|(row, place)| self.counts[place][row]);
        counts.min().unwrap_or_default()
    }
}

impl Policy for TinyLfu {
    fn request(&mut self, item: u32) -> bool {
        self.count(item);
        if self.window.get(&item).is_some() || self.main.get(&item).is_some() {
            return true;
        }
        if let Some((candidate, ())) = self.window.push(item, ()) {
            if self.main.len() < self.main_capacity {
                self.main.push(candidate, ());
            } else if let Some((&victim, ())) = self.main.peek_lru()
                && self.estimate(candidate) > self.estimate(victim)
            {
                self.main.pop_lru();
                self.main.push(candidate, ());
            }
        }
        false
    }
}

/// What the worker's caches do.
struct Worker {
    residents: Residents,
    looks_ahead: bool,
}

impl Policy for Worker {
    fn announce(&mut self, items: &[u32]) {
        if self.looks_ahead {
            self.residents.announce(items);
        }
    }

    fn request(&mut self, item: u32) -> bool {
        let is_here = self.residents.slot(item).is_some();
        if !is_here {
            self.residents.admit(item);
        }
        is_here
    }

    /// What is here is taken before anything makes room.
    fn step(&mut self, items: &[u32]) -> usize {
        self.residents.begin(items);
        let missing: Vec<u32> = items.iter().copied().filter(|&item| self.residents.slot(item).is_none()).collect();
        missing.iter().filter(|&&item| !self.request(item)).count()
    }
}

/// Requests that miss from the step `counted` on.
fn misses(policy: &mut dyn Policy, steps: &[Vec<u32>], counted: usize, capacity: usize) -> usize {
    let (mut announced, mut ahead, mut misses) = (0, 0, 0);
    for (number, step) in steps.iter().enumerate() {
        while announced < steps.len() && (announced <= number || ahead < AHEAD * capacity) {
            policy.announce(&steps[announced]);
            ahead += steps[announced].len();
            announced += 1;
        }
        ahead -= step.len();
        let missed = policy.step(step);
        misses += if number < counted { 0 } else { missed };
    }
    misses
}

/// Items of each user.
fn sequences(items: usize, skew: f64) -> Vec<Vec<u32>> {
    let mut sum = 0.0;
    let sums: Vec<f64> = (1..=items)
        .map(|rank| {
            sum += (rank as f64).powf(-skew);
            sum
        })
        .collect();
    let mut draws = Draws::new(&[7]);
    let mut item = || {
        let place = draws.unit() * sum;
        sums.partition_point(|&reached| reached < place).min(items - 1) as u32
    };
    (0..USERS).map(|_| (0..LENGTH).map(|_| item()).collect()).collect()
}

/// Distinct items of each step of an epoch.
fn steps(sequences: &[Vec<u32>], epoch: u64, users: usize) -> Vec<Vec<u32>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    let mut draws = Draws::new(&[epoch]);
    order.sort_by_cached_key(|_| draws.next_u64());
    let distinct = |step: &[usize]| {
        let mut items: Vec<u32> = step.iter().flat_map(|&user| sequences[user].iter().copied()).collect();
        items.sort_unstable();
        items.dedup();
        items
    };
    order.chunks(users).map(distinct).collect()
}

fn main() {
    let users = std::env::args().nth(1).map_or(Ok(64), |users| users.parse()).expect("USERS is a number");
    println!("{users} users a step, cache of 10 % of the catalogue\n");
    println!("| items | skew | policy | misses | bytes over the published layout |\n|---|---|---|---|---|");
    for (items, skew) in [(10_000, 1.0), (100_000, 1.0), (100_000, 0.8), (100_000, 1.2)] {
        let sequences = sequences(items, skew);
        let mut counts = vec![0; items];
        sequences.iter().flatten().for_each(|&item| counts[item as usize] += 1);
        // the catalogue has the items that somebody took
        let capacity = counts.iter().filter(|&&count| count > 0).count() / 10;
        let popularity: Arc<[u32]> = counts.into();
        let worker = |looks_ahead| Worker { residents: Residents::new(capacity, Arc::clone(&popularity)), looks_ahead };
        let policies: [(&str, Box<dyn Policy>); 5] = [
            ("LRU", Box::new(Lru(LruCache::new(capacity.try_into().expect("a cache holds something"))))),
            ("S3-FIFO", Box::new(S3Fifo::new(capacity))),
            ("W-TinyLFU", Box::new(TinyLfu::new(capacity))),
            ("occurrences", Box::new(worker(false))),
            ("worker", Box::new(worker(true))),
        ];
        let mut all = steps(&sequences, 0, users);
        let counted = all.len();
        all.extend(steps(&sequences, 1, users));
        let requests: usize = all[counted..].iter().map(Vec::len).sum();
        for (name, mut policy) in policies {
            let misses = misses(policy.as_mut(), &all, counted, capacity);
            let share = 2.0 * misses as f64 / (4 * USERS * LENGTH) as f64;
            let missed = misses as f64 / requests as f64;
            println!("| {items} | {skew} | {name} | {:.1} % | {:.1} % |", 100.0 * missed, 100.0 * share);
        }
    }
}
