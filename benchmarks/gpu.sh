#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: bash benchmarks/gpu.sh
# GPU tests, compute-sanitizer on small shapes, benchmarks with peers, plots. Under ten minutes.
# Results: benchmarks/results/<device>/<date>-<commit>/
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no NVIDIA GPU on this machine; nothing was run." >&2
  exit 2
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
FOLDER=$("$PYTHON" -c 'from transformer_fast.benchmarks.results import machine, result_folder; print(result_folder(machine("cuda")))')
mkdir -p "$FOLDER"
failed=0

step() {  # step NAME SECONDS COMMAND...: runs it with a time limit, keeps its output, goes on when it fails
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$FOLDER/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || { echo "== $name: exit $status"; failed=1; }
}

step build 120 "$PYTHON" setup.py -q build_ext --inplace
step tests 150 "$PYTHON" -m pytest tests -m gpu
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
  done
else
  echo "compute-sanitizer is not on PATH: memory and race checks not run" | tee "$FOLDER/sanitizer.log"
fi
step benchmark 240 "$PYTHON" benchmarks/run.py --device cuda --quick --output "$FOLDER"

echo "results: $FOLDER"
exit "$failed"
