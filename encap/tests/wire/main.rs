//! What `weft-encap` promises as a whole, against etherparse as the oracle.

mod coalesce;
mod frames;
mod hostile;
mod oracle;
mod segment;
