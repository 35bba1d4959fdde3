#!/usr/bin/env bash
# Build the package on a machine with a GPU, run the tests of the Triton kernels on it, then the GPU
# benchmarks: one JSON and one markdown table in benchmarks/results (or the folder given). Needs
# torch, triton, cmake, pybind11 and scikit-build-core, and no network; ends within 8 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

results=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
mkdir -p "$results"

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can use"'

rm -rf "$site"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
"$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH=$site:$PWD/tests
cd "$site" # away from the source tree, whose ssm_fast has no compiled module

if "$python" -c 'import pytest' 2>/dev/null; then
  set +e
  timeout 200 "$python" -m pytest -q -p no:cacheprovider -c "$OLDPWD/benchmarks/gpu/pytest.ini" \
    --rootdir "$OLDPWD" "$OLDPWD/tests/kernels" 2>&1 | tee "$results/gpu-tests.txt"
  tests=${PIPESTATUS[0]}
  set -e
else
  echo "pytest is not installed: no tests" | tee "$results/gpu-tests.txt"
  tests=0
fi

timeout 220 "$python" "$OLDPWD/benchmarks/gpu/measure.py" --results "$results" --seconds 180
exit "$tests"
