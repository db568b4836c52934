//! Addresses that are kept from being given, one by one. Whole prefixes stand in the configuration.

use std::collections::BTreeMap;

use weft_api::{Failure, Reserve};
use weft_ipam::{Facts, LeaseError, reserved_owner};

use super::refusal;
use crate::node::Node;

/// Reserves an address. One that is reserved already is no error.
///
/// # Errors
/// Somebody has it, or the disk refuses.
pub fn reserve(node: &Node, request: &Reserve) -> Result<(), Failure> {
    let note = Some(request.note.clone()).filter(|note| !note.is_empty());
    let labels: BTreeMap<String, String> = note.map(|note| ("note".to_owned(), note)).into_iter().collect();
    match node.store.adopt(reserved_owner(request.address), &[request.address], Facts { labels, ..Facts::default() }) {
        Ok(_) => {
            tracing::info!(address = %request.address, "reserved");
            Ok(())
        }
        Err(LeaseError::Exists { .. }) => Ok(()),
        Err(error) => Err(refusal(&error)),
    }
}
