#!/bin/sh
# Measures what README's table says, on an otherwise idle CPU: search against faiss and torch, the training step against
# vector-quantize-pytorch, and its peak memory. Takes up to a quarter of an hour; ends with 1 where a goal was missed.
# usage: benchmarks/run_cpu.sh [FILE.json]   (default: benchmarks/results/cpu.json)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python}" -m vqkernels.benchmarks --preset cpu --json "${1:-$here/results/cpu.json}"
