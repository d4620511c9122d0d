//! Filters and splits against a plain implementation that holds everything in memory.

use std::collections::{BTreeMap, BTreeSet};

use learn_dataset::{KeepOut, Layout, PrepareError, PrepareOptions};
use learn_domain::config::{PrepareConfig, SplitPolicy};
use learn_domain::report::Split;
use proptest::prelude::*;

use crate::builders::{Fixture, Row, UserView, csv, grid, row, view};

/// Repeats, k-core and lengths, by the words of the configuration.
fn filtered(rows: &[Row], config: &PrepareConfig) -> BTreeMap<String, Vec<(String, i64)>> {
    let mut kept: Vec<Row> = Vec::new();
    for row in rows {
        if !kept.contains(row) {
            kept.push(row.clone());
        }
    }
    loop {
        let count = |name: fn(&Row) -> &String, of: &Row| kept.iter().filter(|row| name(row) == name(of)).count();
        let enough = |row: &&Row| {
            count(|row| &row.0, row) >= config.k_core as usize && count(|row| &row.1, row) >= config.k_core as usize
        };
        let next: Vec<Row> = kept.iter().filter(enough).cloned().collect();
        if next.len() == kept.len() {
            break;
        }
        kept = next;
    }
    kept.sort_by_key(|row| row.2);
    let mut users = BTreeMap::<String, Vec<(String, i64)>>::new();
    for (user, item, time) in kept {
        users.entry(user).or_default().push((item, time));
    }
    users.retain(|_, items| items.len() >= config.min_length as usize);
    for items in users.values_mut() {
        let cut = if config.max_length == 0 { 0 } else { items.len().saturating_sub(config.max_length as usize) };
        items.drain(..cut);
    }
    users
}

fn divided(users: BTreeMap<String, Vec<(String, i64)>>, config: &PrepareConfig) -> Vec<UserView> {
    let mut times: Vec<i64> = users.values().flatten().map(|&(_, time)| time).collect();
    times.sort_unstable();
    let threshold = |share: f64| {
        let place = (times.len() as f64 * (1.0 - share)).ceil() as usize;
        times.get(place.min(times.len().saturating_sub(1))).copied().unwrap_or(0)
    };
    let (valid_from, test_from) = (threshold(config.valid_share + config.test_share), threshold(config.test_share));
    let view = |(id, items): (String, Vec<(String, i64)>)| {
        let n = items.len();
        let (valid, test) = match config.split {
            SplitPolicy::LeaveOneOut => (n - 2, n - 1),
            SplitPolicy::ByTime => {
                let before = |from: i64| items.iter().filter(|(_, time)| *time < from).count();
                (before(valid_from), before(test_from))
            }
        };
        let ids = |range: std::ops::Range<usize>| items[range].iter().map(|(item, _)| item.clone()).collect();
        let part = |start: usize, end: usize| (start > 0 && end > start).then(|| (ids(0..start), ids(start..end)));
        let train = if valid >= 2 { items[..valid].to_vec() } else { Vec::new() };
        UserView { id, train, valid: part(valid, test), test: part(test, n) }
    };
    users.into_iter().map(view).collect()
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    proptest::collection::vec((0_u32..12, 0_u32..10, 0_i64..40), 0..160)
        .prop_map(|rows| rows.into_iter().map(|(u, i, t)| row(format!("u{u}"), format!("i{i}"), t)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_dataset_is_what_the_rules_say(
        rows in rows(), k_core in 0_u32..5, min_length in 1_u32..6, more in 0_u32..6, limited: bool, by_time: bool,
        batch_rows in 1_usize..9,
    ) {
        let mut fixture = Fixture::with_rows(&rows);
        let min_length = if by_time { min_length } else { min_length.max(3) };
        let config = &mut fixture.config;
        config.k_core = k_core;
        config.min_length = min_length;
        config.max_length = if limited { min_length + more } else { 0 };
        config.split = if by_time { SplitPolicy::ByTime } else { SplitPolicy::LeaveOneOut };
        config.valid_share = 0.2;
        config.test_share = 0.15;
        fixture.options.layout = Layout { batch_rows, batch_items: 20, file_batches: 2, file_rows: 5, partition_rows: 8 };
        let expected = divided(filtered(&rows, &fixture.config), &fixture.config);
        let complete = expected.iter().any(|user| !user.train.is_empty())
            && expected.iter().any(|user| user.valid.is_some())
            && expected.iter().any(|user| user.test.is_some());
        if !complete {
            let error = fixture.try_prepare().unwrap_err();
            prop_assert!(matches!(error, PrepareError::Empty { .. }), "{}", error);
            return Ok(());
        }
        let (report, dataset) = fixture.prepare();
        prop_assert_eq!(view(&dataset), &expected[..]);
        let counts = &report.manifest.counts;
        prop_assert_eq!(counts.users as usize, expected.len());
        let popularity = dataset.popularity();
        prop_assert_eq!(popularity.iter().sum::<u64>(), counts.train_interactions);
        prop_assert_eq!(counts.train_interactions as usize, expected.iter().map(|user| user.train.len()).sum::<usize>());
        let facts = dataset.facts();
        prop_assert_eq!(facts.train_users as usize, dataset.train().len());
        prop_assert_eq!(facts.test_users as usize, dataset.held_out(Split::Test).len());
    }
}

#[test]
fn items_that_k_core_removed_leave_and_unseen_ones_stay_if_wanted() {
    let mut rows = grid(6, 5, 5);
    rows.push(row("u0", "rare", 9));
    let catalogue = "item_id,title\ni0,A\ni1,B\ni2,C\ni3,D\ni4,E\nrare,F\nunseen,G\n";
    let items = |k_core, keep_unseen_items| {
        let mut fixture = Fixture::with_rows(&rows);
        fixture.items("items.csv", catalogue);
        fixture.config.k_core = k_core;
        fixture.config.keep_unseen_items = keep_unseen_items;
        let items = fixture.prepare().1.items().unwrap();
        items.into_iter().map(|item| item.id).collect::<BTreeSet<String>>()
    };
    let seen = BTreeSet::from(["i0", "i1", "i2", "i3", "i4"].map(String::from));
    let with =
        |more: &[&str]| seen.iter().cloned().chain(more.iter().map(ToString::to_string)).collect::<BTreeSet<_>>();
    assert_eq!(items(0, true), with(&["rare", "unseen"]));
    assert_eq!(items(0, false), with(&["rare"]));
    assert_eq!(items(2, true), with(&["unseen"]));
    assert_eq!(items(2, false), seen);
}

#[test]
fn the_order_is_that_of_ids_and_of_hashes_whatever_the_order_of_the_input() {
    let rows = grid(50, 5, 30);
    let mut reversed = rows.clone();
    reversed.sort_by(|a, b| (&b.0, a.2).cmp(&(&a.0, b.2)));
    let (a, b) = (Fixture::with_rows(&rows), Fixture::with_rows(&reversed));
    let ((a, first), (b, second)) = (a.prepare(), b.prepare());
    assert_eq!(a.manifest, b.manifest, "files and fingerprint, byte for byte");
    assert_eq!(first.user_ids().unwrap(), second.user_ids().unwrap());
    let items = first.items().unwrap();
    assert!(items.is_sorted_by(|a, b| a.id < b.id));
}

#[test]
fn the_fingerprint_follows_the_content_and_nothing_else() {
    let rows = grid(20, 6, 12);
    let fingerprint = |rows: &[Row], change: fn(&mut Fixture)| {
        let mut fixture = Fixture::with_rows(rows);
        change(&mut fixture);
        fixture.prepare().0.manifest.fingerprint
    };
    let base = fingerprint(&rows, |_| ());
    let same: [fn(&mut Fixture); 3] = [
        |fixture| {
            fixture.options.layout =
                Layout { batch_rows: 3, batch_items: 50, file_batches: 1, file_rows: 4, partition_rows: 5 }
        },
        |fixture| fixture.config.max_length = 60,
        |fixture| fixture.config.k_core = 2,
    ];
    for change in same {
        assert_eq!(fingerprint(&rows, change), base);
    }
    let mut repeated = rows.clone();
    repeated.extend_from_slice(&rows[..5]);
    assert_eq!(fingerprint(&repeated, |_| ()), base, "exact repeats are no content");

    let mut other_time = rows.clone();
    other_time[5].2 += 1;
    let mut other_item = rows.clone();
    other_item[5].1 = "i0".into();
    let mut other_user = rows.clone();
    other_user.iter_mut().filter(|row| row.0 == "u3").for_each(|row| row.0 = "x".into());
    let mut seen = BTreeSet::from([base]);
    for rows in [&other_time, &other_item, &other_user] {
        assert!(seen.insert(fingerprint(rows, |_| ())));
    }
    let different: [fn(&mut Fixture); 4] = [
        |fixture| fixture.config.max_length = 5,
        |fixture| fixture.config.split = SplitPolicy::ByTime,
        |fixture| {
            fixture
                .items("items.csv", (0..12).fold("item_id,title\n".into(), |all: String, i| all + &format!("i{i},T\n")))
        },
        |fixture| {
            fixture
                .items("items.csv", (0..12).fold("item_id,brand\n".into(), |all: String, i| all + &format!("i{i},T\n")))
        },
    ];
    for change in different {
        assert!(seen.insert(fingerprint(&rows, change)));
    }
}

#[test]
fn times_of_equal_value_keep_the_order_of_the_input() {
    let rows: Vec<Row> =
        ["c", "a", "d", "b", "a"].into_iter().flat_map(|item| [row("u", item, 5), row("v", item, 5)]).collect();
    let fixture = Fixture::with_rows(&rows);
    let (_, dataset) = fixture.prepare();
    let users = view(&dataset);
    let train: Vec<&str> = users[0].train.iter().map(|(item, _)| item.as_str()).collect();
    assert_eq!(train, ["c", "a"], "the second a is an exact repeat");
    assert_eq!(users[0].test.as_ref().unwrap().1, ["b"]);
}

#[test]
fn a_fraction_brings_all_times_to_millionths() {
    let mut fixture = Fixture::new();
    fixture.interactions("a.csv", "user_id,item_id,timestamp\nu,a,3\nu,b,1.5\nu,c,1.25\nu,d,9\nu,e,10\n");
    let (report, dataset) = fixture.prepare();
    assert_eq!(report.manifest.time_scale, 1_000_000);
    assert_eq!(dataset.train().times(0), [1_250_000, 1_500_000, 3_000_000]);
    let names: Vec<String> = view(&dataset)[0].train.iter().map(|(item, _)| item.clone()).collect();
    assert_eq!(names, ["c", "b", "a"]);
}

#[test]
fn the_same_dataset_is_kept_and_another_one_needs_replace() {
    let mut fixture = Fixture::with_rows(&grid(8, 5, 6));
    let (first, _) = fixture.prepare();
    assert!(!first.kept);
    let (second, _) = fixture.prepare();
    assert!(second.kept);
    assert_eq!(second.manifest, first.manifest);

    fixture.write("interactions.csv", csv(&grid(9, 5, 6)));
    let error = fixture.try_prepare().unwrap_err().to_string();
    assert!(error.contains("--replace") && error.contains(&first.manifest.fingerprint), "{error}");
    assert_eq!(view(&learn_dataset::Dataset::open(&fixture.out()).unwrap()).len(), 8, "what was there is untouched");

    fixture.options = PrepareOptions { replace: true, ..PrepareOptions::default() };
    let (third, dataset) = fixture.prepare();
    assert!(!third.kept);
    assert_eq!(view(&dataset).len(), 9);
    assert_eq!(crate::builders::temporary(fixture.dir.path()).len(), 0);
}

#[test]
fn a_dataset_that_jobs_work_with_is_not_replaced() {
    let mut fixture = Fixture::with_rows(&grid(8, 5, 6));
    let (_, dataset) = fixture.prepare();
    fixture.write("interactions.csv", csv(&grid(9, 5, 6)));
    fixture.options = PrepareOptions { replace: true, ..PrepareOptions::default() };
    let jobs = [dataset.hold().unwrap(), dataset.hold().unwrap()];
    assert!(jobs.iter().all(Option::is_some), "several jobs may have one dataset");
    let error = fixture.try_prepare().unwrap_err();
    assert!(!error.is_usage() && error.to_string().contains("a job works with"), "{error}");
    assert_eq!(crate::builders::temporary(fixture.dir.path()).len(), 0);
    fixture.write("interactions.csv", csv(&grid(8, 5, 6)));
    assert!(fixture.prepare().0.kept, "the same dataset is in nobody's way");
    fixture.write("interactions.csv", csv(&grid(9, 5, 6)));
    drop(jobs);
    assert!(!fixture.prepare().0.kept);
}

#[test]
fn others_are_asked_before_a_dataset_is_replaced_and_only_then() {
    let mut fixture = Fixture::with_rows(&grid(8, 5, 6));
    fixture.options = PrepareOptions { replace: true, ..PrepareOptions::default() };
    let busy: KeepOut = |path| Err(format!("{} is busy", path.display()));
    assert!(!fixture.try_prepare_with(Some(busy)).unwrap().kept);
    assert!(fixture.try_prepare_with(Some(busy)).unwrap().kept);
    fixture.write("interactions.csv", csv(&grid(9, 5, 6)));
    let error = fixture.try_prepare_with(Some(busy)).unwrap_err();
    assert_eq!(error.to_string(), format!("{} is busy", fixture.out().display()));
    assert_eq!(crate::builders::temporary(fixture.dir.path()).len(), 0);
    let dataset = learn_dataset::Dataset::open(&fixture.out()).unwrap();
    assert!(dataset.hold().unwrap().is_some(), "nobody is kept from it any more");
    let free: KeepOut = |_| Ok(None);
    assert!(!fixture.try_prepare_with(Some(free)).unwrap().kept);
}
