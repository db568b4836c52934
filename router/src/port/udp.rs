//! Under construction.
/// The UDP underlay.
pub struct Underlay;
