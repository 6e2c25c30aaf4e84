#!/usr/bin/env bash
# What only a GPU can show: the tests marked `gpu`, then the benchmarks that run on CUDA. Each ends in a line of JSON and
# writes benchmarks/results/. From the repository's root, in its environment: benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q -m gpu
python benchmarks/bench_context_memory.py --device cuda --keep
python benchmarks/bench_flex.py --keep
python benchmarks/bench_swin_attention.py --device cuda --regions 16 --rounds 5 --amp off bf16 --keep
python benchmarks/bench_overhead.py --device cuda --heads classify --side 8192 --backbones convnext_tiny swinv2_tiny_window16_256 --keep
python benchmarks/bench_overhead.py --device cuda --heads segment --side 4096 --backbones convnext_tiny --name overhead_dense --keep
python benchmarks/bench_memory.py --device cuda --sizes 2048 4096 8192 16384 --heads classify --keep
python benchmarks/bench_small_images.py --device cuda --amp bf16 --side 1024 --keep
