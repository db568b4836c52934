//! The programs that lead answers back to the host port, one pair for each interface that packets leave by in the node's name.
//!
//! They are attached when the interface's port, the host port's interface and the node's addresses are known, and anew when one of these
//! changes: the new pair stands before the old one goes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use weft_router::PortId;
use weft_router::port::tcx::{Answers, AnswersLed};
use weft_router::tables::{WayOut, came_back};

use super::outlets::name_of;

/// The programs that there are.
#[derive(Debug, Default)]
pub struct AnswerLeads {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    led: BTreeMap<PortId, (Answers, AnswersLed)>,
    problems: BTreeMap<PortId, (Answers, String)>,
}

impl AnswerLeads {
    /// Attaches what these interfaces need, takes the rest away, and gives those of which answers come back. `addresses` are all of the
    /// node's; `host` is the host port's interface.
    pub fn follow(
        &self,
        ways: &[(u32, WayOut)],
        addresses: &[IpAddr],
        host: Option<u32>,
        ports: Option<(u16, u16)>,
    ) -> Vec<WayOut> {
        let mut guard = self.lock();
        let State { led, problems } = &mut *guard;
        let (Some(host), Some(ports)) = (host, ports) else {
            led.clear();
            problems.clear();
            return Vec::new();
        };
        led.retain(|port, _| ways.iter().any(|(_, way)| way.port == *port));
        problems.retain(|port, _| ways.iter().any(|(_, way)| way.port == *port));
        for (uplink, way) in ways {
            let wanted = Answers {
                uplink: *uplink,
                mac: way.mac,
                addresses: addresses.to_vec(),
                ports,
                host,
                came_back: came_back(way.port),
            };
            if led.get(&way.port).is_some_and(|(has, _)| *has == wanted) {
                continue;
            }
            match wanted.lead() {
                Ok(new) => {
                    problems.remove(&way.port);
                    led.insert(way.port, (wanted, new));
                }
                Err(error) => {
                    led.remove(&way.port);
                    let problem = format!(
                        "answers to what pods send by {} cannot be led back, so nothing of pods leaves there in this node's name: {error}",
                        name_of(*uplink)
                    );
                    if problems.get(&way.port).is_none_or(|(_, before)| *before != problem) {
                        tracing::error!("{problem}");
                    }
                    problems.insert(way.port, (wanted, problem));
                }
            }
        }
        ways.iter().map(|(_, way)| way).filter(|way| led.contains_key(&way.port)).cloned().collect()
    }

    /// What could not be attached, and why.
    pub fn problems(&self) -> Vec<String> {
        self.lock().problems.values().map(|(_, problem)| problem.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Addresses that packets may leave as: nobody answers to the others.
pub fn is_public(net: &IpNet) -> bool {
    match net.addr() {
        IpAddr::V4(address) => !(address.is_loopback() || address.is_link_local()),
        IpAddr::V6(address) => !(address.is_loopback() || address.is_unicast_link_local()),
    }
}
