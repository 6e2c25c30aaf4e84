#!/usr/bin/env bash
# What only a GPU can show, in under nine minutes: the tests marked `gpu`, then the benchmarks that run on CUDA. Each has
# a time limit, ends in a line of JSON and writes benchmarks/results/; one that fails stops none of the others.
# From the repository's root, in its environment: benchmarks/gpu.sh [more]     more: the rest, which takes longer
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
failed=0

run() { # seconds, script, arguments
    local limit=$1 start=$SECONDS
    shift
    echo "== $*"
    timeout "$limit" python "$@" || { failed=1; echo "== failed or out of time: $*"; }
    echo "== $((SECONDS - start)) s"
}

run 90 -m pytest -q -m gpu
run 130 benchmarks/bench_scale.py 65536:4 --chunk 128 --readers 4 --graphs --segment 32768 --host-gib 0 --name scale_65536 --keep
run 45 benchmarks/bench_scale.py 8192:8 --chunk 128 --readers 4 --graphs --segment 32768 --steps 2 --profile \
    --name scale_8192 --keep
run 70 benchmarks/bench_overhead.py --device cuda --side 8192 --chunk 128 --readers 4 --amp bf16 --heads classify --graphs \
    --only "nothing kept" --backbones swinv2_tiny_window16_256 convnext_tiny hiera_tiny_224 --keep
run 40 benchmarks/bench_overhead.py --device cuda --side 4096 --chunk 64 --readers 4 --amp bf16 --heads classify \
    --only "all kept" --backbones swinv2_tiny_window16_256 convnext_tiny hiera_tiny_224 --name overhead_kept --keep
run 40 benchmarks/bench_ahead.py --device cuda --side 1024 --keep
run 90 benchmarks/bench_small_images.py --device cuda --images 1 --side 4096 --batches 128 --amp bf16 --repetitions 2 --graphs \
    --only "published's model, kept" "published's model, kept, compiled" "published's model, nothing kept" published \
    "published, float16 autocast" --keep
run 30 benchmarks/bench_swin_attention.py --device cuda --regions 64 --amp off bf16 --keep
if [ "${1:-}" = more ]; then
    run 120 benchmarks/bench_scale.py 29000x25000:8 --chunk 64 --readers 4 --graphs --steps 2 --name scale_29000x25000 --keep
    run 600 benchmarks/bench_scale.py 131072:4 --chunk 128 --readers 4 --graphs --segment 32768 --name scale_131072 --keep
    run 600 benchmarks/bench_context_memory.py --device cuda --keep
    run 600 benchmarks/bench_flex.py --keep
    run 300 benchmarks/bench_overhead.py --device cuda --heads segment --side 4096 --chunk 64 --readers 4 --amp bf16 \
        --backbones convnext_tiny --name overhead_dense --keep
    run 300 benchmarks/bench_memory.py --device cuda --sizes 2048 4096 8192 16384 --heads classify --keep
fi
exit $failed
