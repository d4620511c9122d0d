//! How many workers a job of Slurm's has: as many as its request says, whatever the configuration says; pure.
//!
//! Input: a [`Request`], and who has set `cluster.workers` to what. Output: a note, or a refusal that names the request for so many.

use super::script::Request;
use crate::render;
use crate::settings::Origin;

/// Somebody has asked for another number of workers than the request gives.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster.workers={said}{place}, but --nodes {nodes} x {option} {per_node} give {given}: {remedy}")]
pub struct OtherSize {
    said: u32,
    /// Where, if it is nothing that stands on the command line.
    place: String,
    nodes: u32,
    option: &'static str,
    per_node: u32,
    given: u32,
    remedy: String,
}

/// What is to be noted of `cluster.workers`; `said` is its value and who has set it, if anybody has.
///
/// # Errors
/// Another number than the request's was set for this one job, on the command line or in the environment.
pub fn check(request: &Request, said: Option<(u32, &Origin)>) -> Result<Option<String>, OtherSize> {
    let given = request.workers();
    let Some((said, origin)) = said.filter(|(said, _)| *said != given) else { return Ok(None) };
    if let Origin::File { .. } = origin {
        let own = render::workers(given as usize);
        return Ok(Some(format!("{own} (the configuration's {said} do not count on Slurm)")));
    }
    let nodes = request.nodes.unwrap_or(1);
    let (option, asked) = match request.on_gpus() {
        true => ("--gpus-per-node", true),
        false => ("--tasks-per-node", request.tasks_per_node.is_some()),
    };
    let remedy = if said > 0 && said.is_multiple_of(nodes) {
        let verb = if asked { "take" } else { "add" };
        format!("{verb} {option} {}, or leave cluster.workers out", said / nodes)
    } else {
        "leave cluster.workers out".into()
    };
    let place = match origin {
        Origin::Environment(name) => format!(" (environment variable {name})"),
        _ => String::new(),
    };
    Err(OtherSize { said, place, nodes, option, per_node: request.per_node(), given, remedy })
}

/// For people.
#[must_use]
pub fn describe(request: &Request) -> String {
    let machines = match request.nodes.unwrap_or(1) {
        1 => "1 machine".to_owned(),
        nodes => format!("{nodes} machines"),
    };
    format!("{} on {machines}", render::workers(request.workers() as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(request: &Request, said: u32, origin: &Origin) -> String {
        check(request, Some((said, origin))).unwrap_err().to_string()
    }

    #[test]
    fn another_number_that_was_asked_for_is_refused_with_the_request_for_it() {
        let set = Origin::Set("cluster.workers=4".into());
        let one = Request::default();
        assert_eq!(
            refused(&one, 4, &set),
            "cluster.workers=4, but --nodes 1 x --tasks-per-node 1 give 1: add --tasks-per-node 4, or leave cluster.workers out"
        );
        let two = Request { nodes: Some(2), tasks_per_node: Some(1), ..Request::default() };
        assert!(refused(&two, 4, &set).contains("--nodes 2 x --tasks-per-node 1 give 2: take --tasks-per-node 2"));
        assert!(refused(&two, 3, &set).ends_with("give 2: leave cluster.workers out"), "three on two machines alike");
        let gpus = Request { nodes: Some(2), gpus_per_node: Some(8), ..Request::default() };
        let variable = Origin::Environment("LEARN__CLUSTER__WORKERS".into());
        let text = refused(&gpus, 8, &variable);
        assert!(text.starts_with("cluster.workers=8 (environment variable LEARN__CLUSTER__WORKERS), but"), "{text}");
        assert!(text.contains("--gpus-per-node 8 give 16: take --gpus-per-node 4"), "{text}");
    }

    #[test]
    fn that_of_a_file_is_noted_and_the_same_one_is_not() {
        let file = Origin::File { path: "shop.toml".into(), line: 3 };
        let one = Request::default();
        let note = check(&one, Some((2, &file))).unwrap();
        assert_eq!(note.as_deref(), Some("1 worker (the configuration's 2 do not count on Slurm)"));
        for said in [None, Some((1, &file)), Some((1, &Origin::Set("cluster.workers=1".into())))] {
            assert_eq!(check(&one, said).unwrap(), None);
        }
    }

    #[test]
    fn a_size_is_told_in_words() {
        assert_eq!(describe(&Request::default()), "1 worker on 1 machine");
        let gpus = Request { nodes: Some(2), gpus_per_node: Some(8), ..Request::default() };
        assert_eq!(describe(&gpus), "16 workers on 2 machines");
    }
}
