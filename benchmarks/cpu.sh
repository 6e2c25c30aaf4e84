#!/usr/bin/env bash
# The benchmarks that need no GPU, each at a size that takes a minute or two on two cores. Each ends in a line of JSON;
# with --keep they also write benchmarks/results/. From the repository's root: make bench, or benchmarks/cpu.sh [--keep]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
TIMEFORMAT='-- %R s, of CPU %U s + %S s'
run() {
  echo "== $*"
  time "$PYTHON" "$@"
}
run benchmarks/bench_read.py --rounds 7 "$@"
run benchmarks/bench_storage.py "$@"
run benchmarks/bench_ahead.py "$@"
run benchmarks/bench_write.py --quick
run benchmarks/bench_memory.py --sizes 1024 2048 4096 "$@"
run benchmarks/bench_overhead.py --backbones small "$@"
run benchmarks/bench_peers.py --sizes 2048
run benchmarks/bench_plan.py "$@"
run benchmarks/bench_small_images.py --side 512 --images 1 --batches 4 --repetitions 2 --context none
run benchmarks/bench_context.py --kinds mamba2 longformer window --lengths 8192 16384
run benchmarks/bench_context_memory.py --kinds mamba2 --tokens 65536
run benchmarks/bench_hyper_error.py --lengths 8192 --repeats 1
echo "== all: user and system time of this shell, then of the benchmarks"
times
