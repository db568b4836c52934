//! Who speaks for this machine's Node. Pure.
//!
//! A Node's identity is its UID; the machine behind it is whoever has its name, and two machines may have been given one name. Each
//! weftd therefore signs what it says with a number that its machine keeps, and with its address. Whoever finds another signature there
//! when it starts may be the same machine with a new disk, or a second one: it signs, and waits for [`GRACE`] before it serves.
//! If the first is alive it signs again at once, for it was there before, and the newcomer gives way for good.

use std::time::Duration;

use super::objects::{Announced, Node};

/// For how long a newcomer waits for the first one to object.
pub const GRACE: Duration = Duration::from_secs(3);

/// What this weftd did about its Node so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Claim {
    /// Nothing.
    #[default]
    New,
    /// It has signed in another one's place, and may have to give way.
    Contested,
    /// The Node is its own.
    Held,
    /// Another machine is this Node.
    Lost,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Done,
    /// Say who we are.
    Announce,
    /// Say so, and that another machine says that it is this Node.
    Insist,
    /// Nothing, for another machine is this Node.
    GiveWay,
}

impl Claim {
    /// What to do about what stands in the Node, and what the claim is then. `was_at` is the address with which this weftd has signed so far.
    pub fn next(self, node: &Node, ours: &Announced, was_at: Option<&str>) -> (Claim, Step) {
        let is_ours = |said: &Announced| {
            said.identity == ours.identity && (said.underlay == ours.underlay || was_at == Some(&said.underlay))
        };
        let theirs = match &node.announced {
            Some(Ok(theirs)) if !is_ours(theirs) => Some(theirs),
            Some(Ok(same)) if same == ours => {
                let claim = if self == Claim::Contested { Claim::Contested } else { Claim::Held };
                return (claim, Step::Done);
            }
            _ => None,
        };
        match (self, theirs) {
            (Claim::New, Some(_)) => (Claim::Contested, Step::Announce),
            (Claim::Contested | Claim::Lost, Some(_)) => (Claim::Lost, Step::GiveWay),
            (Claim::Held, Some(_)) => (Claim::Held, Step::Insist),
            (Claim::Contested, None) => (Claim::Contested, Step::Announce),
            (Claim::New | Claim::Held | Claim::Lost, None) => (Claim::Held, Step::Announce),
        }
    }

    /// Nobody objected.
    pub fn is_settled(&mut self) {
        if *self == Claim::Contested {
            *self = Claim::Held;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(identity: &str) -> Announced {
        Announced { identity: identity.into(), underlay: "10.0.0.1".into(), mtu: 1450, ..Announced::default() }
    }

    fn node(announced: Option<Announced>) -> Node {
        Node { announced: announced.map(Ok), ..Node::default() }
    }

    #[test]
    fn what_differs_is_written_once() {
        let ours = said("a");
        assert_eq!(Claim::New.next(&node(None), &ours, None), (Claim::Held, Step::Announce));
        assert_eq!(Claim::New.next(&node(Some(ours.clone())), &ours, None), (Claim::Held, Step::Done));
        let older = Announced { mtu: 1400, ..said("a") };
        assert_eq!(Claim::Held.next(&node(Some(older)), &ours, None), (Claim::Held, Step::Announce));
        let absurd = Node { announced: Some(Err("absurd".into())), ..Node::default() };
        assert_eq!(Claim::Held.next(&absurd, &ours, None), (Claim::Held, Step::Announce));
    }

    #[test]
    fn a_machine_whose_address_has_changed_signs_anew() {
        let (before, after) = (said("a"), Announced { underlay: "10.0.0.9".into(), ..said("a") });
        let node = node(Some(before));
        assert_eq!(Claim::Held.next(&node, &after, Some("10.0.0.1")), (Claim::Held, Step::Announce));
        assert_eq!(Claim::Held.next(&node, &after, None), (Claim::Held, Step::Insist), "a copy of its disk has it");
    }

    #[test]
    fn of_two_machines_with_one_name_the_first_stays() {
        let (first, second) = (said("a"), said("b"));
        let (newcomer, step) = Claim::New.next(&node(Some(first.clone())), &second, None);
        assert_eq!((newcomer, step), (Claim::Contested, Step::Announce));
        assert_eq!(Claim::Held.next(&node(Some(second.clone())), &first, None), (Claim::Held, Step::Insist));
        assert_eq!(newcomer.next(&node(Some(second.clone())), &second, None), (Claim::Contested, Step::Done));
        let (lost, step) = newcomer.next(&node(Some(first.clone())), &second, None);
        assert_eq!((lost, step), (Claim::Lost, Step::GiveWay));
        assert_eq!(lost.next(&node(Some(first)), &second, None), (Claim::Lost, Step::GiveWay));
        let mut alone = newcomer;
        alone.is_settled();
        assert_eq!(alone.next(&node(Some(second.clone())), &second, None), (Claim::Held, Step::Done));
    }
}
