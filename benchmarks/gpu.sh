#!/usr/bin/env bash
# Tests and benchmarks on a GPU, in calls of at most five minutes that may be killed at any moment:
#   bash benchmarks/gpu.sh pack     without a GPU: make build/flight-kit (at most 64 MiB) to copy to the GPU machine
#   bash benchmarks/gpu.sh first    with a GPU: smoke, all tests, attention of long sequences
#   bash benchmarks/gpu.sh second   with a GPU: smoke, all tests, the other ops, models
#   bash benchmarks/gpu.sh third    with a GPU: what no earlier call has measured, memcheck, all tests, peers that compile
#   bash benchmarks/gpu.sh tune     with a GPU, two minutes: tiles of the Triton kernels
# Results: $OUT/flight.tar.gz (build/flight/flight.tar.gz without OUT), rewritten continuously. docs/gpu.md says how to
# read them. An H200 has run `first`.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" benchmarks/flight.py "$@"
