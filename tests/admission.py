#!/usr/bin/env python3
"""Runs the expressions of deploy/kubernetes/admission.yaml on requests that a weftd, honest or not, could make.

The policy is evaluated as the API server does it: match conditions first, variables when they are used, and a request is denied if
a validation is false or cannot be evaluated. Fails if one request is not judged as it stands below.
"""

import copy
import sys

import cel
import yaml

WEFTD = {
    "username": "system:serviceaccount:weft:weft",
    "extra": {"authentication.kubernetes.io/node-name": ["n1"]},
}
NODE = {
    "metadata": {
        "name": "n1",
        "labels": {"kubernetes.io/hostname": "n1"},
        "annotations": {"weft.internal/node": "old", "example.com/other": "x"},
    },
    "spec": {"podCIDRs": ["10.244.1.0/24"]},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
        "capacity": {"cpu": "4"},
        "allocatable": {"cpu": "4"},
        "conditions": [],
    },
}


def changed(path, value):
    """The node with one field set, or removed if `value` is None."""
    node = copy.deepcopy(NODE)
    *way, last = path
    at = node
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return node


def of(name, node):
    return {**node, "metadata": {**node["metadata"], "name": name}}


OWN = ("metadata", "annotations", "weft.internal/node")
CONDITIONS = changed(("status", "conditions"), [{"type": "NetworkUnavailable", "status": "False"}])
BARE = changed(("metadata", "annotations"), None)
NO_LABELS = changed(("metadata", "labels"), None)
TOKEN_OF_NO_NODE = {"username": WEFTD["username"]}
ELSEWHERE = {**WEFTD, "extra": {"authentication.kubernetes.io/node-name": ["n2"]}}
OTHER_EXTRA = {**WEFTD, "extra": {"example.com/x": ["n1"]}}

# What it is, whether it is allowed, who asks, operation, subresource, the node before, the node after.
REQUESTS = [
    ("its own annotation", True, WEFTD, "UPDATE", "", NODE, changed(OWN, "new")),
    ("its own annotation, the first of all", True, WEFTD, "UPDATE", "", BARE, {**BARE, "metadata": {**BARE["metadata"], "annotations": {"weft.internal/node": "new"}}}),
    ("its own annotation goes", True, WEFTD, "UPDATE", "", NODE, changed(OWN, None)),
    ("its conditions", True, WEFTD, "UPDATE", "status", NODE, CONDITIONS),
    ("nothing", True, WEFTD, "UPDATE", "", NODE, NODE),
    ("a node without labels", True, WEFTD, "UPDATE", "", NO_LABELS, NO_LABELS),
    ("somebody else may do anything", True, {"username": "system:admin"}, "DELETE", "", NODE, None),
    ("another node's annotation", False, WEFTD, "UPDATE", "", of("n2", NODE), of("n2", changed(OWN, "new"))),
    ("another node's conditions", False, WEFTD, "UPDATE", "status", of("n2", NODE), of("n2", CONDITIONS)),
    ("a token that was made for another node", False, ELSEWHERE, "UPDATE", "", NODE, changed(OWN, "new")),
    ("a token that was made for no node", False, TOKEN_OF_NO_NODE, "UPDATE", "", NODE, changed(OWN, "new")),
    ("a token that names something else", False, OTHER_EXTRA, "UPDATE", "", NODE, changed(OWN, "new")),
    ("another annotation changes", False, WEFTD, "UPDATE", "", NODE, changed(("metadata", "annotations", "example.com/other"), "y")),
    ("another annotation comes", False, WEFTD, "UPDATE", "", NODE, changed(("metadata", "annotations", "example.com/new"), "y")),
    ("another annotation goes", False, WEFTD, "UPDATE", "", NODE, changed(("metadata", "annotations", "example.com/other"), None)),
    ("all annotations go", False, WEFTD, "UPDATE", "", NODE, BARE),
    ("a label", False, WEFTD, "UPDATE", "", NODE, changed(("metadata", "labels", "role"), "control-plane")),
    ("all labels go", False, WEFTD, "UPDATE", "", NODE, NO_LABELS),
    ("a finalizer", False, WEFTD, "UPDATE", "", NODE, changed(("metadata", "finalizers"), ["example.com/x"])),
    ("a taint", False, WEFTD, "UPDATE", "", NODE, changed(("spec", "taints"), [{"key": "x", "effect": "NoSchedule"}])),
    ("its ranges", False, WEFTD, "UPDATE", "", NODE, changed(("spec", "podCIDRs"), ["10.244.2.0/24"])),
    ("its addresses", False, WEFTD, "UPDATE", "status", NODE, changed(("status", "addresses"), [])),
    ("its addresses go", False, WEFTD, "UPDATE", "status", NODE, changed(("status", "addresses"), None)),
    ("its capacity", False, WEFTD, "UPDATE", "status", NODE, changed(("status", "capacity"), {"cpu": "400"})),
    ("what can be had of it", False, WEFTD, "UPDATE", "status", NODE, changed(("status", "allocatable"), {"cpu": "0"})),
    ("a new node", False, WEFTD, "CREATE", "", None, NODE),
    ("no more node", False, WEFTD, "DELETE", "", NODE, None),
]


def decide(spec, user, operation, subresource, before, after):
    """Whether the request passes, and the reason if it does not."""
    name = (after or before)["metadata"]["name"]
    request = {"userInfo": user, "operation": operation, "subResource": subresource, "name": name}
    context = {"request": request, "object": after, "oldObject": before}
    if not all(cel.evaluate(condition["expression"], context) for condition in spec["matchConditions"]):
        return True, "is no concern of the policy"
    variables = {}
    for variable in spec["variables"]:
        try:
            variables[variable["name"]] = cel.evaluate(variable["expression"], context)
        except Exception:  # Evaluated when it is used; then it is missing.
            continue
    context["variables"] = variables
    for validation in spec["validations"]:
        said = validation.get("message") or cel.evaluate(validation["messageExpression"], context)
        try:
            if cel.evaluate(validation["expression"], context) is not True:
                return False, said
        except Exception as error:
            return False, f"cannot be evaluated: {error}"
    return True, ""


def main():
    documents = list(yaml.safe_load_all(open("deploy/kubernetes/admission.yaml", encoding="utf-8")))
    spec = next(each["spec"] for each in documents if each["kind"] == "ValidatingAdmissionPolicy")
    wrong = 0
    for what, allowed, user, operation, subresource, before, after in REQUESTS:
        passes, said = decide(spec, user, operation, subresource, before, after)
        if passes != allowed or "cannot be evaluated" in said:
            wrong += 1
            print(f"error: {what}: {'allowed' if passes else 'denied'} ({said})", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"{len(REQUESTS)} requests judged by the admission policy as they should be")


if __name__ == "__main__":
    main()
