//! Under construction.
/// A pod's TAP.
pub struct Tap;
