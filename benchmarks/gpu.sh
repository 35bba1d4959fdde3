#!/usr/bin/env bash
# Build the package on a machine with a GPU, run the tests of the Triton kernels on it, then the GPU
# benchmarks: one JSON and one markdown table in benchmarks/results (or the folder given). Needs
# torch, triton, a C++ compiler, cmake, pybind11 and scikit-build-core, and no network; ends within
# 8 minutes. Without a GPU it says so and prints the table of what there is to measure.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
results=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
site=$root/build/gpu-site
mkdir -p "$results"

if ! "$python" -c 'import torch, triton; raise SystemExit(not torch.cuda.is_available())'; then
  echo "There is no GPU that torch and triton of $python can use: nothing is tested or measured." >&2
  "$python" benchmarks/gpu/bars.py "$results"
  exit 0
fi

SECONDS=0
rm -rf "$site"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
timeout 180 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH=$site:$root/tests PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
cd "$site" # away from the source tree, whose ssm_fast has no compiled module
echo "built after $SECONDS s"

# A process a file: most of their time they compile.
tests=0
if "$python" -c 'import pytest' 2>/dev/null; then
  logs=$(mktemp -d)
  pids=()
  for file in "$root"/tests/kernels/test_*.py "$root"/tests/meta_rl/test_gpu.py; do
    timeout 150 "$python" -m pytest -q -p no:cacheprovider -c "$root/benchmarks/gpu/pytest.ini" \
      --rootdir "$root" "$file" >"$logs/$(basename "$file" .py)" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || tests=$? # 124: stopped, its results are incomplete
  done
  (cd "$logs" && tail -n +1 -- *) | tee "$results/gpu-tests.txt"
  rm -rf "$logs"
else
  echo "pytest is not installed: no tests" | tee "$results/gpu-tests.txt"
fi
echo "tested after $SECONDS s"

left=$((470 - SECONDS))
timeout "$left" "$python" "$root/benchmarks/gpu/measure.py" --results "$results" \
  --seconds $((left - 40)) || tests=$?
exit "$tests"
