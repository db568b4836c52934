//! The program by which superframes leave whole in formats that lie directly in IP, on the host port's interface.
//!
//! It is there while this node sends such a format to somebody, and attached anew when the interface is another one. Without it such nodes
//! are reached as well, at the price of cutting superframes here.

use std::sync::{Mutex, PoisonError};

use weft_encap::format::Format;
use weft_router::Router;
use weft_router::port::raw::wrapper::Wrapper;

use crate::control::config::Config;

/// The program, if there is one.
#[derive(Debug, Default)]
pub struct Wrapping {
    state: Mutex<State>,
}

/// Where it is attached, or could not be.
#[derive(Debug, Default)]
struct State {
    interface: Option<u32>,
    problem: Option<String>,
}

impl Wrapping {
    /// Attaches or detaches it, as this configuration wants it. `interface` is the host port's, in the calling thread's namespace.
    pub fn follow(&self, config: &Config, interface: Option<u32>, router: &Router) {
        let interface = interface.filter(|_| is_wanted(config));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.interface == interface {
            return;
        }
        *state = State { interface, problem: None };
        match interface.map(Wrapper::attach) {
            None => router.set_wrapper(None),
            Some(Ok(wrapper)) => router.set_wrapper(Some(wrapper)),
            Some(Err(error)) => {
                router.set_wrapper(None);
                let problem =
                    format!("superframes to nodes by GRE or IP in IP are cut by weftd, which is much slower: {error}");
                tracing::warn!("{problem}");
                state.problem = Some(problem);
            }
        }
    }

    /// Why it could not be attached.
    pub fn problem(&self) -> Option<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).problem.clone()
    }
}

fn is_wanted(config: &Config) -> bool {
    let format = |peer| config.tunnel_to(peer);
    config.peers.iter().map(format).any(|format| matches!(format, Format::Gre | Format::Gretap | Format::Ipip))
}
