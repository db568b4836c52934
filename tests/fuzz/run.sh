#!/bin/sh
# Runs every fuzz target for so many seconds (60 unless given): tests/fuzz/run.sh [SECONDS [TARGET...]]
#
# Stable compiler, no cargo-fuzz: libFuzzer is linked in by libfuzzer-sys, and the compiler inserts its coverage counters. New inputs
# stay outside of the tree; a finding is kept in tests/fuzz/artifacts and ends the run with an error.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- forward underlay geneve gre ipip probe masquerade gather virtio neighbour api journal cni config
command -v c++ >/dev/null || { echo "a C++ compiler is missing: apt-get install g++" >&2; exit 1; }

host=$(rustc -vV | sed -n 's/^host: //p')
target=${CARGO_TARGET_DIR:-target}
# With --target, build scripts and macros are not instrumented.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
 -Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --target "$host"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in "$@"; do
    [ -x "$target/$host/release/$name" ] || { echo "there is no target $name; see tests/fuzz/README.md" >&2; exit 2; }
    echo "== $name, $seconds s"
    mkdir -p "$work/$name" "artifacts/$name"
    log=$work/$name.log
    nice "$target/$host/release/$name" -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 \
        -artifact_prefix="artifacts/$name/" -print_final_stats=1 "$work/$name" "corpus/$name" >"$log" 2>&1 || {
        cat "$log" >&2
        echo "$name: a finding; the input is in tests/fuzz/artifacts/$name" >&2
        exit 1
    }
    grep -E 'stat::number_of_executed_units|^#.*DONE' "$log"
done
rm -rf artifacts
