//! The kinds of patches that are used, as the API applies them.

use serde_json::{Map, Value};

/// RFC 7396.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let target = object(target);
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// The same, but lists of conditions and addresses are merged by their `type`, as `patchMergeKey` says in the API's own definitions.
pub fn strategic(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let target = object(target);
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(key)),
            Value::Array(items) if key == "conditions" || key == "addresses" => {
                let list = target.entry(key.clone()).or_insert_with(|| Value::Array(Vec::new()));
                by_type(list, items);
            }
            _ => strategic(target.entry(key.clone()).or_insert(Value::Null), value),
        }
    }
}

fn by_type(list: &mut Value, items: &[Value]) {
    if !list.is_array() {
        *list = Value::Array(Vec::new());
    }
    let list = list.as_array_mut().expect("it was made one");
    for item in items {
        match list.iter_mut().find(|each| each["type"] == item["type"]) {
            Some(found) => strategic(found, item),
            None => list.push(item.clone()),
        }
    }
}

fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("it was made one")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_null_removes_and_the_rest_is_merged() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut target, &json!({"a": {"b": null, "e": 3}, "d": [2]}));
        assert_eq!(target, json!({"a": {"c": 2, "e": 3}, "d": [2]}));
    }

    #[test]
    fn conditions_are_merged_by_type() {
        let mut target = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "1", "m": 1}]}});
        strategic(&mut target, &json!({"status": {"conditions": [{"type": "X", "status": "2"}, {"type": "Y"}]}}));
        let expected =
            json!([{"type": "Ready", "status": "True"}, {"type": "X", "status": "2", "m": 1}, {"type": "Y"}]);
        assert_eq!(target["status"]["conditions"], expected);
    }
}
