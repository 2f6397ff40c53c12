#!/usr/bin/env bash
# What only a GPU can show, in calls of at most five minutes that may be killed at any moment:
#   bash benchmarks/gpu.sh pack     here, without a GPU: what is to be carried there (build/flight-kit, 64 MiB at most)
#   bash benchmarks/gpu.sh first    there: smoke, tests of the CUDA kernels, the benchmarks that decide, Triton's tests
#   bash benchmarks/gpu.sh second   there: what failed or was not reached, the rest of the grid, memcheck, peers, models
#   bash benchmarks/gpu.sh tune     there, two minutes: tiles of the Triton kernels
# Results: $OUT/flight.tar.gz (build/flight/flight.tar.gz without OUT), rewritten all along. docs/gpu.md says how to read
# them. Not yet run on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" benchmarks/flight.py "$@"
