#!/usr/bin/env bash
# Settles on a machine with an NVIDIA GPU what the counts only predict, in one call:
#   bench/device.sh            environment, build (both GPU backends), tests, timings
# Results go to $OUT, default bench/reports/device. PYTHON and VENV are as in the Makefile.
set -euo pipefail
cd "$(dirname "$0")/.."

export OUT="${OUT:-$PWD/bench/reports/device}"
export VENV="${VENV:-.venv}"
export FASTL2O_CUDA=1 # an error, not a quiet fallback, where nvcc is missing
mkdir -p "$OUT"

command -v nvidia-smi >/dev/null || { echo "no NVIDIA driver: nvidia-smi is not on PATH" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$OUT/gpu.csv"

make build VENV="$VENV" ${PYTHON:+PYTHON="$PYTHON"} 2>&1 | tee "$OUT/build.log"
python="$VENV/bin/python"
"$python" -c 'import fastl2o; print(fastl2o.info())' | tee "$OUT/info.txt"
"$python" -c 'import fastl2o
for name in ("cuda", "triton"):
    fastl2o.backend(name)' # each must be there

failed=0
"$python" -m pytest -q 2>&1 | tee "$OUT/tests.log" || failed=1
for backend in cuda triton reference; do
  FASTL2O_BACKEND=$backend "$python" bench/device.py --json "$OUT/times_$backend.json" |
    tee "$OUT/times_$backend.txt" || failed=1
done
exit "$failed"
