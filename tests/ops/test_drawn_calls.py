"""A short share of tests/fuzz.py: every op with drawn shapes, layouts, dtypes, features and instruction sets."""

import random

import fuzz
import fuzz_calls
import pytest
import torch

from transformer_fast.backends import gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.mark.parametrize("op", sorted(fuzz_calls.OPS))
def test_drawn(op):
    count, failures = fuzz.fuzz(op, seed=2026, seconds=30.0, most=50)
    assert count
    assert not failures, "\n".join(failures[:2])


@pytest.mark.parametrize("name", ["eager", "cpu", "sdpa", "onednn", "blas"])
def test_layouts(name, monkeypatch):
    """Any strides and offsets of every tensor of every op, its gradients among them, on every backend."""
    from transformer_fast import backends

    if name in ("onednn", "blas"):  # both products of `linear`, whichever this processor prefers
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch was built without oneDNN")
        monkeypatch.setattr(gemm, "why_not_onednn", lambda: "" if name == "onednn" else "the test wants torch's own")
        backends._select.cache_clear()
    products = ("linear", "multi_head_attention", "projections")
    ran = 0
    for op in products if name in ("onednn", "blas") else sorted(fuzz_calls.OPS):
        for i in range(25 if len(name) > 3 and op in products else 8):
            rng = random.Random(f"{op} {i}")
            call = fuzz_calls.draw(op, rng, layouts=1.0)
            source = fuzz.program(call, rng, name if name in ("eager", "sdpa") else "")
            wrong = fuzz.verdict(source, call, i)
            if "BackendError" in wrong:  # a feature that torch's kernels lack
                continue
            ran += 1
            assert not wrong, f"{wrong}\n{source}"
    backends._select.cache_clear()
    assert ran >= 8
