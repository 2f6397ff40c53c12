#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: bash benchmarks/gpu.sh
# GPU tests, the ledger of what passed, compute-sanitizer on small shapes, benchmarks with peers, plots: at most ten
# minutes, as every step has its limit. Not yet run on a GPU.
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

# Needed: torch, Triton, transformers, pytest, ninja. What else is not there is named, and done without.
have() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
for module in hypothesis matplotlib psutil tqdm accelerate liger_kernel; do
  have "$module" || echo "not installed: $module: what needs it is left out"
done

step build 90 "$PYTHON" setup.py -q build_ext --inplace
step tests 150 "$PYTHON" -m pytest tests/ops tests/native tests/generation/test_graph_step.py -m gpu --junitxml="$FOLDER/tests.xml"
step ledger 10 "$PYTHON" benchmarks/ledger.py "$FOLDER"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "sanitizer-$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
  done
else
  echo "compute-sanitizer is not on PATH: memory, race and barrier checks not run" | tee "$FOLDER/sanitizer.log"
fi
# With the peers that compile, on the shapes that decide; then the rest of the grid without.
step benchmark-compiled 60 "$PYTHON" benchmarks/run.py --device cuda --quick --slow --no-memory --no-plots \
  --only 'attention-*ward/bf16-*s4096*,t5-bias-*s2048,norm-*layer-norm-32768x1024' --output "$FOLDER"
step benchmark 160 "$PYTHON" benchmarks/run.py --device cuda --quick --no-memory --output "$FOLDER" --missing

echo "results: $FOLDER"
exit "$failed"
