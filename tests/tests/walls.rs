//! The dependency walls between the crates: a normal dependency that crosses one fails here, with the way it takes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A crate, and what it must never reach through normal dependencies; a trailing `*` stands for any ending.
const NEVER: &[(&str, &[&str])] = &[
    ("learn-domain", &["tokio", "tonic", "prost", "axum", "arrow-*", "parquet", "memmap2", "tch", "torch-sys"]),
    ("learn-dataset", &["tokio", "tonic", "prost", "axum", "arrow-flight", "tch", "torch-sys"]),
    ("learn-collective", &["tokio", "tonic", "axum", "arrow-*", "tch", "torch-sys"]),
    ("learn-kernels", &["tokio", "tonic", "axum", "arrow-*", "tch", "torch-sys"]),
    ("learn-model", &["tokio", "tonic", "axum", "arrow-flight"]),
    ("learn-coordinator", &["tch", "torch-sys", "cudarc"]),
    ("learn-launch", &["tch", "torch-sys", "cudarc"]),
    ("learn-proto", &["tch", "torch-sys"]),
    ("learn-telemetry", &["tonic", "arrow-*", "tch", "torch-sys"]),
    ("xtask", &["learn-*", "tokio", "tch", "torch-sys"]),
];

/// The only crates of the workspace that may reach libtorch.
const LIBTORCH: &[&str] = &["learn-torch", "learn-model", "learn-ceg", "learn-worker", "learn-fuzz"];

/// Package name -> names of its normal dependencies, and the workspace's own packages.
struct Graph {
    dependencies: BTreeMap<String, BTreeSet<String>>,
    members: BTreeSet<String>,
}

impl Graph {
    /// As cargo resolves it for this machine.
    fn read() -> Result<Self> {
        let host = run(Command::new("rustc").arg("-vV"))?;
        let host = host.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let metadata = run(Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--offline", "--locked", "--manifest-path", manifest])
            .args(["--filter-platform", host]))?;
        Self::from_metadata(&serde_json::from_str(&metadata)?)
    }

    fn from_metadata(metadata: &Value) -> Result<Self> {
        let list = |value: &Value| value.as_array().cloned().context("a list is missing in cargo's metadata");
        let text = |value: &Value| value.as_str().map(str::to_owned).context("a text is missing in cargo's metadata");
        let mut names = BTreeMap::new();
        for package in list(&metadata["packages"])? {
            names.insert(text(&package["id"])?, text(&package["name"])?);
        }
        let name = |id: &Value| names.get(&text(id)?).cloned().context("cargo's metadata names an unknown package");
        let members = list(&metadata["workspace_members"])?.iter().map(name).collect::<Result<_>>()?;
        let mut dependencies: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for node in list(&metadata["resolve"]["nodes"])? {
            let normal = dependencies.entry(name(&node["id"])?).or_default();
            for dependency in list(&node["deps"])? {
                if list(&dependency["dep_kinds"])?.iter().any(|kind| kind["kind"].is_null()) {
                    normal.insert(name(&dependency["pkg"])?);
                }
            }
        }
        Ok(Self { dependencies, members })
    }

    /// The shortest way from a package to one that fits the pattern, as `a -> b -> c`.
    fn way(&self, from: &str, pattern: &str) -> Option<String> {
        let fits = |name: &str| pattern.strip_suffix('*').map_or(name == pattern, |start| name.starts_with(start));
        let mut seen = BTreeSet::from([from.to_owned()]);
        let mut ways = VecDeque::from([vec![from.to_owned()]]);
        while let Some(way) = ways.pop_front() {
            for next in way.last().and_then(|last| self.dependencies.get(last)).into_iter().flatten() {
                if !seen.insert(next.clone()) {
                    continue;
                }
                let longer: Vec<String> = way.iter().chain([next]).cloned().collect();
                if fits(next) {
                    return Some(longer.join(" -> "));
                }
                ways.push_back(longer);
            }
        }
        None
    }

    fn crossings(&self) -> Vec<String> {
        let forbidden = NEVER.iter().flat_map(|(from, targets)| targets.iter().map(|target| (*from, *target)));
        let libtorch = self.members.iter().filter(|member| !LIBTORCH.contains(&member.as_str()));
        let mut found: BTreeSet<String> = forbidden.filter_map(|(from, target)| self.way(from, target)).collect();
        found.extend(libtorch.filter_map(|member| self.way(member, "torch-sys")));
        found.into_iter().collect()
    }
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn no_dependency_crosses_a_wall() {
    let graph = Graph::read().unwrap();
    assert_eq!(graph.crossings(), Vec::<String>::new());
}

#[test]
fn the_walls_name_crates_that_exist() {
    let graph = Graph::read().unwrap();
    for name in NEVER.iter().map(|(from, _)| *from).chain(LIBTORCH.iter().copied()) {
        assert!(graph.members.contains(name), "{name} is no crate of the workspace");
    }
    // A wall against a package that nobody uses would hold even if the reading of the graph were wrong.
    assert!(graph.way("learn-worker", "torch-sys").is_some());
    assert!(graph.way("learn-coordinator", "tokio").is_some());
}

#[test]
fn the_architecture_names_every_crate_and_who_reaches_libtorch() {
    let page = include_str!("../../docs/architecture.md");
    let (_, table) = page.split_once("| crate | folder | builds on |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    for member in &Graph::read().unwrap().members {
        assert!(table.contains(&format!("\n| `{member}`")), "docs/architecture.md has no row for {member}");
    }
    let names: Vec<String> = LIBTORCH.iter().map(|name| format!("`{name}`")).collect();
    let wall = format!("| only {} reach libtorch |", names.join(", "));
    assert!(page.contains(&wall), "docs/architecture.md does not say: {wall}");
}

#[test]
fn a_crossing_is_found_with_its_way_and_build_dependencies_do_not_count() {
    let metadata = serde_json::json!({
        "packages": [
            {"id": "1", "name": "learn-launch"}, {"id": "2", "name": "helper"}, {"id": "3", "name": "torch-sys"},
            {"id": "4", "name": "learn-domain"}, {"id": "5", "name": "tokio"}
        ],
        "workspace_members": ["1", "4"],
        "resolve": {"nodes": [
            {"id": "1", "deps": [{"pkg": "2", "dep_kinds": [{"kind": null}]}]},
            {"id": "2", "deps": [{"pkg": "3", "dep_kinds": [{"kind": null}]}]},
            {"id": "3", "deps": []},
            {"id": "4", "deps": [{"pkg": "5", "dep_kinds": [{"kind": "dev"}, {"kind": "build"}]}]},
            {"id": "5", "deps": []}
        ]}
    });
    let graph = Graph::from_metadata(&metadata).unwrap();
    assert_eq!(graph.crossings(), ["learn-launch -> helper -> torch-sys"]);
}
