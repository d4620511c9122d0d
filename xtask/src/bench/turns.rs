//! Contestants in turns, so that what the machine does meanwhile meets all of them alike.

use anyhow::Result;
use serde_json::Value;

/// Who is measured: a name, and what measures it once.
pub struct Contestant<'a> {
    pub name: &'static str,
    pub measure: Box<dyn Fn() -> Result<Value> + 'a>,
}

/// Measures A B C, A B C, ...; the answers of each contestant, in its order, `[contestant][round]`.
///
/// # Errors
/// The first one that a contestant has.
pub fn take(rounds: u32, contestants: &[Contestant<'_>], shown: impl Fn(&Value) -> String) -> Result<Vec<Vec<Value>>> {
    let mut answers = vec![Vec::new(); contestants.len()];
    for round in 1..=rounds {
        for (contestant, answers) in contestants.iter().zip(&mut answers) {
            let answer = (contestant.measure)()?;
            eprintln!("  round {round} of {rounds}: {:<8} {}", contestant.name, shown(&answer));
            answers.push(answer);
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn contestants_take_turns() {
        let order = RefCell::new(Vec::new());
        let contestant = |name: &'static str| Contestant {
            name,
            measure: Box::new({
                let order = &order;
                move || {
                    order.borrow_mut().push(name);
                    Ok(Value::from(order.borrow().len()))
                }
            }),
        };
        let answers = take(2, &[contestant("a"), contestant("b")], Value::to_string).unwrap();
        assert_eq!(*order.borrow(), ["a", "b", "a", "b"]);
        assert_eq!(answers, [[Value::from(1), Value::from(3)], [Value::from(2), Value::from(4)]]);
    }
}
