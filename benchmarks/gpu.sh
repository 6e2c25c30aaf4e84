#!/usr/bin/env bash
# What only a GPU can show: the tests marked `gpu`, then the benchmarks that run on CUDA. Each ends in a line of JSON and
# writes benchmarks/results/. From the repository's root, in its environment: benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q -m gpu
python benchmarks/bench_context_memory.py --device cuda --keep
python benchmarks/bench_flex.py --keep
