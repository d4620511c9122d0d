//! Slurm's short form of lists: `node[1-3,07],login` for hosts, `2(x3),1` for tasks of each node.

/// Most hosts that a list may name: a larger one is damaged.
const MOST: usize = 1 << 20;

/// The hosts of a list, in its order; `None` if it is not one.
#[must_use]
pub fn hosts(list: &str) -> Option<Vec<String>> {
    let mut hosts = Vec::new();
    for part in split(list)? {
        expand(part, String::new(), &mut hosts)?;
    }
    (!hosts.is_empty()).then_some(hosts)
}

/// Parts between commas that stand outside of brackets.
fn split(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, letter) in list.char_indices() {
        match (letter, inside) {
            ('[', false) => inside = true,
            (']', true) => inside = false,
            ('[' | ']', _) => return None,
            (',', false) => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    (!inside && parts.iter().all(|part| !part.is_empty())).then_some(parts)
}

/// `rest` behind `done`, its first brackets expanded, and so on.
fn expand(rest: &str, done: String, hosts: &mut Vec<String>) -> Option<()> {
    let Some((before, behind)) = rest.split_once('[') else {
        hosts.push(done + rest);
        return (hosts.len() <= MOST).then_some(());
    };
    let (ranges, after) = behind.split_once(']')?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(first) || !digits(last) {
            return None;
        }
        let (from, to): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if from > to || to - from >= MOST {
            return None;
        }
        let width = first.len();
        for number in from..=to {
            expand(after, format!("{done}{before}{number:0width$}"), hosts)?;
        }
    }
    Some(())
}

/// Tasks of each node; `None` if it is no such list.
#[must_use]
pub fn tasks_per_node(list: &str) -> Option<Vec<u32>> {
    let mut nodes = Vec::new();
    for part in list.split(',') {
        let (tasks, times) = match part.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        let tasks: u32 = tasks.parse().ok()?;
        if times == 0 || nodes.len().saturating_add(times) > MOST {
            return None;
        }
        nodes.extend(std::iter::repeat_n(tasks, times));
    }
    Some(nodes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_expanded_in_their_order() {
        let hosts = |list| hosts(list).map(|hosts| hosts.join(" "));
        assert_eq!(hosts("node1").unwrap(), "node1");
        assert_eq!(hosts("node[1-2,07],gpu-a").unwrap(), "node1 node2 node07 gpu-a");
        assert_eq!(hosts("n[08-11]").unwrap(), "n08 n09 n10 n11");
        assert_eq!(hosts("r[1-2]n[3-4]-ib").unwrap(), "r1n3-ib r1n4-ib r2n3-ib r2n4-ib");
        for damaged in ["", ",", "a,", "n[1-", "n]1[", "n[2-1]", "n[a-b]", "n[]", "n[1-9999999]", "n[[1]]"] {
            assert_eq!(hosts(damaged), None, "{damaged}");
        }
    }

    #[test]
    fn tasks_of_each_node_are_expanded() {
        assert_eq!(tasks_per_node("2(x2),1").unwrap(), [2, 2, 1]);
        assert_eq!(tasks_per_node("4").unwrap(), [4]);
        for damaged in ["", "2(x", "2(x0)", "a", "2(x2", "1,", "1,2(x18446744073709551615)"] {
            assert_eq!(tasks_per_node(damaged), None, "{damaged}");
        }
    }

    proptest! {
        #[test]
        fn names_without_brackets_stay_as_they_are(names in prop::collection::vec("[a-z][a-z0-9.-]{0,8}", 1..6)) {
            prop_assert_eq!(hosts(&names.join(",")), Some(names));
        }

        #[test]
        fn a_range_has_every_number_once(prefix in "[a-z]{1,4}", from in 0_usize..200, count in 1_usize..50) {
            let list = format!("{prefix}[{from}-{}]", from + count - 1);
            let expected: Vec<_> = (from..from + count).map(|number| format!("{prefix}{number}")).collect();
            prop_assert_eq!(hosts(&list), Some(expected));
        }

        #[test]
        fn nothing_makes_it_panic(list in "[a-z0-9\\[\\],()x-]{0,24}") {
            let _ = (hosts(&list), tasks_per_node(&list));
        }
    }
}
