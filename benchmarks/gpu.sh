#!/usr/bin/env bash
# All that a change to the GPU code needs a GPU for, in one call: environment report, build, tests, compute-sanitizer,
# benchmarks beside peers, tuning, counters. Each part has a time budget (ten minutes together); one that fails does not stop the next.
# Needs torch with CUDA and nvcc; downloads nothing. Exits 1 if any part failed.
#
# usage: benchmarks/gpu.sh [--out DIR] [--only PART,...] [--scale FACTOR] [--python PYTHON] [--wheels DIR] [--dry-run]
#   --out DIR       results (default: benchmarks/results/<gpu>-<date>)
#   --only PARTS    some of: environment install build tests hopper memcheck racecheck initcheck search search-hopper
#                   tune counters train-step ema
#   --scale FACTOR  multiplies every budget
#   --python PYTHON the Python that has torch (default: python3)
#   --wheels DIR    wheels to install first, for what the machine lacks
#   --dry-run       print the commands and their budgets, run nothing
set -uo pipefail
cd "$(dirname "$0")/.."

out="" only="" scale=1 python=python3 wheels="" dry_run=no
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=yes; shift; continue ;;
    --out | --only | --scale | --python | --wheels)
      [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; } ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "gpu.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  case "$1" in
    --out) out=$2 ;;
    --only) only=$2 ;;
    --scale) scale=$2 ;;
    --python) python=$2 ;;
    --wheels) wheels=$2 ;;
  esac
  shift 2
done

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z /' 'a-z--')
out=${out:-benchmarks/results/${gpu:-no-gpu}-$(date +%Y-%m-%d)}
known="environment install build tests hopper memcheck racecheck initcheck search search-hopper tune counters train-step ema"
for part in ${only//,/ }; do
  case " $known " in *" $part "*) ;; *) echo "gpu.sh: unknown part $part (known: $known)" >&2; exit 2 ;; esac
done

failed=""

# part NAME SECONDS COMMAND: runs it under its budget, its output in DIR/NAME.log
part() {
  local name=$1 seconds status=0 start=$SECONDS result
  case ",${only:-$1}," in *",$name,"*) ;; *) return ;; esac
  seconds=$(awk -v s="$2" -v f="$scale" 'BEGIN { printf "%.2f", s * f }')
  if [ "$dry_run" = yes ]; then
    printf '[%s, at most %s s]\n%s\n' "$name" "$seconds" "$3"
    return
  fi
  timeout --kill-after=10 "$seconds" bash -c "$3" >"$out/$name.log" 2>&1 || status=$?
  result=ok
  [ "$status" -eq 0 ] || result="failed ($status)"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || result="out of time"
  printf '%-12s %-14s %4d s   %s\n' "$name" "$result" $((SECONDS - start)) "$out/$name.log" | tee -a "$out/summary.txt"
  [ "$status" -eq 0 ] && return
  failed="$failed $name"
  tail -n 15 "$out/$name.log" | sed 's/^/    /'
}

[ "$dry_run" = yes ] || { mkdir -p "$out" && : >"$out/summary.txt"; } || exit 1
export VQKERNELS_REQUIRE=cuda,triton PYTHONUNBUFFERED=1

part environment 10 "nvidia-smi; nvidia-smi -q -d CLOCK,POWER | head -n 60; nvcc --version; lscpu | head -n 20
git log -1 --format='commit %H %cI %s'; git status --short
$python -c 'import sys, torch, triton; print(sys.version); print(\"torch\", torch.__version__, \"triton\", triton.__version__)
assert torch.cuda.is_available(), \"torch sees no CUDA device\"
print(torch.cuda.get_device_properties(0))'"

bring=${wheels:+"$python -m pip install --no-index --no-deps '$wheels'/*.whl && "}
part install 30 "$bring$python -m pip install --no-index --no-deps --no-build-isolation -e ."

part build 135 "$python -c 'import vqkernels._extension as e
reports = e.build(cuda=True)
print(*reports, *e.describe().items(), sep=\"\n\")
raise SystemExit(any(report.reason for report in reports))'"

tests="tests/test_nearest.py tests/test_training_ops.py tests/test_cuda_step.py tests/test_triton_kernels.py
 tests/test_triton_search.py tests/test_triton_softmax.py tests/test_torch_integration.py tests/test_codebook.py tests/test_vector_quantizer.py tests/test_compile.py
 tests/test_memory.py"
part tests 100 "$python -m pytest -q --durations=15 -k 'not cpu' ${tests//$'\n'/}"
part hopper 40 "$python -m pytest -q --durations=5 tests/test_cuda_hopper.py"

# a few small cases of every kernel; without torch's caching every allocation has its own end
small='compiled-cuda and (33x129x18 or duplicates or near-duplicates-1ulp or non_finite or codebook_stats or ema or bit_equal or gradients)'
for tool in memcheck racecheck initcheck; do
  part $tool 30 "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \\
  $python -m pytest -q -x tests/test_nearest.py tests/test_training_ops.py -k '$small'"
done

# bench WORDS: run_bench without the command line, whose packages a bare machine may lack
bench() {
  echo "$python -c 'from vqkernels.benchmarks.config import BenchConfig
from vqkernels.benchmarks.main import exit_code, run_bench
raise SystemExit(exit_code(run_bench(BenchConfig($1))))'"
}
part search 65 "$(bench "preset=\"h200\", device=\"cuda\", json=\"$out/search.json\"")"
part search-hopper 35 "VQKERNELS_CUDA_COARSE=hopper $(bench "shape=[\"16384,1024,256\", \"16384,16384,256\",
 \"16384,16384,8\", \"65536,16384,32\", \"8192,262144,18\", \"4096,262144,256\"], provider=[\"vqkernels-compiled\"],
 device=\"cuda\", seconds=3.0, json=\"$out/search-hopper.json\"")"
part tune 25 "VQKERNELS_CACHE='$out' $python -c 'import torch
from vqkernels.kernels import triton_nearest
for n, k, d in ((16384, 1024, 256), (16384, 16384, 256), (16384, 16384, 8), (65536, 16384, 32), (8192, 262144, 18)):
    x, codebook = torch.randn(1, n, d, device=\"cuda\"), torch.randn(k, d, device=\"cuda\")
    print(n, k, d, triton_nearest.tune(x, codebook), flush=True)'"
part counters 25 "command -v ncu >/dev/null || { echo 'no ncu on this machine: hardware counters not read'; exit 0; }
ncu --target-processes all --launch-skip 20 --launch-count 12 --section SpeedOfLight --section ComputeWorkloadAnalysis \\
  --section MemoryWorkloadAnalysis --section Occupancy $python -c 'import torch, vqkernels
for backend in (\"compiled\", \"triton\"):
    with vqkernels.use_backend(backend):
        x, codebook = torch.randn(16384, 256, device=\"cuda\"), torch.randn(16384, 256, device=\"cuda\")
        for _ in range(6): vqkernels.nearest(x, codebook)'"
part train-step 25 "$(bench "operation=\"train-step\", device=\"cuda\", measure=\"both\", seconds=6.0,
 shape=[\"16384,1024,256\", \"16384,16384,256\"], json=\"$out/train-step.json\"")"
part ema 10 "$(bench "operation=\"ema\", device=\"cuda\", shape=[\"16384,1024,256\", \"65536,16384,32\"], seconds=4.0,
 json=\"$out/ema.json\"")"

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
