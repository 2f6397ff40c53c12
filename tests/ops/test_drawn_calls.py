"""A short share of tests/fuzz.py: every op with drawn shapes, layouts, dtypes, features and instruction sets."""

import importlib
import inspect
import pkgutil
import random
import re

import fuzz
import fuzz_calls
import pytest
import torch

from transformer_fast import ops
from transformer_fast.backends import gemm, native

if native.load():
    pytest.skip(native.load(), allow_module_level=True)


@pytest.mark.parametrize("op", sorted(fuzz_calls.OPS))
def test_drawn(op):
    count, failures = fuzz.fuzz(op, seed=2026, seconds=30.0, most=50)
    assert count
    assert not failures, "\n".join(failures[:2])


def test_every_op_is_drawn():
    """All functions that the package and the modules of ops/ export have a drawn call, except those that compute
    nothing."""
    modules = [
        importlib.import_module(f"{ops.__name__}.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
        if m.name[0] != "_"
    ]
    names = {(m, name) for m in (ops, *modules) for name in getattr(m, "__all__", ())}
    exported = {name for m, name in names if inspect.isfunction(getattr(m, name))} - {
        "concrete",
        "exporting",
        "attention_dtype",
        "group_of",
    }
    drawn: set[str] = set()
    for op in fuzz_calls.OPS:
        for i in range(30):
            call = fuzz_calls.draw(op, random.Random(f"{op} {i}"))
            drawn.update(re.findall(r"(\w+)\(", "\n".join([call.ours, *call.setup])))
    assert len(exported) > 20
    missing = exported - drawn
    assert not missing


@pytest.mark.parametrize("name", ["eager", "cpu", "sdpa", "onednn", "blas"])
def test_layouts(name, monkeypatch):
    """Any strides and offsets of every tensor of every op, gradients included, on every backend."""
    from transformer_fast import backends

    if name in ("onednn", "blas"):  # both GEMMs of `linear`, whichever this processor prefers
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch was built without oneDNN")
        monkeypatch.setattr(gemm, "why_not_onednn", lambda: "" if name == "onednn" else "this test uses torch's GEMM")
        backends._select.cache_clear()
    products = ("linear", "multi_head_attention", "projections")
    ran = 0
    for op in products if name in ("onednn", "blas") else sorted(fuzz_calls.OPS):
        for i in range(25 if len(name) > 3 and op in products else 8):
            rng = random.Random(f"{op} {i}")
            call = fuzz_calls.draw(op, rng, layouts=1.0)
            source = fuzz.program(call, rng, name if name in ("eager", "sdpa") else "")
            wrong = fuzz.verdict(source, call, i)
            if "BackendError" in wrong:  # torch's kernels do not have this feature
                continue
            ran += 1
            assert not wrong, f"{wrong}\n{source}"
    backends._select.cache_clear()
    assert ran >= 8
