//! On which address a process of the job listens: the one of this machine that faces those who call.
//!
//! The system says it: an UDP socket that is "connected" to a peer (nothing is sent) has the address of the interface that
//! leads there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _, UdpSocket};

use anyhow::{Context as _, Result, bail};

use super::Allocation;
use super::client;

const LOOPBACK: &str = "127.0.0.1";

/// Where the coordinator of a job shall listen, and what to tell the operator of the choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    pub address: String,
    pub notes: Vec<String>,
}

/// `configured` (`cluster.bind`) if it is more than the loopback and this machine can listen there: after a requeue another
/// machine may be the first one. Else the address that the other nodes reach; on a single node that of its own name, if the
/// coordinator shall be `scraped` from elsewhere and others can reach it there, and the loopback otherwise.
///
/// # Errors
/// No other node's address can be found.
pub fn of_coordinator(configured: &str, scraped: bool, allocation: &Allocation) -> Result<Binding> {
    let first = &allocation.first;
    let mut notes = Vec::new();
    let mut alone = configured;
    if !is_loopback(configured) {
        match listens(configured) {
            Ok(()) => return Ok(Binding { address: configured.to_owned(), notes }),
            Err(error) => notes.push(format!(
                "{first} cannot listen on cluster.bind={configured} ({error}); this start listens where it would without it. \
                 `--set cluster.bind=0.0.0.0` holds on every machine"
            )),
        }
        alone = LOOPBACK;
    }
    let others: Vec<&String> = allocation.nodes.iter().filter(|node| *node != first).collect();
    if others.is_empty() {
        let own = if scraped { of_own_name(first) } else { None };
        if scraped && own.is_none() {
            notes.push(format!(
                "--prometheus-targets will have no target of this start: neither DNS nor `scontrol show node` knows an address of \
                 {first} that other machines reach, so the job listens on {alone}. `--set cluster.bind=0.0.0.0` listens on all \
                 interfaces"
            ));
        }
        let address = own.map_or_else(|| alone.to_owned(), |own| own.to_string());
        return Ok(Binding { address, notes });
    }
    for other in &others {
        let Some(address) = resolve(other).into_iter().find_map(towards) else { continue };
        if address.is_loopback() {
            notes.push(format!(
                "{other} is at an address of this machine ({address}): a cluster on one machine? Nobody else can join"
            ));
        }
        return Ok(Binding { address: address.to_string(), notes });
    }
    bail!(
        "cannot find the address of {}, so it is unknown on which interface the other nodes reach {}: neither DNS nor \
         `scontrol show node` knows it. Name the address with cluster.bind (`--set cluster.bind=0.0.0.0` opens all \
         interfaces)",
        others.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", "),
        allocation.first
    )
}

/// The address of this node that its own name leads to: as every program finds it, or else as Slurm knows it.
fn of_own_name(name: &str) -> Option<IpAddr> {
    let own = |ip: &IpAddr| listens(&ip.to_string()).is_ok();
    let by_slurm = || client::node_address(name).map(|address| lookup(&address)).unwrap_or_default();
    reached(&lookup(name), own).or_else(|| reached(&by_slurm(), own))
}

/// The first address that is this machine's `own` and more than its loopback.
fn reached(found: &[SocketAddr], own: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
    found.iter().map(SocketAddr::ip).find(|ip| !ip.is_loopback() && own(ip))
}

/// Where a worker listens: on the interface that leads to its coordinator.
///
/// # Errors
/// The coordinator's address cannot be resolved or reached.
pub fn of_worker(coordinator: &str) -> Result<IpAddr> {
    let found = host_and_port(coordinator)
        .to_socket_addrs()
        .with_context(|| format!("cannot find the coordinator {coordinator}"))?;
    let mut found: Vec<SocketAddr> = found.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    found
        .into_iter()
        .find_map(towards)
        .with_context(|| format!("no interface of this machine leads to the coordinator {coordinator}"))
}

/// `HOST:PORT` of an URL of any scheme.
fn host_and_port(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, rest)| rest).trim_end_matches('/')
}

/// The host of an URL of any scheme, without the brackets of IPv6.
#[must_use]
pub fn host(url: &str) -> &str {
    let address = host_and_port(url);
    address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']'])
}

/// A wildcard is none.
#[must_use]
pub fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether this machine can listen there; it can on a wildcard.
fn listens(address: &str) -> io::Result<()> {
    TcpListener::bind((address, 0)).map(drop)
}

/// By name as every program does, or else as Slurm knows the node.
fn resolve(node: &str) -> Vec<SocketAddr> {
    let found = lookup(node);
    if !found.is_empty() {
        return found;
    }
    client::node_address(node).map(|address| lookup(&address)).unwrap_or_default()
}

/// Those of IPv4 first.
fn lookup(host: &str) -> Vec<SocketAddr> {
    // any port will do: nothing is sent
    let mut found: Vec<SocketAddr> = (host, 9).to_socket_addrs().map(Iterator::collect).unwrap_or_default();
    found.sort_by_key(SocketAddr::is_ipv6);
    found
}

/// The address of this machine from which `peer` is reached.
fn towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocation(nodes: &[&str]) -> Allocation {
        let nodes: Vec<String> = nodes.iter().map(|&node| node.to_owned()).collect();
        Allocation { job: 1, first: nodes[0].clone(), tasks: 2, restarts: 0, nodes }
    }

    #[test]
    fn a_job_on_one_node_stays_on_it_and_a_choice_is_kept() {
        let address = |bind: &str, nodes: &[&str]| of_coordinator(bind, false, &allocation(nodes)).unwrap().address;
        assert_eq!(address("127.0.0.1", &["a"]), "127.0.0.1");
        assert_eq!(address("127.0.0.2", &["a"]), "127.0.0.2");
        assert_eq!(address("0.0.0.0", &["a", "b"]), "0.0.0.0");
    }

    #[test]
    fn an_address_of_another_machine_is_told_of_and_chosen_as_without_it() {
        // 203.0.113.0/24 is nobody's (RFC 5737)
        for configured in ["203.0.113.7", "no-such-node.invalid"] {
            for (nodes, notes) in [(&["a"][..], 1), (&["a", "localhost"], 2)] {
                let binding = of_coordinator(configured, false, &allocation(nodes)).unwrap();
                assert_eq!((binding.address.as_str(), binding.notes.len()), ("127.0.0.1", notes), "{binding:?}");
                let note = &binding.notes[0];
                assert!(note.starts_with(&format!("a cannot listen on cluster.bind={configured}")), "{note}");
                assert!(note.contains("cluster.bind=0.0.0.0"), "{note}");
            }
        }
    }

    #[test]
    fn a_job_on_one_node_that_is_scraped_is_never_served_on_the_loopback_in_silence() {
        for (configured, address, notes) in
            [("127.0.0.1", "127.0.0.1", 1), ("127.0.0.2", "127.0.0.2", 1), ("203.0.113.7", "127.0.0.1", 2)]
        {
            let binding = of_coordinator(configured, true, &allocation(&["localhost"])).unwrap();
            assert_eq!((binding.address.as_str(), binding.notes.len()), (address, notes), "{binding:?}");
            let note = &binding.notes[notes - 1];
            assert!(note.contains("--prometheus-targets") && note.contains("--set cluster.bind=0.0.0.0"), "{note}");
        }
        assert_eq!(of_coordinator("0.0.0.0", true, &allocation(&["localhost"])).unwrap().address, "0.0.0.0");
        let found =
            [[127_u8, 0, 1, 1], [203, 0, 113, 7], [10, 0, 0, 1], [10, 0, 0, 2]].map(|ip| SocketAddr::from((ip, 9)));
        let own = |ip: &IpAddr| ip.to_string().starts_with("10.") || ip.is_loopback();
        assert_eq!(reached(&found, own), Some(IpAddr::from([10, 0, 0, 1])));
        assert_eq!(reached(&found[..2], own), None);
    }

    #[test]
    fn several_nodes_are_never_served_on_the_loopback_in_silence() {
        let text =
            of_coordinator("127.0.0.1", false, &allocation(&["a", "no-such-node.invalid"])).unwrap_err().to_string();
        assert!(text.contains("no-such-node.invalid") && text.contains("cluster.bind"), "{text}");
        let binding = of_coordinator("127.0.0.1", false, &allocation(&["a", "localhost"])).unwrap();
        assert_eq!(binding.address, "127.0.0.1");
        assert!(binding.notes[0].contains("localhost is at an address of this machine"), "{binding:?}");
    }

    #[test]
    fn the_host_of_an_address_is_found_whatever_its_scheme() {
        for (url, expected) in [
            ("http://node1:4100", "node1"),
            ("https://127.0.0.1:4100/", "127.0.0.1"),
            ("https://[::1]:4100", "::1"),
            ("node1:4100", "node1"),
        ] {
            assert_eq!(host(url), expected);
        }
        assert!(is_loopback(host("https://127.0.0.1:1")) && is_loopback(host("https://[::1]:1")));
    }

    #[test]
    fn a_worker_listens_towards_its_coordinator() {
        assert_eq!(of_worker("http://127.0.0.1:1234").unwrap(), IpAddr::from([127, 0, 0, 1]));
        assert!(of_worker("http://no-such-node.invalid:1").unwrap_err().to_string().contains("no-such-node.invalid"));
    }
}
