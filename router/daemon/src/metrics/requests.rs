//! How many of the runtime's requests there were, how they ended, and how long they took.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Bounds in seconds: an ADD takes a millisecond or some tens, and what takes longer than ten seconds is as good as failed.
const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

type Ended = [(&'static str, String); 2];
type Operation = [(&'static str, &'static str); 1];

/// Counts of CNI's operations.
#[derive(Debug, Clone)]
pub struct Requests {
    ended: Family<Ended, Counter>,
    took: Family<Operation, Histogram, fn() -> Histogram>,
}

impl Default for Requests {
    fn default() -> Requests {
        let histogram: fn() -> Histogram = || Histogram::new(BOUNDS);
        Requests { ended: Family::default(), took: Family::new_with_constructor(histogram) }
    }
}

impl Requests {
    /// A request ended with an error code, or 0.
    pub fn count(&self, operation: &'static str, code: u32, took: Duration) {
        self.ended.get_or_create(&[("operation", operation.to_owned()), ("code", code.to_string())]).inc();
        self.took.get_or_create(&[("operation", operation)]).observe(took.as_secs_f64());
    }

    /// Shows them in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Requests of the CNI plugin, by operation and error code (0: done)";
        registry.register("weft_cni_requests", help, self.ended.clone());
        let help = "Time that weftd took for a request of the CNI plugin";
        registry.register_with_unit("weft_cni_request_duration", help, Unit::Seconds, self.took.clone());
    }
}
