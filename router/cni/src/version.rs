//! The versions of CNI that are spoken, oldest first, and what they differ in.

use serde_json::Value;
use weft_api::{Failure, code};

/// A version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Version; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub const NEWEST: Version = Self::V1_1_0;

    /// The version that a configuration asks for.
    pub fn of(document: &Value) -> Result<Version, Failure> {
        let supported = Self::ALL.map(Self::as_str).join(", ");
        let refuse = |what: String| {
            Failure::new(code::VERSION, what).with_details(format!("set cniVersion to one of {supported}"))
        };
        let asked = match document.get("cniVersion") {
            Some(Value::String(text)) => text,
            // Where the key is absent, the specification of its time means 0.1.0.
            None | Some(Value::Null) => return Err(refuse("the configuration has no cniVersion".to_owned())),
            Some(_) => return Err(refuse("cniVersion is not a string".to_owned())),
        };
        let known = Self::ALL.into_iter().find(|version| version.as_str() == asked);
        known.ok_or_else(|| refuse(format!("cniVersion {} is not supported", crate::input::quoted(asked))))
    }

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Whether each of a result's `ips` says its family (`"version":"4"`).
    pub fn addresses_say_their_family(self) -> bool {
        self < Self::V1_0_0
    }

    /// Whether a result's `routes` may say more than destination and gateway.
    pub fn routes_say_their_metrics(self) -> bool {
        self >= Self::V1_1_0
    }

    /// Whether a result's `interfaces` may say their MTU.
    pub fn interfaces_say_their_mtu(self) -> bool {
        self >= Self::V1_1_0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_supported_version_is_found_by_its_name_and_no_other_is() {
        for version in Version::ALL {
            assert_eq!(Version::of(&json!({ "cniVersion": version.as_str() })).unwrap(), version);
        }
        for other in [json!("0.2.0"), json!("1.1"), json!("2.0.0"), json!(""), json!(null), json!(1), json!("1.1.0 ")] {
            let failure = Version::of(&json!({ "cniVersion": other })).unwrap_err();
            assert_eq!(failure.code, code::VERSION, "{other}");
            assert!(failure.details.contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{failure}");
        }
        assert_eq!(Version::of(&json!({})).unwrap_err().code, code::VERSION);
        assert_eq!(Version::of(&json!([])).unwrap_err().code, code::VERSION);
    }
}
