"""The op cases under pytest-benchmark: pytest benchmarks/test_ops_benchmark.py [-k attention].

For work on a single op (--benchmark-compare, --benchmark-histogram). Published results come from run.py, which
interleaves the candidates.
"""

import pytest
from transformer_fast.benchmarks.case import Unavailable, missing
from transformer_fast.benchmarks.op_cases import op_cases

PAIRS = [(case, candidate) for case in op_cases("cpu") for candidate in case.candidates if not candidate.slow]


@pytest.mark.parametrize("case, candidate", PAIRS, ids=[f"{case.name}-{c.name}" for case, c in PAIRS])
def test_op(benchmark, case, candidate):
    reason = missing(candidate, "cpu")
    if reason:
        pytest.skip(reason)
    try:
        call = candidate.prepare(case.inputs(False))
        call()
    except Unavailable as why:
        pytest.skip(str(why))
    benchmark.group = case.name
    benchmark.extra_info["gflop"] = case.flops / 1e9
    benchmark(call)
