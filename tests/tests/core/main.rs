//! The core without root: hostile frames, a model, and another parser's opinion.

mod hostile;
mod model;
mod oracle;
mod reference;
