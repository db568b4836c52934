# `make` lists what there is. The work is done by the scripts in .ci/ and deploy/, and by cargo.

SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin:$(HOME)/.cargo/bin

# Where cargo builds, and where the three programs are put together: the lab and the tests look for them there.
export CARGO_TARGET_DIR ?= $(CURDIR)/target
export WEFT_BIN_DIR ?= $(CARGO_TARGET_DIR)/weft

# How thorough `make bench` is: `full` or `short`.
BENCH ?= full

# Where Kubernetes' own programs are, or are built to.
export KUBERNETES_BIN_DIR ?= $(CARGO_TARGET_DIR)/kubernetes

# Seconds for each target of `make fuzz`.
FUZZ_SECONDS ?= 60

.PHONY: help demo test test-kubernetes check bench fuzz build image install uninstall clean
.DEFAULT_GOAL := help

help: ## List these targets
	@echo "Weft: the pod network of a bare-metal cluster as one userspace program per node."
	@echo
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r target text; do \
	    printf '  make %-15s %s\n' "$$target" "$$text"; done
	@echo
	@echo "Programs are built into $(WEFT_BIN_DIR). Missing Debian packages are installed if you are root."

demo: ## Two nodes, four pods, real traffic, in under a minute after building (root)
	@.ci/setup root lab
	@.ci/build
	@"$(WEFT_BIN_DIR)/weft" lab demo

test: ## Every test: units, models, a real kernel (root)
	@.ci/setup root lab test bench
	@.ci/build
	@.ci/test

# Kubernetes is built from Debian's source package at the first time, unless KUBERNETES_BIN_DIR has its programs already.
test-kubernetes: ## Weft in a real Kubernetes cluster of three nodes; not part of `make test` (root)
	@.ci/setup root lab kubernetes
	@.ci/build
	@tests/cluster/build "$(KUBERNETES_BIN_DIR)"
	@tests/cluster/run.py "$(KUBERNETES_BIN_DIR)" "$(WEFT_BIN_DIR)"

check: ## Format, lints, documentation, dependencies, sizes, counts
	@.ci/setup build counts manifests
	@.ci/check

bench: ## The core alone, then Weft beside other data paths: 25 minutes; BENCH=short: 5 (root)
	@.ci/setup root lab bench yardstick
	@.ci/build
	@cargo bench --locked -p weft-benches $(if $(filter short,$(BENCH)),-- --warm-up-time 0.3 --measurement-time 0.7)
	@cargo bench --locked -p weft-benches --bench ratios
	@"$(WEFT_BIN_DIR)/weft" bench $(if $(filter full,$(BENCH)),--full) \
	    --json "$(CARGO_TARGET_DIR)/weft-bench.json" --svg "$(CARGO_TARGET_DIR)/weft-bench.svg"
	@echo "written: $(CARGO_TARGET_DIR)/weft-bench.json and $(CARGO_TARGET_DIR)/weft-bench.svg"

fuzz: ## Every fuzz target for FUZZ_SECONDS (60) each
	@.ci/setup build fuzz
	@CARGO_TARGET_DIR="$(CARGO_TARGET_DIR)/fuzz" tests/fuzz/run.sh $(FUZZ_SECONDS)

build: ## weftd, weft and the static weft-cni, optimised
	@.ci/setup build
	@.ci/build

# Under sudo there may be no cargo: then what was built before is installed.
install: ## Put Weft on this node, for systemd and a container runtime (root)
	@if command -v cargo >/dev/null; then .ci/setup build && .ci/build; fi
	@deploy/install "$(WEFT_BIN_DIR)"

uninstall: ## Take it away again, and leave the node as it was (root)
	@deploy/uninstall "$(WEFT_BIN_DIR)"

image: build ## A container image of it, by podman or docker: localhost/weft
	@deploy/image "$(WEFT_BIN_DIR)"

clean: ## Remove what was built
	@cargo clean
