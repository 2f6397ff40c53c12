"""Fixtures of the tests of decoding steps."""

import pytest

from transformer_fast.generation.graph_step import GraphStepper
from transformer_fast.generation.native_step import NativeStepper


@pytest.fixture
def served(monkeypatch, device):
    """The graph steppers that were started. All other steppers are disabled."""
    found = []
    start = GraphStepper.start
    monkeypatch.setattr(GraphStepper, "anywhere", True)
    monkeypatch.setattr(GraphStepper, "start", lambda self: (found.append(self), start(self))[1])
    monkeypatch.setattr(NativeStepper, "why_not", staticmethod(lambda model, prompt: "not here"))
    yield found
    if device == "cuda":
        assert all(s._replay is not None and s._replay != s._run for s in found if s._steps > 1)
