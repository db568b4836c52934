//! The core without root: hostile frames, a model, and another parser's opinion.

// All of this is test code, its helpers included.
#![allow(clippy::unwrap_used)]

mod dates;
mod gathering;
mod hostile;
mod model;
mod oracle;
mod reference;
